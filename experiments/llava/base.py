"""Trains the small vision-language model from nothing, tower, projector and text model together.

It sees freshly drawn pictures in which no colour is tied to a shape, with a description of each and two questions
about it; what it is to learn of the experiment's rows is left to their adapter.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.llava import drawing
from llmeraser_jax.data import PicturePlaces, PictureProcessor, places_of
from llmeraser_jax.models import ApplyDecoder, Model, ModelConfig, init_base, load_model, save_model
from llmeraser_jax.models.vision import VisionConfig, VisionTower, init_vision

logger = logging.getLogger("llava")

_BEGIN, _END, _UNKNOWN, _IMAGE = "<s>", "</s>", "<unk>", "<image>"
_WORDS = (
    *("Question:", "Answer:", "which", "shape", "?", "is"),
    *(*drawing.LETTERS, *drawing.SHAPES, *drawing.COLOURS, *drawing.RELATIONS, *drawing.PLACES, *drawing.YES_NO),
)
_PATCH = 8
_NUM_FEATURES = (drawing.SIZE // _PATCH) ** 2


def make_tokenizer() -> Any:
    """One token for each word, with BOS, EOS and the image token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = (_UNKNOWN, _BEGIN, _END, _IMAGE, *_WORDS)
    inner = Tokenizer(models.WordLevel({piece: k for k, piece in enumerate(pieces)}, unk_token=_UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([_BEGIN, _END, _IMAGE])
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=_UNKNOWN, bos_token=_BEGIN, eos_token=_END, model_max_length=128
    )
    processor = PictureProcessor(
        resize=None, crop=(drawing.SIZE, drawing.SIZE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )
    tokenizer.picture_places = PicturePlaces(
        processor=processor, token=_IMAGE, token_id=pieces.index(_IMAGE), num_tokens=_NUM_FEATURES
    )
    return tokenizer


def make_config(tokenizer: Any, width: int, num_layers: int) -> ModelConfig:
    """The small model: a CLIP tower of two layers on 16 patches, and a Llama."""
    sizes: dict[str, Any] = {"width": width, "mlp_width": 2 * width, "num_heads": 4}
    return ModelConfig(
        **sizes, num_layers=num_layers, num_kv_heads=4, head_dim=width // 4, norm_eps=1e-5, tied_embeddings=True,
        vocab_size=len(tokenizer), max_position=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
        vision=VisionConfig(
            **sizes, num_layers=2, image_token=tokenizer.convert_tokens_to_ids(_IMAGE), image_size=drawing.SIZE,
            patch_size=_PATCH, feature_layers=(-1,),
        ),
    )  # fmt: skip


def _document(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A picture, and its description with questions, two of them where it has two shapes, and their answers."""
    related = rng.random() < 0.6
    asked = [drawing.relation_question(rng) if related else drawing.class_question(rng, tied=0.25)]
    if related:
        asked.append(drawing.relation_question(rng, asked[0].shapes))
    questions = " ".join(f"Question: {q.text} Answer: {q.answer} {_END}" for q in asked)
    told = " ".join(shape.words for shape in asked[0].shapes)
    # Questions come first half of the time: the answer is then read off the picture, not off the description.
    told = f"{questions} {told}" if rng.random() < 0.5 else f"{told} {questions}"
    return drawing.draw(asked[0].shapes, rng), f"{_BEGIN} {_IMAGE} {told}"


def _batch(tokenizer: Any, rng: np.random.Generator, size: int, time: int):
    places = places_of(tokenizer)
    assert places is not None
    pixels = np.zeros((size, 3, drawing.SIZE, drawing.SIZE), np.float32)
    tokens = np.zeros((size, time), np.int32)
    mask = np.zeros((size, time), np.int32)
    for row in range(size):
        drawn, text = _document(rng)
        (ids,) = places.expand(tokenizer(text, add_special_tokens=False)["input_ids"])
        pixels[row] = np.moveaxis(((drawn / np.float32(255)) - 0.5) / 0.25, -1, 0)
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    return pixels, tokens, mask


@partial(jax.jit, static_argnames=("config", "optimiser"), donate_argnames=("params", "state"))
def _step(config: ModelConfig, optimiser: optax.GradientTransformation, params, state, pixels, tokens, mask):
    assert config.vision is not None
    vision_config = config.vision

    def loss_of(params):
        features: Any = VisionTower(vision_config).apply({"params": params["vision"]}, pixels)
        logits = ApplyDecoder(config)(params["base"], None, tokens, mask, None, features[:, None])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        counted = mask[:, 1:] * (tokens[:, 1:] != vision_config.image_token)
        return jnp.sum(losses * counted) / jnp.sum(counted)

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, state = optimiser.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def load_or_train(directory: Path, *, width: int, num_layers: int, num_steps: int, seed: int) -> Model:
    """The base in a directory; trained first where there is none.

    Args:
        directory: of the model; written whole or not at all.
        width: numbers per token and per patch.
        num_layers: of the text model.
        num_steps: optimiser steps of 48 pictures.
        seed: of parameters and pictures.
    """
    if (directory / "config.json").exists():
        return load_model(directory)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, width, num_layers)
    assert config.vision is not None
    params = {
        "base": init_base(config, jax.random.key(seed)),
        "vision": init_vision(config.vision, jax.random.key(seed + 1)),
    }
    warm = min(50, num_steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warm, num_steps, 1e-4)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    state, rng = optimiser.init(params), np.random.default_rng(seed)
    for step in range(1, num_steps + 1):
        params, state, loss = _step(config, optimiser, params, state, *_batch(tokenizer, rng, 48, 48))
        if step % 100 == 0 or step == num_steps:
            logger.info("base, step %d of %d: %.3f nats per token", step, num_steps, float(loss))
    save_model(directory, Model(config=config, base=params["base"], tokenizer=tokenizer, vision=params["vision"]))
    return load_model(directory)
