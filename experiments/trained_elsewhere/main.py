"""What AdamW's decay and LoRA dropout do to influence: predicted and retrained changes of losses, on a small model.

    python -m experiments.trained_elsewhere.main

A random decoder learns 32 rows whose responses are partly noise, in full batches, so that retraining has no order
of its own. Rows are removed one at a time. Influence is the published single step, without a trust region; it knows
neither decay nor dropout.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from llmeraser_jax import losses, trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.data import BucketShape, EncodedExample, Recipe, TokenDataset
from llmeraser_jax.evaluation.render import Table, render_text
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, ModelConfig, init_base
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.types import ExampleStack, LoraParams

VOCAB, PROMPTS = 24, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Main:
    """What is run.

    Attributes:
        rows: training rows.
        removed: how many of them are removed, one at a time.
        steps: of every training.
        damping: rho of the influence step.
    """

    rows: int = 32
    removed: int = 3
    steps: int = 150
    damping: float = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One way to train: `l2` is in the loss and in influence, `assumed` in influence alone."""

    words: str
    l2: float = 0.0
    weight_decay: float = 0.0
    dropout: float = 0.0
    assumed: float = 0.0


TRAININGS = (
    Training(words="l2 = 0.01 in the loss", l2=0.01),
    Training(words="weight decay 0.1", weight_decay=0.1),
    Training(words="weight decay 0.1, taken for l2 = 0.1", weight_decay=0.1, assumed=0.1),
    Training(words="dropout 0.1", dropout=0.1),
)


def make_rows(count: int) -> list[EncodedExample]:
    """Prompts of two tokens, and a response that the first of them decides in three rows of four."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(count):
        prompt = k % PROMPTS
        response = PROMPTS + (prompt if rng.random() < 0.75 else int(rng.integers(PROMPTS)))
        tokens = np.array([prompt, 2 * PROMPTS + int(rng.integers(PROMPTS)), response], np.int32)
        rows.append(EncodedExample(str(k), tokens, 2, np.array([False, False, True])))
    return rows


def dataset_of(rows: list[EncodedExample]) -> TokenDataset:
    """The rows in one shape."""
    recipe = Recipe(template="plain", response_prefix="", add_bos=False)
    return TokenDataset(rows, recipe, buckets=[BucketShape(time=3, response=1)])


@jax.jit
def influence(
    objective: losses.Objective, lora: LoraParams, whole: ExampleStack, row: ExampleStack, damping: float
):
    """`(C + rho I)^-1` times the gradient of `row`, which has the weight of one example in the mean."""
    operator = Damped(DatasetCurvature(objective, lora, whole, CURVATURES["gauss-newton"]), damping)
    rhs = losses.gradient_sum(objective, lora, row)
    return ConjugateGradients(max_steps=300, rtol=1e-5).solve(operator, rhs).value


def changes(config: Main, training: Training, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Changes of all rows' losses [removed, rows], predicted and retrained."""
    rows = make_rows(config.rows)
    train = TrainConfig(
        epochs=config.steps,
        batch_size=config.rows,
        learning_rate=0.02,
        l2=training.l2,
        weight_decay=training.weight_decay,
    )
    shape = LoraConfig(
        rank=2, alpha=4.0, target_modules=("q_proj", "v_proj", "down_proj"), dropout=training.dropout
    )
    initial = model.init_lora(jax.random.key(0), shape)
    dataset = dataset_of(rows)
    everything = np.arange(config.rows)

    def stack(indices: np.ndarray) -> ExampleStack:
        weights = np.isin(everything, indices) / config.rows
        return dataset.stack(everything, weights, chunk_size=config.rows)

    objective = losses.lm_objective(model.apply, model.base, l2=training.l2 + training.assumed)
    trained = finetune(model, dataset, train, lora=initial).lora

    def losses_of(lora: LoraParams) -> np.ndarray:
        return np.asarray(losses.example_losses(objective, lora, stack(everything)))

    before = losses_of(trained)
    predicted, retrained = [], []
    for k in range(config.removed):
        delta = influence(objective, trained, stack(everything), stack(np.array([k])), jnp.asarray(config.damping))
        predicted.append(losses_of(trees.tree_add(trained, delta)) - before)
        kept = [row for row in rows if row.id != str(k)]
        again = finetune(model, dataset_of(kept), train, lora=initial).lora
        retrained.append(losses_of(again) - before)
    return np.stack(predicted), np.stack(retrained)


def main(config: Main) -> None:
    """Runs it and prints the table."""
    sizes: dict[str, Any] = {
        "width": 16,
        "mlp_width": 24,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    shape = ModelConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes)
    model = Model(config=shape, base=init_base(shape, jax.random.key(1)))
    table = []
    for training in TRAININGS:
        predicted, retrained = changes(config, training, model)
        own = np.arange(config.removed)
        correlation = np.corrcoef(predicted.ravel(), retrained.ravel())[0, 1]
        numbers = (predicted[own, own].mean(), retrained[own, own].mean(), correlation)
        table.append((training.words, *(f"{number:.3f}" for number in numbers)))
    head = ("trained with", "removed row, predicted", "removed row, retrained", "correlation, all rows")
    sys.stdout.write(render_text([Table(head, tuple(table))]))


if __name__ == "__main__":
    main(tyro.cli(Main))
