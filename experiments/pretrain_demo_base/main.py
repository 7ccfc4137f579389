"""Pretrains the base model that the demo ships, on generated text about people who are in no demo directory.

    python -m experiments.pretrain_demo_base.main --out DIR

writes a Hugging Face directory with its model card. The questions are encoded exactly as fine-tuning encodes
them, so the base knows the format and the plausible answers and has only facts to learn.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax import files
from llmeraser_jax.data import Example, Recipe, encode_examples
from llmeraser_jax.demo import Document, TextSource
from llmeraser_jax.models import ApplyDecoder, Model, ModelConfig, init_base, save_model
from llmeraser_jax.types import BaseParams

logger = logging.getLogger("pretrain_demo_base")

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
RECIPE = Recipe(template="qa", add_bos=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What is trained and for how long; the defaults made the base that the demo ships.

    Attributes:
        out: directory to create; the checkpoint is written there.
        seed: of the text, its order and the initial parameters.
        num_acquaintances: people the text keeps returning to.
        num_steps: optimiser steps.
        batch_size: documents per step.
        learning_rate: of AdamW, after the warm-up.
        warmup_steps: linear rise.
        decay_share: last share of the steps, over which the learning rate falls linearly to zero.
        weight_decay: decoupled; this is ordinary pretraining, which nothing is erased from.
        vocab_size: of the byte-level BPE.
        width: numbers per token.
        mlp_width: numbers per token inside the feed-forward block.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        num_heldout: documents behind the reported losses.
        num_tokenizer_documents: documents behind the merges.
        log_every_steps: steps between two measurements.
    """

    out: Path
    seed: int = 0
    num_acquaintances: int = 128
    num_steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.3
    weight_decay: float = 0.01
    vocab_size: int = 1024
    width: int = 96
    mlp_width: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    num_heldout: int = 2000
    num_tokenizer_documents: int = 20000
    log_every_steps: int = 250

    def __post_init__(self):
        if self.width % self.num_heads:
            msg = f"width is {self.width}; it must be a multiple of num_heads = {self.num_heads}."
            raise ValueError(msg)
        if not 0 < self.decay_share <= 1 or not 0 < self.warmup_steps < self.num_steps * (1 - self.decay_share):
            msg = (
                f"warmup_steps = {self.warmup_steps} and decay_share = {self.decay_share} leave no step between "
                f"them of num_steps = {self.num_steps}; take more steps."
            )
            raise ValueError(msg)


def make_tokenizer(documents: Sequence[Document], vocab_size: int) -> Any:
    """A byte-level BPE with BOS, EOS and padding, as a transformers tokenizer; it adds no token by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (f"Question: {d.question}\nAnswer: {d.text}" if d.question else d.text for d in documents)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """Documents as right-padded rows."""

    tokens: Int[np.ndarray, "batch time"]
    mask: Bool[np.ndarray, "batch time"]
    is_answer: Bool[np.ndarray, "batch time"]  # the answer's tokens and the EOS after it; nothing of a statement


def encode(documents: Sequence[Document], tokenizer: Any, time_tokens: int | None = None) -> EncodedText:
    """Encodes documents: questions as fine-tuning does, statements as `[BOS] text [EOS]`.

    Args:
        documents: at least one.
        tokenizer: from `make_tokenizer`.
        time_tokens: length of the rows; None is that of the longest document.

    Raises:
        ValueError: a document is longer than `time_tokens`.
    """
    asked = [i for i, document in enumerate(documents) if document.question]
    examples = [
        Example(id=str(i), instruction=documents[i].question, response=documents[i].text, format="question")
        for i in asked
    ]
    rows: dict[int, tuple[np.ndarray, int]] = {}
    for i, row in zip(asked, encode_examples(examples, RECIPE, tokenizer).encoded, strict=True):
        rows[i] = (row.tokens, row.response_start)
    stated = [i for i in range(len(documents)) if i not in rows]
    if stated:
        ids = tokenizer([documents[i].text for i in stated], add_special_tokens=False)["input_ids"]
        for i, row in zip(stated, ids, strict=True):
            tokens = np.array([tokenizer.bos_token_id, *row, tokenizer.eos_token_id], np.int32)
            rows[i] = (tokens, len(tokens))
    longest = max(len(tokens) for tokens, _ in rows.values())
    time_tokens = longest if time_tokens is None else time_tokens
    if longest > time_tokens:
        msg = f"A document has {longest} tokens, but rows have {time_tokens}; make rows longer."
        raise ValueError(msg)
    shape = (len(documents), time_tokens)
    out = EncodedText(
        np.full(shape, tokenizer.pad_token_id, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    )
    for i, (tokens, answer_start) in rows.items():
        out.tokens[i, : len(tokens)] = tokens
        out.mask[i, : len(tokens)] = True
        out.is_answer[i, answer_start : len(tokens)] = True
    return out


def token_losses(
    apply: ApplyDecoder, base: BaseParams, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> Float[Array, "batch time_minus_1"]:
    """Cross entropy of each token but the first, in nats; 0 at padding."""
    log_probs = jax.nn.log_softmax(apply(base, None, tokens, mask)[:, :-1], axis=-1)
    picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return -picked * mask[:, 1:]


@partial(jax.jit, static_argnames=("apply", "optimiser"), donate_argnames=("base", "state"))
def train_step(apply: ApplyDecoder, optimiser: optax.GradientTransformation, base, state, tokens, mask):
    """One step on the mean loss per token."""

    def mean_loss(base):
        return jnp.sum(token_losses(apply, base, tokens, mask)) / jnp.sum(mask[:, 1:])

    loss, gradient = jax.value_and_grad(mean_loss)(base)
    updates, state = optimiser.update(gradient, state, base)
    return optax.apply_updates(base, updates), state, loss


_token_losses = jax.jit(token_losses, static_argnames="apply")


@dataclasses.dataclass(frozen=True)
class Scores:
    """Held-out losses in nats, per document; each floor is what a perfect model of the generator would have."""

    loss: float
    floor: float
    answer_loss: dict[str, float]  # by kind of question
    answer_floor: dict[str, float]


def measure(apply: ApplyDecoder, base: BaseParams, documents: Sequence[Document], text: EncodedText) -> Scores:
    """Losses on documents that were not trained on (their texts, where they are few, were)."""
    losses = np.asarray(_token_losses(apply, base, text.tokens, text.mask), np.float64)
    on_answer = (losses * text.is_answer[:, 1:]).sum(axis=1)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, document in enumerate(documents):
        if document.question:
            groups[document.kind].append(i)
    return Scores(
        loss=float(losses.sum(axis=1).mean()),
        floor=float(np.mean([document.nats for document in documents])),
        answer_loss={kind: float(on_answer[rows].mean()) for kind, rows in sorted(groups.items())},
        answer_floor={
            kind: float(np.mean([documents[i].answer_nats for i in rows])) for kind, rows in sorted(groups.items())
        },
    )


def _seeds(config: PretrainConfig) -> list[np.random.SeedSequence]:
    """Independent seeds: acquaintances, held-out documents, the tokenizer's documents, training documents."""
    return np.random.SeedSequence(config.seed).spawn(4)


def make_source(config: PretrainConfig) -> TextSource:
    """The text that the base is trained on."""
    seed = int(_seeds(config)[0].generate_state(1)[0])
    return TextSource(num_acquaintances=config.num_acquaintances, seed=seed)


def pretrain(config: PretrainConfig) -> tuple[Model, Scores, float]:
    """Trains a base from scratch.

    Returns:
        The model, its held-out scores, and the seconds that tokenizer, training and measuring took.
    """
    started = time.perf_counter()
    _, heldout_seed, tokenizer_seed, training_seed = _seeds(config)
    source = make_source(config)

    def draw(rng, count):
        return [source.draw(rng) for _ in range(count)]

    tokenizer = make_tokenizer(
        draw(np.random.default_rng(tokenizer_seed), config.num_tokenizer_documents), config.vocab_size
    )
    heldout = draw(np.random.default_rng(heldout_seed), config.num_heldout)
    heldout_text = encode(heldout, tokenizer)
    row_tokens = heldout_text.tokens.shape[1] + 2  # a rare tokenisation may be longer than the held-out ones
    model_config = ModelConfig(
        vocab_size=len(tokenizer),
        width=config.width,
        mlp_width=config.mlp_width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.width // config.num_heads,
        norm_eps=1e-5,
        tied_embeddings=True,
        max_position=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    apply = ApplyDecoder(model_config)
    base = init_base(model_config, jax.random.key(config.seed))
    num_decay_steps = round(config.decay_share * config.num_steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.linear_schedule(config.learning_rate, 0.0, num_decay_steps),
        ],
        [config.num_steps - num_decay_steps],
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay)
    )
    state = optimiser.init(base)
    rng = np.random.default_rng(training_seed)
    scores = measure(apply, base, heldout, heldout_text)
    for step in range(1, config.num_steps + 1):
        batch = encode(draw(rng, config.batch_size), tokenizer, row_tokens)
        base, state, _ = train_step(apply, optimiser, base, state, batch.tokens, batch.mask)
        if step % config.log_every_steps == 0 or step == config.num_steps:
            scores = measure(apply, base, heldout, heldout_text)
            logger.info(
                "step %d, %.0f s: %.3f nats per document (floor %.3f); answers: %s",
                step,
                time.perf_counter() - started,
                scores.loss,
                scores.floor,
                ", ".join(f"{k} {v:.3f} ({scores.answer_floor[k]:.3f})" for k, v in scores.answer_loss.items()),
            )
    model = Model(config=model_config, base=base, tokenizer=tokenizer)
    return model, scores, time.perf_counter() - started


def model_card(config: PretrainConfig, model: Model, scores: Scores, seconds: float) -> str:
    """The checkpoint's README.md."""
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(model.base))
    answers = "\n".join(
        f"| answer to a question about {what} | {scores.answer_loss[kind]:.3f} | {scores.answer_floor[kind]:.3f} |"
        for kind, what in (
            ("general", "a general fact"),
            ("acquaintance", "an acquaintance"),
            ("stranger", "a stranger"),
        )
    )
    return f"""---
license: apache-2.0
language: en
---

# Base model of the demo

A Llama-style decoder with {num_parameters:,} parameters ({config.num_layers} layers, width {config.width}, \
{config.num_heads} query and {config.num_kv_heads} key/value heads, tied embeddings) and a byte-level BPE of \
{len(model.tokenizer)} tokens. It exists to be fine-tuned by `llmeraser demo` within seconds and has no other use.

**Data.** {config.num_steps * config.batch_size:,} documents of about a dozen tokens that \
`llmeraser_jax.demo.TextSource` generates: questions with answers on the template `qa` (75 % about people, 15 % \
about general facts: a city's country, a profession's tool) and statements about people (10 %). \
{config.num_acquaintances} people, the acquaintances, return throughout with fixed facts; others are strangers \
with facts drawn anew each time. No name of a demo directory ever occurs. People, cities and facts are invented.

**Command.** `python -m experiments.pretrain_demo_base.main --out DIR` ({config.num_steps} steps of \
{config.batch_size} documents, AdamW, learning rate {config.learning_rate:g}, seed {config.seed}; \
{seconds:.0f} s on {jax.default_backend().upper()}).

**Loss** on {config.num_heldout} documents drawn apart, in nats, beside the generator's entropy, the least possible:

| | loss | floor |
|---|---|---|
| whole document | {scores.loss:.3f} | {scores.floor:.3f} |
{answers}

A stranger's answer is one of 32, so guessing costs ln 32 = {math.log(32):.3f}.

**Licence.** Apache-2.0, as the program.
"""


def main(config: PretrainConfig) -> None:
    """Trains, then writes the checkpoint and its card."""
    files.require_empty(config.out)  # before the minutes of training, not after them
    model, scores, seconds = pretrain(config)
    save_model(config.out, model)
    (config.out / "README.md").write_text(model_card(config, model, scores, seconds), encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(PretrainConfig))
