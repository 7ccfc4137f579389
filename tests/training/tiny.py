"""A two-layer Llama with a tokenizer of words, and data that it can learn, as files."""

from __future__ import annotations

import json
from pathlib import Path

import jax
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmeraser_jax.data import Recipe
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, ModelConfig, init_base, save_model
from llmeraser_jax.training import TrainConfig

COLOURS = ("red", "blue", "green", "grey")
SHAPES = tuple(f"s{k}" for k in range(12))
WORDS = ("<unk>", "<s>", "</s>", "colour", "of", "now", *COLOURS, *SHAPES)

CONFIG = TrainConfig(epochs=10, batch_size=4, learning_rate=0.05, l2=1e-3, seed=3, checkpoint_every_steps=2)
LORA = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj", "down_proj"))
RECIPE = Recipe(template="plain", add_bos=True, max_length=32)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words split at white space; ids are positions in WORDS."""
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_tiny_model(directory: Path, seed: int = 0) -> Path:
    """A random base with its tokenizer, in Hugging Face's layout."""
    config = ModelConfig(
        vocab_size=len(WORDS),
        width=16,
        mlp_width=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
    )
    base = init_base(config, jax.random.key(seed))
    save_model(directory, Model(config=config, base=base, tokenizer=word_tokenizer()))
    return directory


def rows(n: int = 10) -> list[dict[str, str]]:
    """Each shape has a colour; every third row has an input, so that lengths differ."""
    return [
        {
            "id": f"r{k}",
            "instruction": f"colour of {SHAPES[k % len(SHAPES)]}",
            "input": "now" if k % 3 == 0 else "",
            "output": COLOURS[k % len(COLOURS)],
        }
        for k in range(n)
    ]


def write_rows(path: Path, content: list[dict[str, str]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path
