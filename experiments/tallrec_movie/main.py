"""TALLRec's movie data: removing users, replacing films, correcting flipped labels, by every way to forget.

    python -m experiments.tallrec_movie.main small|full --base DIR --data DIR --workdir DIR

fine-tunes, retrains, forgets by each method and measures; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from experiments import study
from experiments.common import command_line, draw, require_shares
from experiments.tallrec_movie import prepare
from llmeraser_jax.data import Example, Recipe
from llmeraser_jax.evaluation.job import held_out_task
from llmeraser_jax.models import Model

ScenarioName = Literal["removal", "query", "correction"]
Split = Literal["train", "valid", "test"]
_TASK = "A model says whether a user would like an item, from what the user liked before. "
QUESTIONS: Mapping[ScenarioName, str] = {
    "removal": f"{_TASK}Can it forget all rows of some users, as if they had never been trained on?",
    "query": f"{_TASK}Some histories had a wrong item. Can it learn the rows with the right one?",
    "correction": f"{_TASK}Some labels that it was trained on were wrong. Can it learn the right ones?",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TallrecConfig(study.TaskConfig):
    """The experiment. `data` holds TALLRec's train, valid and test, `.json` and `.csv`.

    Attributes:
        scenarios: which to run.
        num_rows: training rows.
        rows_per_user: of each user at most.
        num_test: rows of test.json that the task is measured on.
        num_kl: so many of these are behind the held-out KL, and non-members of membership inference.
        num_shown: calibration rows, of valid.json.
        removed_share: of the rows, all those of one set of users.
        edited_share: of the rows: another film in the history, or trained on with the wrong label.
    """

    scenarios: tuple[ScenarioName, ...] = ("removal", "query", "correction")
    num_rows: int = 120
    rows_per_user: int = 3
    num_test: int = 1000
    num_kl: int = 200
    num_shown: int = 100
    removed_share: float = 0.05
    edited_share: float = 0.1
    max_length: int = 160

    def __post_init__(self):
        super().__post_init__()
        require_shares(self, "removed_share", "edited_share")

    def load(self, split: Split) -> tuple[tuple[Example, ...], tuple[str, ...]]:
        """The rows of a split, and the user of each: what is removed together."""
        return prepare.load_rows(self.data, split)

    def load_outside(self) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """Rows that are not trained on: those that the task is measured on, and calibration rows."""
        test, valid = self.load("test")[0], self.load("valid")[0]
        return draw(test, self.num_test, self.seed), draw(valid, self.num_shown, self.seed)

    @property
    def recipe(self) -> Recipe:
        """TALLRec's own prompt, Alpaca's, with EOS; or lines without EOS, which the small base cannot learn.

        A longer prompt loses its beginning; the question at its end stays.
        """
        if self.full:
            return Recipe(template="alpaca", truncate="prompt", max_length=self.max_length)
        return Recipe(template="plain", add_bos=True, add_eos=False, max_length=self.max_length, truncate="prompt")


PRESETS = {
    "small": TallrecConfig(),
    "full": TallrecConfig(**{**study.FULL_SIZE, "num_rows": 8000, "rows_per_user": 8000}),
}


def make_scenario(config: TallrecConfig, name: ScenarioName, model: Model) -> study.Scenario:
    """Rows and requests of one scenario, the same for every call."""
    all_rows, all_users = config.load("train")
    chosen = prepare.choose_rows(all_users, config.num_rows, config.rows_per_user, config.seed)
    examples, users = tuple(all_rows[row] for row in chosen), [all_users[row] for row in chosen]
    share = config.removed_share if name == "removal" else config.edited_share
    count = round(share * len(examples))
    if name == "removal":
        gone = prepare.choose_users(users, count, config.seed)
        requests = prepare.removal_requests(examples, users, gone)
    elif name == "query":
        requests = prepare.replace_films(examples, count, config.seed)
    else:
        examples, requests = prepare.flip_labels(examples, count, config.seed)
    test, shown = config.load_outside()
    draws = ("num_rows", "rows_per_user", "num_test", "num_kl", "num_shown", "seed")
    return config.scenario(
        name=name,
        model=model,
        recipe=config.recipe,
        examples=examples,
        requests=requests,
        shown=shown,
        heldout=draw(test, min(config.num_kl, len(test)), config.seed),
        make_task=lambda model, encode: held_out_task(model, encode(test)),
        users={example.id: user for example, user in zip(examples, users, strict=True)},
        question=QUESTIONS[name],
        settings={**{field: getattr(config, field) for field in draws}, "share": share},
    )


def main(config: TallrecConfig) -> None:
    """Runs the scenarios and prints their tables."""
    model = config.load_base()
    for name in config.scenarios:
        study.show(make_scenario(config, name, model), config.workdir / name, config)


if __name__ == "__main__":
    main(command_line(PRESETS))
