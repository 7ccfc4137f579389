"""TALLRec's book data: removing rows and correcting flipped labels, by every way to forget.

    python -m experiments.tallrec_book.main small|full --base DIR --data DIR --workdir DIR

The code is that of `experiments.tallrec_movie`; only the files differ, and that nobody's rows can be told apart.
"""

from __future__ import annotations

import dataclasses

from experiments import study
from experiments.common import command_line, draw
from experiments.tallrec_movie.main import ScenarioName, Split, TallrecConfig, main
from llmeraser_jax.data import Example, load_examples

FILES = {"train": "valid.json", "test": "test.json"}
NUM_ROWS = 2427  # of either file


@dataclasses.dataclass(frozen=True, kw_only=True)
class BookConfig(TallrecConfig):
    """The experiment on BookCrossing; what is not named here is as in `TallrecConfig`.

    TALLRec released no training rows for its books (that file has numbers only) and no users: `valid.json` is
    trained on, `test.json` held out, and every row is a user of its own, so that removals are by row. Rows are
    several times as long as the films', so that there are fewer, half the epochs and no path.
    """

    scenarios: tuple[ScenarioName, ...] = ("removal", "correction")
    methods: tuple[str, ...] = tuple(name for name in study.METHODS if name != "path")
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
        drawn = draw(self.load("test")[0], self.num_test + self.num_shown, self.seed)
        shown = set(draw(drawn, self.num_shown, self.seed + 1))
        return tuple(row for row in drawn if row not in shown), tuple(row for row in drawn if row in shown)


PRESETS = {
    "small": BookConfig(),
    "full": BookConfig(**{**study.FULL_SIZE, "num_rows": NUM_ROWS, "num_test": NUM_ROWS - 100}),
}

if __name__ == "__main__":
    main(command_line(PRESETS))
