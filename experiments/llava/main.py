"""Correcting wrong answers of a vision-language model, against retraining and by rivals.

    python -m experiments.llava.main small --workdir DIR
    python -m experiments.llava.main full --base LLAVA --data DIR --workdir DIR

`small` draws its pictures and trains its base; `full` takes LLaVA-1.5-7B and the benchmarks' files. A second call
goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import study
from experiments.common import command_line, log_progress
from experiments.llava import drawing
from experiments.llava.base import load_or_train
from experiments.llava.benchmarks import Row, load_rbench, load_spubench
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.data import Action, Example, Recipe, Request, load_examples
from llmeraser_jax.data.pictures import decode_rgb
from llmeraser_jax.evaluation.records import BEFORE, RETRAINED, MetricMeaning, read_record, record_path
from llmeraser_jax.evaluation.render import Table, render_text
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.models import Model
from llmeraser_jax.training import TrainConfig

METHODS = ("auto", "paper-step", "finetune-edited", "gradient-difference")
FILES: Mapping[str, Callable[[Path], list[Row]]] = {"spubench": load_spubench, "rbench": load_rbench}
KINDS = ("spurious", "relations")
_SUFFIXES = (".json", ".jsonl", ".parquet")
DEMO_PICTURE = "demo.png"
METRICS = {
    "average accuracy": MetricMeaning(
        meaning="mean of the accuracies below; of the answers offered the most probable one counts.",
        better="higher",
    ),
    "accuracy, spurious": MetricMeaning(
        meaning="multiple choice, on held-out pictures whose colour is another shape's usual one.", better="higher"
    ),
    "accuracy, relations": MetricMeaning(
        meaning="yes/no questions on held-out pictures of two shapes.", better="higher"
    ),
    "F1": MetricMeaning(meaning="of the answer yes, on the yes/no questions.", better="higher"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig(study.TaskConfig):
    """The experiment. `data` holds spubench and rbench as .json, .jsonl or .parquet, one or both; `small` has none.

    Attributes:
        num_rows: rows trained on, of each kind of question.
        num_split: so many of them, the first, are the split with wrong answers.
        corrupted: share of the split whose answers are wrong.
        tied: share of class pictures in the shape's usual colour.
        num_shown: calibration rows of each kind.
        num_tests: held-out rows of each kind.
        width: numbers per token of the small base.
        num_layers: of its text model.
        base_steps: of its training.
    """

    base: Path = Path()
    data: Path = Path()
    methods: tuple[str, ...] = METHODS
    num_rows: int = 60
    num_split: int = 30
    corrupted: float = 0.4
    tied: float = 0.9
    num_shown: int = 12
    num_tests: int = 60
    width: int = 64
    num_layers: int = 2
    base_steps: int = 1500
    epochs: int = 16
    batch_size: int = 8

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, num_split=3, num_shown=1, num_tests=1, base_steps=2, width=8, num_layers=1)
        if self.num_split > self.num_rows or not 0 < self.corrupted <= 1 or not 0 <= self.tied <= 1:
            msg = (
                f"num_split = {self.num_split} of {self.num_rows} rows, corrupted = {self.corrupted}, tied = "
                f"{self.tied}; the split is among the rows, and the others are shares."
            )
            raise ValueError(msg)

    @property
    def train(self) -> TrainConfig:
        """One pass per batch: the small model's rows are short."""
        return super().train if self.full else dataclasses.replace(super().train, microbatch_size=self.batch_size)

    @property
    def recipe(self) -> Recipe:
        """LLaVA's chat template; or question and answer in lines, the answer one token."""
        if self.full:
            return Recipe(template="chat", max_length=self.max_length, truncation_side="error")
        return Recipe(template="qa", add_bos=True, add_eos=False, max_length=64, truncation_side="error")

    def load_base(self) -> Model:
        """LLaVA, or the small base in the workdir, which is trained where it is not there."""
        if self.full:
            return super().load_base()
        return load_or_train(
            self.workdir / "base", width=self.width, num_layers=self.num_layers, num_steps=self.base_steps,
            seed=self.seed,
        )  # fmt: skip


PRESETS = {
    "small": LlavaConfig(method_seeds=1),
    "full": LlavaConfig(
        **{**study.FULL_SIZE, "num_rows": 400, "num_split": 400, "num_shown": 50, "num_tests": 200}
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Rows by what they are for; nothing is in two of them."""

    train: list[Row]
    split: list[Row]  # the beginning of each kind's part of `train`
    shown: list[Row]
    tests: list[Row]


def make_parts(config: LlavaConfig) -> Parts:
    """The rows, the same for every call.

    Raises:
        FileNotFoundError: `data` has none of the benchmarks.
        ValueError: a benchmark has too few rows.
    """
    kinds = _benchmarks(config) if config.full else [_drawn(config, kind) for kind in KINDS]
    a, b = config.num_rows, config.num_rows + config.num_shown
    return Parts(
        train=[row for rows in kinds for row in rows[:a]],
        split=[row for rows in kinds for row in rows[: config.num_split]],
        shown=[row for rows in kinds for row in rows[a:b]],
        tests=[row for rows in kinds for row in rows[b : b + config.num_tests]],
    )


def _drawn(config: LlavaConfig, kind: str) -> list[Row]:
    rng = np.random.default_rng([config.seed, KINDS.index(kind)])
    count = config.num_rows + config.num_shown
    rows = []
    for k in range(count + config.num_tests):
        tied = config.tied if k < count else 0.0  # tests break the tie
        asked = drawing.class_question(rng, tied) if kind == "spurious" else drawing.relation_question(rng)
        picture = drawing.as_png(drawing.draw(asked.shapes, rng))
        texts = {"id": f"{kind}-{k}", "question": f"<image> {asked.text}", "answer": asked.answer}
        (example,) = load_examples([{**texts, "image": picture}])
        rows.append(Row(example=example, choices=asked.choices, group=kind, wrong=asked.by_colour))
    return rows


def _benchmarks(config: LlavaConfig) -> list[list[Row]]:
    paths = [(name, config.data / f"{name}{suffix}") for name in FILES for suffix in _SUFFIXES]
    found = {name: path for name, path in paths if path.exists()}
    if not found:
        msg = f"{config.data} has neither of {', '.join(FILES)} with a suffix {', '.join(_SUFFIXES)}."
        raise FileNotFoundError(msg)
    kinds, needed = [], config.num_rows + config.num_shown + config.num_tests
    for name, path in found.items():
        rows = FILES[name](path)
        if len(rows) < needed:
            msg = f"{path} has {len(rows)} rows; num_rows, num_shown and num_tests together need {needed}."
            raise ValueError(msg)
        order = np.random.default_rng(config.seed).permutation(len(rows))[:needed]
        named = [(rows[k], dataclasses.replace(rows[k].example, id=f"{name}-{rows[k].example.id}")) for k in order]
        kinds.append([dataclasses.replace(row, example=example) for row, example in named])
    return kinds


def corrupt(split: Sequence[Row], share: float, seed: int) -> dict[str, str]:
    """Id -> wrong answer, of a share of the rows: the row's own wrong one, else one drawn from the others."""
    rng = np.random.default_rng([seed, 2])
    chosen = sorted(rng.choice(len(split), round(share * len(split)), replace=False).tolist())
    wrong = {}
    for row in (split[k] for k in chosen):
        others = [choice for choice in row.choices if choice != row.example.response]
        wrong[row.example.id] = row.wrong or others[int(rng.integers(len(others)))]
    return wrong


def choose(model: Model, params: Any, encode: study.Encode, rows: Sequence[Row]) -> list[str]:
    """Of each row's choices the one that the model finds most probable."""
    asked = [
        dataclasses.replace(row.example, id=f"{row.example.id}/{choice}", response=choice)
        for row in rows
        for choice in row.choices
    ]
    scores, place, chosen = score_examples(model, params, encode(asked)).log_probs, 0, []
    for row in rows:
        chosen.append(row.choices[int(np.argmax(scores[place : place + len(row.choices)]))])
        place += len(row.choices)
    return chosen


def make_task(encode: study.Encode, tests: Sequence[Row], demo: Sequence[Row]) -> Any:
    """Accuracies and F1 on held-out questions, and what is answered to the corrected rows."""

    def measure(model: Model, params: Any) -> Mapping[str, Any]:
        chosen = choose(model, params, encode, tests)
        right = np.array([answer == row.example.response for answer, row in zip(chosen, tests, strict=True)])
        groups = np.array([row.group for row in tests])
        values = {f"accuracy, {group}": right[groups == group] for group in dict.fromkeys(groups)}
        metrics: dict[str, Any] = {"average accuracy": np.mean([v.mean() for v in values.values()])}
        metrics |= {name: v.mean() for name, v in values.items()}
        pairs = [
            (answer.lower() == "yes", row.example.response.lower() == "yes")
            for answer, row in zip(chosen, tests, strict=True)
            if row.group == "relations"
        ]
        if pairs:
            said, true = np.array(pairs).T
            metrics["F1"] = 2 * np.sum(said & true) / max(np.sum(said) + np.sum(true), 1)
        errors = {name: float(np.sqrt(v.mean() * (1 - v.mean()) / len(v))) for name, v in values.items()}
        return {
            "metrics": {n: {"value": float(v), "standard_error": errors.get(n)} for n, v in metrics.items()},
            "asked": choose(model, params, encode, demo),
        }

    return measure


def make_scenario(config: LlavaConfig, model: Model, parts: Parts) -> study.Scenario:
    """Rows with their wrong answers, and the request to correct them."""
    wrong = corrupt(parts.split, config.corrupted, config.seed)
    right = {row.example.id: row.example for row in parts.train}

    def trained(example: Example) -> Example:
        return dataclasses.replace(example, response=wrong.get(example.id, example.response))

    fields = ("num_rows", "num_split", "corrupted", "tied", "num_shown", "num_tests", "width", "num_layers")
    return config.scenario(
        name="corrected",
        model=model,
        recipe=config.recipe,
        examples=tuple(trained(row.example) for row in parts.train),
        requests=tuple(
            Request(id=id_, action=Action.CORRECT_RESPONSE, changes={"response": right[id_].response})
            for id_ in wrong
        ),
        shown=tuple(row.example for row in parts.shown),
        heldout=tuple(row.example for row in parts.tests),
        make_task=lambda _, encode: make_task(encode, parts.tests, corrected(parts, wrong)),
        num_task_seeds=1,
        probed=False,
        question=f"Of {len(parts.split)} questions about pictures {len(wrong)} were answered wrongly in training. "
        "Does correcting them give the model that training on right answers would have given?",
        metrics=METRICS,
        settings={**{name: getattr(config, name) for name in fields}, "base_steps": config.base_steps},
    )


def corrected(parts: Parts, wrong: Mapping[str, str]) -> list[Row]:
    """The rows whose answers were wrong."""
    return [row for row in parts.split if row.example.id in wrong]


def show_demo(config: LlavaConfig, parts: Parts, workdir: Path) -> None:
    """Prints corrected rows with the answers before, after and retrained; draws one that was answered wrongly."""
    wrong = corrupt(parts.split, config.corrupted, config.seed)
    rows, method = corrected(parts, wrong), config.methods[0]
    seeds = {BEFORE: None, method: 0, RETRAINED: config.seed + 1}
    said = {
        name: read_record(record_path(workdir, name, seed)).scores["task"]["asked"] for name, seed in seeds.items()
    }
    cells = [
        (row.example.query.replace("<image>", "").strip()[:60], wrong[row.example.id], row.example.response,
         *(answers[k] for answers in said.values()))
        for k, row in enumerate(rows)
    ]  # fmt: skip
    header = ("question", "trained on", "wanted", *said)
    sys.stdout.write(f"\n{render_text([Table(header, tuple(cells))])}")
    for name, answers in said.items():
        share = np.mean([answer == row.example.response for answer, row in zip(answers, rows, strict=True)])
        sys.stdout.write(f"{name}: {share:.2f} of the corrected rows are answered as wanted\n")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = next((k for k, row in enumerate(rows) if said[BEFORE][k] != row.example.response), 0)
    figure, (left, other) = pyplot.subplots(1, 2, figsize=(5.2, 1.7), width_ratios=(1, 2.4))
    left.imshow(decode_rgb(rows[shown].example.images[0]))
    lines = [f"{name}: {value}" for name, value in zip(header[1:], cells[shown][1:], strict=True)]
    other.text(0, 0.5, "\n".join([cells[shown][0], *lines]), va="center", fontsize=8)
    for axes in (left, other):
        axes.axis("off")
    figure.savefig(workdir / DEMO_PICTURE, dpi=90, bbox_inches="tight")
    sys.stdout.write(f"One of them: {workdir / DEMO_PICTURE}\n")


def main(config: LlavaConfig) -> None:
    """Runs the scenario, prints its tables and the corrected rows."""
    log_progress("study", "llava")
    model, parts, workdir = config.load_base(), make_parts(config), config.workdir / "corrected"
    study.show(make_scenario(config, model, parts), workdir, config)
    show_demo(config, parts, workdir)


if __name__ == "__main__":
    main(command_line(PRESETS))
