"""Owns what is measured on: model shapes with random weights, and examples with TALLRec-like lengths.

Both libraries read the same files: a base model in Hugging Face layout with a tokenizer of 32000 made-up words, an
adapter in PEFT's format, training data and a request file. Weights are random, so a whole erasure is measured for
its time and not for what it forgets.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from llmeraser_jax import files, trees
from llmeraser_jax.data import Example, Recipe, TokenDataset, encode_examples, save_examples
from llmeraser_jax.lora import Lora, LoraConfig, init_lora, save_adapter
from llmeraser_jax.models import Model, ModelConfig, init_base, save_model

VOCAB_SIZE = 32000
_SPECIAL = ("<s>", "</s>", "<pad>")
RECIPE = Recipe(template="plain", add_bos=True, max_length=512)
RESPONSE_WORDS = 4  # and the end of sequence: 5 tokens under the loss
L2 = 1e-3
MAX_BUCKETS = 2  # of length: every program holds each bucket's, so that a third is half as much compilation again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama without its weights.

    Attributes:
        width: numbers per token between layers.
        mlp_width: numbers per token inside the feed-forward block.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        examples: rows that a product is measured on, by default.
        chunk_size: rows of a micro-batch, by default: where the package is fastest.
        torch_chunk_size: the same of PyTorch.
    """

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    examples: int
    chunk_size: int
    torch_chunk_size: int

    def config(self, vocab_size: int = VOCAB_SIZE) -> ModelConfig:
        """As the package's model configuration."""
        return ModelConfig(
            vocab_size=vocab_size,
            width=self.width,
            mlp_width=self.mlp_width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.width // self.num_heads,
            max_position=2048,
            bos_token_id=0,
            eos_token_ids=(1,),
            pad_token_id=2,
        )

    @property
    def decoder_parameters(self) -> int:
        """Weights of the decoder layers: what a size is named after; embedding and head come on top."""
        kv_width = self.width * self.num_kv_heads // self.num_heads
        attention = 2 * self.width * (self.width + kv_width)
        return self.num_layers * (attention + 3 * self.width * self.mlp_width)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "1m": Shape(
            width=128,
            mlp_width=352,
            num_layers=5,
            num_heads=4,
            num_kv_heads=4,
            examples=24,
            chunk_size=2,
            torch_chunk_size=4,
        ),
        "10m": Shape(
            width=320,
            mlp_width=864,
            num_layers=8,
            num_heads=5,
            num_kv_heads=5,
            examples=8,
            chunk_size=1,
            torch_chunk_size=4,
        ),
        "110m": Shape(
            width=768,
            mlp_width=2048,
            num_layers=16,
            num_heads=12,
            num_kv_heads=12,
            examples=32,
            chunk_size=8,
            torch_chunk_size=8,
        ),
        "1b": Shape(
            width=2048,
            mlp_width=8192,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            examples=16,
            chunk_size=8,
            torch_chunk_size=8,
        ),
        "7b": Shape(
            width=4096,
            mlp_width=11008,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            examples=8,
            chunk_size=4,
            torch_chunk_size=4,
        ),
    }
)


def tallrec_lengths(num: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of `num` prompts: log-normal about 160, cut to [100, 250], as lists of films with a question have."""
    return np.clip(np.exp(rng.normal(np.log(160), 0.28, num)), 100, 250).astype(np.int64)


def make_examples(
    num: int, seed: int, vocab_size: int = VOCAB_SIZE, lengths: np.ndarray | None = None
) -> list[Example]:
    """Random words: a prompt of a drawn length and a response of `RESPONSE_WORDS`.

    Args:
        num: how many.
        seed: of words and lengths.
        vocab_size: of the tokenizer.
        lengths: of the prompts, in tokens, BOS included; None draws `tallrec_lengths`.
    """
    rng = np.random.default_rng(seed)
    lengths = tallrec_lengths(num, rng) if lengths is None else lengths

    def words(count: int) -> str:
        return " ".join(f"w{word}" for word in rng.integers(len(_SPECIAL), vocab_size, count))

    return [
        Example(
            id=str(i),
            instruction=words(int(length) - 1),
            response=words(RESPONSE_WORDS),
            format="prompt",
        )
        for i, length in enumerate(lengths)
    ]


def make_tokenizer(vocab_size: int = VOCAB_SIZE):
    """A tokenizer whose tokens are the words `w3`, `w4`, ... and three special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(_SPECIAL)}
    vocabulary.update({f"w{i}": i for i in range(len(_SPECIAL), vocab_size)})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def random_lora(config: ModelConfig, rank: int, seed: int) -> Lora:
    """An adapter on all seven projections, away from its initialisation so that both factors matter."""
    key, noise = jax.random.split(jax.random.key(seed))
    lora = init_lora(key, LoraConfig(rank=rank, alpha=2.0 * rank, target_modules="all-linear"), config)
    return trees.tree_axpy(0.02, trees.tree_random_normal(noise, lora), lora)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Files of one size, and how much of them is measured.

    Attributes:
        directory: holds `base-<dtype>/`, `adapter/`, `train.jsonl` and `requests.jsonl`.
        dtype: of the base.
        examples: rows behind a gradient or a product.
        chunk_size: rows of the package's micro-batches.
        torch_chunk_size: of PyTorch's.
        erase_rows: rows of the training set of an erasure.
        erase_sample: rows behind its curvature.
        cg_steps: iterations of every solve.
        diagnostic_sample: rows behind the gradient norms in an erasure's receipt.
    """

    directory: Path
    dtype: str
    examples: int
    chunk_size: int
    torch_chunk_size: int
    erase_rows: int
    erase_sample: int
    cg_steps: int
    diagnostic_sample: int = 8

    @property
    def base(self) -> Path:
        return self.directory / f"base-{self.dtype}"

    @property
    def adapter(self) -> Path:
        return self.directory / "adapter"

    @property
    def train(self) -> Path:
        return self.directory / "train.jsonl"

    @property
    def requests(self) -> Path:
        return self.directory / "requests.jsonl"

    def measured_rows(self, dataset: TokenDataset) -> tuple[np.ndarray, np.ndarray]:
        """Indices and coefficients of the rows behind a gradient or a product: their mean."""
        indices = np.arange(min(self.examples, len(dataset)))
        return indices, np.full(len(indices), 1 / len(indices))


def write_workload(
    workload: Workload, shape: Shape, *, rank: int, seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> None:
    """Writes what is missing of a workload's files. Sixteenths of the training rows are removed, and corrected."""
    config = shape.config(vocab_size)
    workload.directory.mkdir(parents=True, exist_ok=True)
    if not workload.base.exists():
        base = init_base(config, jax.random.key(seed), workload.dtype)
        save_model(workload.base, Model(config=config, base=base, tokenizer=make_tokenizer(vocab_size)))
    if not workload.adapter.exists():
        lora = random_lora(config, rank, seed + 1)
        shapes = jax.eval_shape(lambda: init_base(config, jax.random.key(seed)))
        save_adapter(workload.adapter, lora, Model(config=config, base=shapes, path=str(workload.base)))
    rows = max(workload.erase_rows, workload.examples)
    examples = make_examples(rows, seed + 2, vocab_size)
    save_examples(workload.train, examples)
    count = max(1, rows // 16)
    lines = [{"id": str(i), "action": "remove"} for i in range(count)]
    lines += [
        {"id": str(i), "action": "correct_response", "response": examples[i - count].response}
        for i in range(count, 2 * count)
    ]
    files.atomic_write_text(workload.requests, "".join(json.dumps(line) + "\n" for line in lines))


def encode(examples, tokenizer) -> TokenDataset:
    """The training set as both libraries see it."""
    return encode_examples(examples, RECIPE, tokenizer, max_buckets=MAX_BUCKETS)
