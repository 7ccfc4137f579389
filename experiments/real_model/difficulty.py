"""How well a model before training tells which rows are hard for the adapter that was not trained on them.

    python -m experiments.real_model.difficulty --run DIR --data FILE

prints, for rows of TOFU's file that the run was not trained on, the share of the variance of their losses that a
line on their losses under the base explains, each row predicted from the others.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro

from experiments.real_model.main import ROWS_PER_AUTHOR
from experiments.tofu.main import read_rows
from llmeraser_jax.data import Example
from llmeraser_jax.evaluation.render import Table, render_text, show_number
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.runs import load_run
from llmeraser_jax.unlearning.targets import regress_on_difficulty


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifficultyConfig:
    """What is measured.

    Attributes:
        run: a training of `experiments.real_model`.
        data: the file that it was trained on.
        num_rows: of authors that it knows, and of others, at most.
    """

    run: Path
    data: Path
    num_rows: int = 80


def main(config: DifficultyConfig) -> None:
    """Prints a line for rows of the same authors and one for those of others."""
    run = load_run(config.run)
    model, rows = run.load_or_verify_model(None), read_rows(config.data)
    trained = {int(example.id) for example in run.load_examples()}
    authors = {row // ROWS_PER_AUTHOR for row in trained}
    unseen = [row for row in range(len(rows)) if row not in trained]
    groups = {
        "of authors trained on": [row for row in unseen if row // ROWS_PER_AUTHOR in authors],
        "of other authors": [row for row in unseen if row // ROWS_PER_AUTHOR not in authors],
    }
    adapter, lines = run.load_adapter(model), []
    for name, places in groups.items():
        drawn = np.sort(np.random.default_rng(0).permutation(places)[: config.num_rows]).tolist()
        examples = [
            Example(id=str(k), instruction=rows[k]["question"], response=rows[k]["answer"], format="question")
            for k in drawn
        ]
        data = run.encode(examples, model.tokenizer)
        base, tuned = (score_examples(model, params, data).losses for params in (None, adapter))
        _, explained, _ = regress_on_difficulty(base, tuned, base)
        lines.append((name, str(len(drawn)), *map(show_number, (base.mean(), tuned.mean(), explained))))
    header = ("rows not trained on", "number", "loss under the base", "under the adapter", "variance explained")
    sys.stdout.write(render_text([Table(header, tuple(lines))]))


if __name__ == "__main__":
    main(tyro.cli(DifficultyConfig))
