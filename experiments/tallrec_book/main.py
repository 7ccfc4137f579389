"""Removal of rows and correction of flipped labels on TALLRec's book data, compared with retraining.

    python -m experiments.tallrec_book.main small --base DIR --data DIR --workdir DIR
    python -m experiments.tallrec_book.main full --base LLAMA_2_7B --data DIR --workdir DIR

The code is that of `experiments.tallrec_movie`; only the files differ, and that nobody's rows can be told apart.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from experiments import study
from experiments.tallrec_movie import prepare
from experiments.tallrec_movie.full import FullTallrecConfig, run
from experiments.tallrec_movie.main import Split, TallrecConfig, main
from llmeraser_jax.data import Example, load_examples

FILES = {"train": "valid.json", "test": "test.json"}
NUM_ROWS = 2427  # of either file


@dataclasses.dataclass(frozen=True, kw_only=True)
class BookConfig(TallrecConfig):
    """The experiment on BookCrossing, for two cores; what is not named here is as in `TallrecConfig`.

    TALLRec released no training rows for its books (that file has numbers only) and no users: `valid.json` is
    trained on, `test.json` held out, and every row is a user of its own, so that removals are by row.

    Rows are several times as long as the films', so that there are fewer, half the epochs and no path.

    Attributes:
        max_length: tokens; about half of the prompts are longer than 512 tokens of a small vocabulary. A longer
            prompt loses its beginning, the question at its end stays.
    """

    methods: tuple[str, ...] = tuple(name for name in study.METHODS if name != "llmeraser-path")
    num_rows: int = 80
    rows_per_user: int = 1
    num_test: int = 200
    num_kl: int = 100
    max_length: int = 1024
    epochs: int = 12

    def load(self, split: Split) -> tuple[tuple[Example, ...], tuple[str, ...]]:
        """The rows of a split, each with its own number in the place of a user."""
        examples = load_examples(self.data / FILES[split])
        return examples, tuple(example.id for example in examples)

    def load_outside(self) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """Both of test.json, since the validation rows are trained on: no row is in both."""
        test, _ = self.load("test")
        drawn = prepare.draw(test, self.num_test + self.num_shown, self.seed)
        shown = set(prepare.draw(drawn, self.num_shown, self.seed + 1))
        return tuple(row for row in drawn if row not in shown), tuple(row for row in drawn if row in shown)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullBookConfig(FullTallrecConfig, BookConfig):
    """The published setting: Llama-2-7B, all rows, on one large GPU or a TPU slice."""

    num_rows: int = NUM_ROWS
    num_test: int = NUM_ROWS - 100
    rows_per_user: int = 1


Preset = (
    Annotated[BookConfig, tyro.conf.subcommand("small")] | Annotated[FullBookConfig, tyro.conf.subcommand("full")]
)


def run_preset(config: TallrecConfig) -> None:
    """Runs the scenarios of either preset."""
    run(config) if isinstance(config, FullTallrecConfig) else main(config)


if __name__ == "__main__":
    run_preset(tyro.cli(Preset))
