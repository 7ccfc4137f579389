"""LLaRA's task, the next item from 20 candidates: training, erasing, retraining and HitRatio@1, in one command.

    python -m experiments.llara.main small|full --base DIR --data DIR --workdir DIR [--hybrid]

Every piece is a file: a second call computes what is missing and prints the tables anew.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import study
from experiments.common import claim_settings, command_line, spread
from experiments.llara import hybrid, sasrec
from experiments.llara.data import Corpus, load_corpus
from experiments.llara.prepare import (
    SCENARIOS,
    Draws,
    Prepared,
    Question,
    Scenario,
    prepare,
    split_by_user,
    write_prepared,
)
from experiments.llara.scoring import (
    HIT_RATIO_GENERATED,
    HIT_RATIO_OF_VALID,
    HIT_RATIO_SCORED,
    Scorer,
    match_answers,
)
from llmeraser_jax import files
from llmeraser_jax.data import Recipe
from llmeraser_jax.evaluation.measures import metrics_as_json
from llmeraser_jax.evaluation.records import MetricMeaning
from llmeraser_jax.evaluation.scoring import answer
from llmeraser_jax.models import Model
from llmeraser_jax.rivals import RecEraser

QUESTIONS: Mapping[Scenario, str] = {
    "removal": "Can it forget all examples of some users, as if they had never been trained on?",
    "query-removal": "Can it forget single items of the histories that it was shown, which stay as examples?",
    "query-replacement": "Some items of the histories that it was shown were wrong. Can it learn the true ones?",
    "correction": "Some of the answers that it was trained on were wrong. Can it learn the right ones?",
}
HIT_RATIOS = {
    HIT_RATIO_SCORED: "share of questions whose right title is the most probable one of the candidates.",
    HIT_RATIO_GENERATED: "share of questions whose greedy answer names the right title and no other candidate.",
    HIT_RATIO_OF_VALID: "the same among answers that name exactly one candidate.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlaraConfig(study.TaskConfig, Draws):
    """The experiment; `data` is described by `data.load_corpus`.

    Attributes:
        item_embeddings: `.npz` for hybrid prompts; None trains a SASRec on the training users.
        scenarios: which to run.
        num_generated: questions of each set that text prompts are also answered by generation for; 0 is none.
        num_kl: held-out rows behind the held-out KL.
        sasrec_epochs: of the recommender.
    """

    # More than half of the rows are named by a modification, each with a path of its own: several retrainings.
    methods: tuple[str, ...] = tuple(name for name in study.METHODS if name != "path")
    item_embeddings: Path | None = None
    scenarios: tuple[Scenario, ...] = SCENARIOS
    num_generated: int = 100
    num_kl: int = 100
    epochs: int = 16
    sasrec_epochs: int = 5

    def __post_init__(self):
        super().__post_init__()
        Draws.__post_init__(self)
        if self.item_embeddings is not None and not self.hybrid:
            msg = "item_embeddings are read by hybrid prompts only; add --hybrid."
            raise ValueError(msg)

    @property
    def kind(self) -> str:
        """Of the prompts."""
        return "hybrid" if self.hybrid else "text"

    @property
    def recipe(self) -> Recipe:
        """The prompt as it is, and the title after a space; the line break at its end is the end of the answer.

        A longer row is an error, since a list of candidates must not be cut.
        """
        return Recipe(template="{instruction}", response_prefix=" ", add_bos=True, add_eos=False,
                      max_length=self.max_length, truncation_side="error")  # fmt: skip


PRESETS = {
    "small": LlaraConfig(),
    "full": LlaraConfig(
        **{**study.FULL_SIZE, "num_rows": None, "rows_per_user": 1000, "template": None, "num_generated": 1000},
        num_kl=1000,
        sasrec_epochs=20,
    ),
}


def embeddings_of(config: LlaraConfig, corpus: Corpus) -> np.ndarray:
    """The table that hybrid prompts read: the given one, or that of a SASRec which never saw held-out users.

    It is trained once for the workdir.
    """
    path = config.item_embeddings or config.workdir / "sasrec" / "trained" / "item_embeddings.npz"
    if config.item_embeddings is None:
        drawn = {k: getattr(config, k) for k in ("seed", "num_heldout", "heldout_rows_per_user")}
        settings = {**drawn, "data": str(config.data), "epochs": config.sasrec_epochs}
        claim_settings(config.workdir / "sasrec", settings)
        if not path.exists():
            network = sasrec.SasrecConfig(num_items=corpus.num_items, epochs=config.sasrec_epochs, seed=config.seed)
            gone = {row.user for row in split_by_user(corpus.train, config)[1]}
            sequences = [(*row.history, row.target) for row in corpus.train if row.user not in gone]
            started = time.perf_counter()
            params, losses = sasrec.train_sasrec(sequences, network)
            ranked = sasrec.rank_next(params, network, [row.history for row in corpus.test])
            targets = np.array([row.target for row in corpus.test])
            above = (ranked > ranked[np.arange(len(targets)), targets][:, None]).sum(1)
            told = {
                "config": dataclasses.asdict(network),
                "losses": losses,
                "test_hit_ratio_at_10_of_all_items": float((above < 10).mean()),
                "seconds": time.perf_counter() - started,
            }
            with files.atomic_directory(path.parent) as directory:
                np.savez(directory / path.name, item_embeddings=np.asarray(params["items"]["embedding"]))
                files.atomic_write_json(directory / "sasrec.json", told)
    return hybrid.load_item_embeddings(path, corpus.num_items)


def make_task(
    config: LlaraConfig, model: Model, encode: study.Encode, questions: Mapping[str, Sequence[Question]]
) -> Any:
    """HitRatio@1 of scored candidates on all questions, and of generated titles on some, of a model."""
    like = encode([questions["test"][0].example])
    scorers = {
        name: Scorer(model, rows, like, batch_size=8 if config.full else 4) for name, rows in questions.items()
    }
    asked = {} if config.hybrid else {name: spread(rows, config.num_generated) for name, rows in questions.items()}

    def measure(model: Model, params: Any) -> Mapping[str, Any]:
        metrics = []
        for split, scorer in scorers.items():
            found = [scorer.scored_metric(params)]
            if some := asked.get(split):
                said = answer(model, params, encode([question.example for question in some]))
                found += match_answers(said, some)
            metrics += [dataclasses.replace(metric, name=f"{split}: {metric.name}") for metric in found]
        return {"metrics": metrics_as_json(metrics)}

    return measure


def make_scenario(
    config: LlaraConfig, name: Scenario, model: Model, corpus: Corpus
) -> tuple[study.Scenario, Prepared]:
    """Rows, requests and questions of one scenario, the same for every call.

    Calibration rows are the released validation rows; the held-out rows and the test rows only measure.
    """
    prepared = prepare(corpus, name, config)
    questions = {split: prepared.questions[split] for split in ("held-out", "test")}
    # RecEraser divides rows of hybrid prompts by their items' embeddings: the base cannot read item tokens.
    methods = {}
    if isinstance(model, hybrid.HybridModel):
        methods["receraser"] = RecEraser(embed=hybrid.MeanItemEmbedding(model.first_item, config.num_candidates))
    scenario = config.scenario(
        name=f"{name}, {config.kind} prompts",
        model=model,
        recipe=config.recipe,
        examples=prepared.train,
        requests=prepared.requests,
        shown=tuple(question.example for question in prepared.questions["validation"]),
        heldout=tuple(question.example for question in spread(questions["held-out"], config.num_kl)),
        make_task=lambda model, encode: make_task(config, model, encode, questions),
        num_task_seeds=1,
        question=f"A model names the next item of a user's history, from {config.num_candidates} candidates. "
        f"{QUESTIONS[name]}",
        metrics={
            f"{split}: {ratio}": MetricMeaning(meaning=meaning, better="higher")
            for split in questions
            for ratio, meaning in HIT_RATIOS.items()
        },
        users={example.id: user for example, user in zip(prepared.train, prepared.users, strict=True)},
        methods=methods,
        settings={
            "draws": {field.name: getattr(config, field.name) for field in dataclasses.fields(Draws)},
            "base": str(config.base),
            "num_generated": config.num_generated,
            "num_kl": config.num_kl,
        },
    )
    return scenario, prepared


def load_base(config: LlaraConfig, corpus: Corpus) -> Model:
    """The base, and for hybrid prompts its items."""
    model = config.load_base()
    return hybrid.make_hybrid(model, embeddings_of(config, corpus)) if config.hybrid else model


def main(config: LlaraConfig) -> None:
    """Runs the scenarios and prints their tables."""
    corpus = load_corpus(config.data)
    model = load_base(config, corpus)
    for name in config.scenarios:
        directory = config.workdir / config.kind / name
        scenario, prepared = make_scenario(config, name, model, corpus)
        write_prepared(directory / "prepared", prepared)
        counts = ", ".join(f"{count} {what}" for what, count in prepared.counts.items())
        sys.stdout.write(f"\n{name} ({config.kind}): {counts}\n")
        study.show(scenario, directory, config)


if __name__ == "__main__":
    main(command_line(PRESETS))
