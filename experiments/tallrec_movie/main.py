"""Removal by user and correction of flipped labels on TALLRec's movie data, by every way to forget.

    python -m experiments.tallrec_movie.main --base DIR --data DIR --workdir DIR

fine-tunes, retrains, forgets by each method and measures; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import tyro

from experiments import study
from experiments.tallrec_movie import prepare
from llmeraser_jax.data import Example, Recipe
from llmeraser_jax.evaluation.job import held_out_task
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, load_model
from llmeraser_jax.parallel import parse_mesh
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.unlearning import EraseConfig

ScenarioName = Literal["removal", "correction"]
Split = Literal["train", "valid", "test"]
QUESTIONS: Mapping[ScenarioName, str] = {
    "removal": "A model says whether a user would like an item, from what the user liked before. Can it forget all "
    "examples of some users, as if they had never been trained on?",
    "correction": "A model says whether a user would like an item, from what the user liked before. Some of the "
    "labels that it was trained on were wrong: can it learn the right ones in their place?",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TallrecConfig(study.StudyOptions):
    """The experiment, besides which methods are compared; the defaults are what the README reports.

    Attributes:
        base: base model, a directory in Hugging Face layout.
        data: directory with TALLRec's files: train, valid and test, `.json` and `.csv`; of its books valid.json and
            test.json.
        workdir: everything is kept there.
        scenarios: which to run.
        num_rows: training rows.
        rows_per_user: of each user at most.
        num_test: rows of test.json that the task is measured on.
        num_kl: so many of these are behind the held-out KL, and non-members of membership inference.
        num_shown: rows that erasing by matching is shown: of valid.json, with books of test.json.
        removed_share: of the rows, all those of one set of users.
        flipped_share: of the rows, trained on with the wrong label.
        seed: of the rows, the users, the labels flipped and training.
        max_length: tokens; longer prompts lose their beginning, the question at their end stays.
        rank: of the adapter, on all projections.
        epochs: of training.
        learning_rate: of training.
        l2: lambda.
    """

    base: Path
    data: Path
    workdir: Path
    scenarios: tuple[ScenarioName, ...] = ("removal", "correction")
    num_rows: int = 120
    rows_per_user: int = 3
    num_test: int = 1000
    num_kl: int = 200
    num_shown: int = 100
    removed_share: float = 0.05
    flipped_share: float = 0.1
    seed: int = 0
    max_length: int = 160
    rank: int = 8
    epochs: int = 24
    learning_rate: float = 4e-3
    l2: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        for name in ("removed_share", "flipped_share"):
            if not 0 < getattr(self, name) < 1:
                msg = f"{name} is {getattr(self, name)}; it must lie between 0 and 1."
                raise ValueError(msg)

    def load(self, split: Split) -> tuple[tuple[Example, ...], tuple[str, ...]]:
        """The rows of a split, and the user of each: what is removed together."""
        return prepare.load_rows(self.data, split)

    def load_outside(self) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """Rows that are not trained on: those the task is measured on, and those that methods are shown."""
        test, valid = self.load("test")[0], self.load("valid")[0]
        return prepare.draw(test, self.num_test, self.seed), prepare.draw(valid, self.num_shown, self.seed)

    @property
    def recipe(self) -> Recipe:
        """Instruction, history and question in lines, and the answer, without EOS.

        stories260K was never trained to end: it gives EOS 1e-11, which an adapter cannot raise above 1e-2, and
        that one token would be all of the loss.
        """
        return Recipe(template="plain", add_bos=True, add_eos=False, max_length=self.max_length, truncate="prompt")

    @property
    def lora(self) -> LoraConfig:
        """The adapter."""
        return LoraConfig(rank=self.rank, alpha=2.0 * self.rank, target_modules="all-linear")

    @property
    def train(self) -> TrainConfig:
        """Small micro-batches, since float32 on a CPU is bound by memory."""
        return TrainConfig(
            epochs=self.epochs,
            batch_size=8,
            microbatch_size=2,
            learning_rate=self.learning_rate,
            warmup_ratio=0.1,
            l2=self.l2,
            seed=self.seed,
            checkpoint_every_steps=100,
        )

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """What rivals that descend are offered."""
        return study.LEARNING_RATES

    @property
    def erase(self) -> EraseConfig:
        """What the package's own ways share: its defaults, in the training's micro-batches."""
        return EraseConfig(l2=self.l2, chunk_size=2, diagnostic_sample=16)


def make_scenario(config: TallrecConfig, name: ScenarioName, model: Model) -> study.Scenario:
    """Rows and requests of one scenario, the same for every call."""
    all_rows, all_users = config.load("train")
    chosen = prepare.choose_rows(all_users, config.num_rows, config.rows_per_user, config.seed)
    examples = tuple(all_rows[row] for row in chosen)
    users = [all_users[row] for row in chosen]
    if name == "removal":
        gone = prepare.choose_users(users, round(config.removed_share * len(examples)), config.seed)
        requests = prepare.removal_requests(examples, users, gone)
    else:
        examples, requests = prepare.flip_labels(examples, round(config.flipped_share * len(examples)), config.seed)
    test, shown = config.load_outside()
    draws = ("num_rows", "rows_per_user", "num_test", "num_kl", "num_shown", "seed")
    return study.Scenario(
        name=name,
        model=model,
        recipe=config.recipe,
        lora=config.lora,
        train=config.train,
        erase=config.erase,
        learning_rates=config.learning_rates,
        examples=examples,
        requests=requests,
        shown=shown,
        heldout=prepare.draw(test, min(config.num_kl, len(test)), config.seed),
        make_task=lambda model, encode: held_out_task(model, encode(test)),
        users={example.id: user for example, user in zip(examples, users, strict=True)},
        question=QUESTIONS[name],
        settings={
            **{field: getattr(config, field) for field in draws},
            "share": config.removed_share if name == "removal" else config.flipped_share,
        },
    )


def main(config: TallrecConfig, *, dtype: str = "float32", mesh: str = "") -> None:
    """Runs the scenarios and prints their tables.

    Args:
        config: the experiment.
        dtype: storage of the base.
        mesh: devices, e.g. data=4,model=2; empty is one device.
    """
    study.set_up_logging()
    model = load_model(config.base, dtype=dtype, mesh=parse_mesh(mesh))
    for name in config.scenarios:
        study.show(make_scenario(config, name, model), config.workdir / name, config)


if __name__ == "__main__":
    main(tyro.cli(TallrecConfig))
