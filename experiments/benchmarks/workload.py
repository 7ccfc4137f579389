"""Owns what is measured on: model shapes with random weights, examples with TALLRec-like lengths, and the entries.

Both libraries read the same files: a base model in Hugging Face layout with a tokenizer of made-up words, an
adapter in PEFT's format, training data and a request file. Weights are random, so a whole erasure is measured for
its time and not for what it forgets.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmeraser_jax import files, trees
from llmeraser_jax.data import Example, Recipe, TokenDataset, encode_examples, save_examples
from llmeraser_jax.lora import LoraConfig, init_lora, save_adapter
from llmeraser_jax.models import Model, ModelConfig, init_base, save_model

_SPECIAL = ("<s>", "</s>", "<pad>")
RECIPE = Recipe(template="plain", add_bos=True, max_length=512)
RESPONSE_WORDS = 4  # and the end of sequence: 5 tokens under the loss
L2 = 1e-3
RANK = 8
CG_STEPS = 5
ERASE_ROWS, ERASE_SAMPLE = 32, 16  # rows of an erasure's training set, and behind its curvature
# By curvature: enough for a positive definite system on random weights (Ritz values of the Hessian reach -6.3 at
# 1m), and little enough that no solve converges before it has taken its iterations.
CG_DAMPING = {"hessian": 20.0, "gauss-newton": 1.0}

# Entries of each group, by side, in the order in which a repetition runs them.
GROUPS: dict[str, tuple[tuple[str, str], ...]] = {
    "ceiling": tuple((side, f"matmul {dtype}") for dtype in ("float32", "bfloat16") for side in ("jax", "torch")),
    "products": (
        ("jax", "gradient"),
        ("torch", "gradient"),
        ("torch", "gradient compiled"),
        ("jax", "gradients of rows"),
        ("jax", "hessian recomputed"),
        ("torch", "hessian recomputed"),
        ("torch", "hessian differences"),
        ("jax", "hessian kept"),
        ("torch", "hessian kept"),
        ("jax", "gauss-newton recomputed"),
        ("torch", "gauss-newton recomputed"),
        ("jax", "gauss-newton kept"),
        ("torch", "gauss-newton kept"),
    ),
    "many": (("jax", "hessian recomputed"), ("jax", "hessian recomputed k=8")),
    "cg": (
        ("jax", "cg hessian recomputed"),
        ("torch", "cg hessian recomputed"),
        ("jax", "cg hessian kept"),
        ("torch", "cg hessian kept"),
        ("jax", "cg gauss-newton kept"),
        ("torch", "cg gauss-newton kept"),
    ),
    "erase": (("jax", "erase"), ("torch", "erase recomputed"), ("torch", "erase kept")),
    "default": (("jax", "default erase"),),
}
# Passes through the decoder's matrices that an entry cannot do without: a token takes 2 FLOPs a weight in each.
PASSES = {
    "gradient": 2, "gradient compiled": 2, "gradients of rows": 2,
    "hessian recomputed": 4, "hessian differences": 4, "hessian kept": 2,
    "gauss-newton recomputed": 3, "gauss-newton kept": 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama without its weights, and how many rows are measured on it.

    Attributes:
        width, mlp_width: numbers per token between layers, and inside the feed-forward block.
        num_layers, num_heads, num_kv_heads: of the decoder.
        examples: rows that a product is measured on.
        chunk_size, torch_chunk_size: rows of a micro-batch of the package and of PyTorch: each at its fastest.
        vocab_size: of the made-up tokenizer.
    """

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    examples: int
    chunk_size: int
    torch_chunk_size: int
    vocab_size: int = 32000

    def config(self) -> ModelConfig:
        """As the package's model configuration."""
        sizes = ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads")
        return ModelConfig(**{name: getattr(self, name) for name in sizes}, head_dim=self.width // self.num_heads,
                           max_position=2048, bos_token_id=0, eos_token_ids=(1,), pad_token_id=2)  # fmt: skip

    @property
    def decoder_parameters(self) -> int:
        """Weights of the decoder layers: what a size is named after; embedding and head come on top."""
        kv_width = self.width * self.num_kv_heads // self.num_heads
        attention = 2 * self.width * (self.width + kv_width)
        return self.num_layers * (attention + 3 * self.width * self.mlp_width)


def _shape(*sizes: int) -> Shape:
    names = [field.name for field in dataclasses.fields(Shape)]
    return Shape(**dict(zip(names, sizes, strict=False)))


SHAPES: Mapping[str, Shape] = {
    "toy": _shape(64, 128, 2, 4, 2, 4, 2, 4, 500),
    "1m": _shape(128, 352, 5, 4, 4, 24, 2, 4),
    "10m": _shape(320, 864, 8, 5, 5, 8, 1, 4),
    "110m": _shape(768, 2048, 16, 12, 12, 32, 8, 8),
    "1b": _shape(2048, 8192, 16, 32, 8, 16, 8, 8),
    "7b": _shape(4096, 11008, 32, 32, 32, 8, 4, 4),
}


def tallrec_lengths(num: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of `num` prompts: log-normal about 160, cut to [100, 250], as lists of films with a question have."""
    return np.clip(np.exp(rng.normal(np.log(160), 0.28, num)), 100, 250).astype(np.int64)


def make_examples(num: int, seed: int, vocab_size: int) -> list[Example]:
    """Random words: a prompt of a drawn length, BOS included, and a response of `RESPONSE_WORDS`."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> str:
        return " ".join(f"w{word}" for word in rng.integers(len(_SPECIAL), vocab_size, count))

    return [
        Example(id=str(i), instruction=words(int(n) - 1), response=words(RESPONSE_WORDS), format="prompt")
        for i, n in enumerate(tallrec_lengths(num, rng))
    ]


def make_tokenizer(vocab_size: int) -> Any:
    """A tokenizer whose tokens are the words `w3`, `w4`, ... and three special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(_SPECIAL)}
    vocabulary.update({f"w{i}": i for i in range(len(_SPECIAL), vocab_size)})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Files of one size, and what is measured on them.

    Attributes:
        directory: holds `base-<dtype>/`, `adapter/`, `train.jsonl` and `requests.jsonl`; the erasure by default
            reads `many/`, with `calibration.jsonl` besides.
        shape: of the model.
        dtype: of the base.
        rows: of the erasure by default.
    """

    directory: Path
    shape: Shape
    dtype: str
    rows: int = 2000

    @property
    def base(self) -> Path:
        """The base model."""
        return self.directory / f"base-{self.dtype}"

    def measured_rows(self, dataset: TokenDataset) -> tuple[np.ndarray, np.ndarray]:
        """Indices and coefficients of the rows behind a gradient or a product: their mean."""
        indices = np.arange(min(self.shape.examples, len(dataset)))
        return indices, np.full(len(indices), 1 / len(indices))


def write_workload(workload: Workload, seed: int = 0) -> None:
    """Writes what is missing of a workload's files."""
    shape, directory = workload.shape, workload.directory
    config = shape.config()
    directory.mkdir(parents=True, exist_ok=True)
    if not workload.base.exists():
        base = init_base(config, jax.random.key(seed), workload.dtype)
        save_model(workload.base, Model(config=config, base=base, tokenizer=make_tokenizer(shape.vocab_size)))
    if not (directory / "adapter").exists():
        # Away from its initialisation, so that both factors matter.
        key, noise = jax.random.split(jax.random.key(seed + 1))
        lora = init_lora(key, LoraConfig(rank=RANK, alpha=2.0 * RANK, target_modules="all-linear"), config)
        lora = trees.tree_axpy(0.02, trees.tree_random_normal(noise, lora), lora)
        shapes = jax.eval_shape(lambda: init_base(config, jax.random.key(seed)))
        save_adapter(directory / "adapter", lora, Model(config=config, base=shapes, path=str(workload.base)))
    _write_rows(directory, max(ERASE_ROWS, shape.examples), 1 / 16, seed + 2, shape.vocab_size)
    many = directory / "many"
    many.mkdir(exist_ok=True)
    _write_rows(many, workload.rows, 0.005, seed + 3, shape.vocab_size)
    save_examples(many / "calibration.jsonl", make_examples(ERASE_ROWS, seed + 4, shape.vocab_size))


def _write_rows(directory: Path, rows: int, share: float, seed: int, vocab_size: int) -> None:
    """Training rows, and requests that remove a share of them and correct as many."""
    examples = make_examples(rows, seed, vocab_size)
    save_examples(directory / "train.jsonl", examples)
    count = max(1, int(rows * share))
    lines: list[dict[str, str]] = [{"id": str(i), "action": "remove"} for i in range(count)]
    lines += [
        {"id": str(i), "action": "correct_response", "response": examples[i - count].response}
        for i in range(count, 2 * count)
    ]
    files.atomic_write_text(directory / "requests.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def encode(examples, tokenizer) -> TokenDataset:
    """The training set as both libraries see it, in two buckets of length: every program holds each bucket's."""
    return encode_examples(examples, RECIPE, tokenizer, max_buckets=2)


def solve_facts(iterations: int, *, negative_curvature: bool) -> dict[str, Any]:
    """Products of a solve: one for each iteration, and one for the true residual.

    Raises:
        RuntimeError: the solve ended early, so that its products are not what was to be timed.
    """
    if negative_curvature or iterations != CG_STEPS:
        why = "met negative curvature" if negative_curvature else "converged"
        msg = f"The solve {why} after {iterations} of {CG_STEPS} iterations; CG_DAMPING does not suit this model."
        raise RuntimeError(msg)
    return {"products": iterations + 1}
