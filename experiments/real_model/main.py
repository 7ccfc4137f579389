"""Which way should a real instruction-tuned model forget? Every way on one adapter, four requests, and retraining.

    python -m experiments.real_model.main --model DIR --data FILE --workdir DIR

A cell is one kind of request: a comparison by itself (`experiments.study`), of which every model's record is a file
with the seconds that it took. A second call goes on where the first one stopped. A workdir holds

    trained/                     run directory, shared by all cells
    retrained/<kind>/seed_*/     run directories, shared by all methods of a cell
    <kind>/                      the cell: records, report, and answers.md
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro

from experiments import study
from experiments.common import draw
from experiments.tofu.main import read_rows
from llmeraser_jax import files
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.data import Example, Recipe, Request, TokenDataset, parse_requests
from llmeraser_jax.evaluation import tofu
from llmeraser_jax.evaluation.records import Comparison, MetricMeaning, Record, read_comparison
from llmeraser_jax.evaluation.render import Heading, Page, Table, render_markdown, render_text
from llmeraser_jax.evaluation.scoring import answer
from llmeraser_jax.models import Model
from llmeraser_jax.unlearning import Auto

Kind = Literal["author", "scattered", "correction", "query"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BUDGETED = "auto-budgeted"
METHODS = (
    "auto", BUDGETED, "k-fade", "msa", "npo", "simnpo", "gradient-difference", "finetune-edited", "sisa",
)  # fmt: skip
NUM_SHOWN_AUTHORS = 2  # calibration rows
ROWS_PER_AUTHOR = 20  # in the file
_ROUGE = "ROUGE-L of {} answers"
_ASKED = "ROUGE-L recall of greedy answers to some questions"
METRICS = {
    _ROUGE.format("named"): MetricMeaning(
        meaning=f"{_ASKED} that the request names, against the answers trained on.", better="retrained"
    ),
    _ROUGE.format("retained"): MetricMeaning(meaning=f"{_ASKED} that stay.", better="higher"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealModelConfig(study.TaskConfig):
    """What is trained, asked and compared.

    Attributes:
        base: the model, a directory in Hugging Face layout.
        data: JSON lines of TOFU's form, 20 rows an author: `question`, `answer`, and `perturbed_answer`, a list
            whose first entry is what a correction wants.
        kinds: requests, a cell each.
        methods: ways to forget; `auto` keeps to a retraining's cost, as by default, `auto-budgeted` to `budget`.
        oracle: see `study.Scenario`.
        budget: of `auto-budgeted`, as a share of a retraining.
        learning_rates: offered to descents.
        template: question and answer in lines, or the tokenizer's chat template.
        num_authors: trained on.
        rows_each: rows of each author, the first.
        num_scattered, num_corrected, num_replaced: rows that the other three requests name.
        num_answers: questions of each group that are answered in words.
    """

    base: Annotated[Path, tyro.conf.arg(aliases=["--model"])] = tyro.MISSING
    kinds: tuple[Kind, ...] = KINDS
    methods: tuple[str, ...] = METHODS
    method_seeds: int = 1
    oracle: bool = True
    budget: float = 0.5
    learning_rates: tuple[float, ...] = study.LEARNING_RATES
    template: Literal["qa", "chat"] = "qa"
    num_authors: int = 10
    rows_each: int = ROWS_PER_AUTHOR
    num_scattered: int = 4
    num_corrected: int = 10
    num_replaced: int = 5
    num_answers: int = 5
    max_length: int = 512
    epochs: int = 12
    batch_size: int = 4
    learning_rate: float = 1e-3

    def __post_init__(self):
        study.check_methods(self.methods, (*study.KNOWN, BUDGETED))
        counts = ("num_scattered", "num_corrected", "num_replaced", "num_answers", "rows_each")
        check_at_least(self, num_authors=2, retrain_seeds=1, method_seeds=1, **dict.fromkeys(counts, 1))

    @property
    def recipe(self) -> Recipe:
        """Nothing is cut."""
        return Recipe(template=self.template, max_length=self.max_length, truncation_side="error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Who is trained on, who shows where removed rows should end, who is behind held-out KL, and who is neither."""

    train: tuple[Example, ...]
    shown: tuple[Example, ...]
    heldout: tuple[Example, ...]
    strangers: tuple[Example, ...]
    wrong: Mapping[str, str]  # id -> what a correction wants


def choose_rows(config: RealModelConfig) -> Rows:
    """The same for equal settings; nobody is in two groups.

    Raises:
        ValueError: the file has too few authors, or no wrong answers.
    """
    rows = read_rows(config.data)
    authors = [range(k, k + config.rows_each) for k in range(0, len(rows), ROWS_PER_AUTHOR)]
    ends = np.cumsum([config.num_authors, NUM_SHOWN_AUTHORS, 1, 1])
    if len(authors) < ends[-1] or config.rows_each > ROWS_PER_AUTHOR or "perturbed_answer" not in rows[0]:
        msg = (
            f"{config.data} has {len(authors)} authors of {ROWS_PER_AUTHOR} rows, of whom {ends[-1]} are wanted "
            f"with {config.rows_each} rows each and with wrong answers (perturbed_answer)."
        )
        raise ValueError(msg)
    groups = [
        tuple(
            Example(id=str(k), instruction=rows[k]["question"], response=rows[k]["answer"], format="question")
            for author in authors[start:end]
            for k in author
        )
        for start, end in zip((0, *ends[:-1]), ends, strict=True)
    ]
    wrong = {example.id: rows[int(example.id)]["perturbed_answer"][0] for example in groups[0]}
    return Rows(train=groups[0], shown=groups[1], heldout=groups[2], strangers=groups[3], wrong=wrong)


def make_requests(config: RealModelConfig, rows: Rows, kind: Kind) -> tuple[Request, ...]:
    """All rows of the last author, or some rows of any: removed, with another answer, or with another question."""
    counts = {"scattered": config.num_scattered, "correction": config.num_corrected, "query": config.num_replaced}
    named = rows.train[-config.rows_each :] if kind == "author" else draw(rows.train, counts[kind], config.seed)
    lines: list[Mapping[str, Any]] = []
    for k, example in enumerate(named):
        if kind == "correction":
            lines.append({"id": example.id, "action": "correct_response", "response": rows.wrong[example.id]})
        elif kind == "query":
            stranger = rows.strangers[k % len(rows.strangers)]
            lines.append({"id": example.id, "action": "modify_query", "query": stranger.instruction})
        else:
            lines.append({"id": example.id, "action": "remove"})
    return parse_requests(lines, rows.train)


def make_task(encode: study.Encode, groups: Mapping[str, Sequence[Example]]) -> Any:
    """Greedy answers to some questions of each group, and their ROUGE-L recall."""
    encoded: dict[str, TokenDataset] = {name: encode(examples) for name, examples in groups.items()}

    def measure(model: Model, params: Any) -> dict[str, Any]:
        metrics, told = {}, {}
        for name, examples in groups.items():
            answers = answer(model, params, encoded[name])
            recalls = [tofu.rouge_l_recall(a, e.response) for a, e in zip(answers, examples, strict=True)]
            metrics[_ROUGE.format(name)] = {"value": float(np.mean(recalls)), "standard_error": None}
            told[name] = [
                {"question": e.instruction, "trained on": e.response, "answer": a}
                for a, e in zip(answers, examples, strict=True)
            ]
        return {"metrics": metrics, "answers": told}

    return measure


def make_scenario(config: RealModelConfig, model: Model, rows: Rows, kind: Kind) -> study.Scenario:
    """One cell; the trained model is that of all cells."""
    requests = make_requests(config, rows, kind)
    names = {request.id for request in requests}
    stay = [example for example in rows.train if example.id not in names]
    groups = {
        "named": [example for example in rows.train if example.id in names][: config.num_answers],
        "retained": draw(stay, min(config.num_answers, len(stay)), config.seed),
    }
    return config.scenario(
        name=kind,
        model=model,
        recipe=config.recipe,
        examples=rows.train,
        requests=requests,
        shown=rows.shown,
        heldout=rows.heldout,
        make_task=lambda _, encode: make_task(encode, groups),
        learning_rates=config.learning_rates,
        oracle=config.oracle,
        methods={
            name: study.Budgeted(method=Auto(), budget=budget)
            for name, budget in (("auto", 1.0), (BUDGETED, config.budget))
        },
        probed=False,
        question="Which way should a real model forget, as if it had been retrained?",
        metrics=METRICS,
        settings={name: getattr(config, name) for name in ("budget", "num_answers", "oracle")},
        before=config.workdir / "trained",
        retrained=config.workdir / "retrained" / kind,
    )


def models_of(found: Comparison) -> dict[str, Record]:
    """The first record of every model, by name: before, the methods, retrained."""
    records = [record for kind in ("before", "unlearned", "retrained") for record in found.of(kind)]
    first: dict[str, Record] = {}
    for record in records:
        if record.scores:
            first.setdefault(record.model, record)
    return first


def seconds_table(found: Comparison) -> Table:
    """What making a model took, and the cell with its measures."""
    rows = []
    for record in (*found.of("before"), *found.of("unlearned"), *found.of("retrained")):
        spent = (record.cost or {}).get("seconds")
        told = ("" if seconds is None else f"{seconds:.0f}" for seconds in (spent, record.details["cell_seconds"]))
        name = record.model if record.seed is None else f"{record.model}, seed {record.seed}"
        rows.append((name, *told, record.failed))
    return Table(("model", "seconds", "with its measures", "failed"), tuple(rows))


def answers_table(found: Comparison) -> Table:
    """What was asked and trained on, and what every model answers."""
    told = {name: record.scores["task"]["answers"] for name, record in models_of(found).items()}
    rows = []
    for part, lines in told["before"].items():
        for k, line in enumerate(lines):
            given = (answers[part][k]["answer"] for answers in told.values())
            rows.append((part, line["question"], line["trained on"], *given))
    return Table(("rows", "question", "trained on", *told), tuple(rows))


def main(config: RealModelConfig) -> None:
    """Runs the cells and prints their tables."""
    rows, model = choose_rows(config), config.load_base()
    for kind in config.kinds:
        workdir = config.workdir / kind
        study.show(make_scenario(config, model, rows, kind), workdir, config)
        found = read_comparison(workdir)
        page = Page(f"Answers, {kind}", (answers_table(found),))
        files.atomic_write_text(workdir / "answers.md", render_markdown(page))
        sys.stdout.write(render_text([Heading("Seconds"), seconds_table(found)]))


if __name__ == "__main__":
    main(tyro.cli(RealModelConfig))
