"""LLaRA's task, the next item from 20 candidates: training, erasing, retraining and HitRatio@1, in one command.

    python -m experiments.llara.main --base DIR --data DIR --workdir DIR [--preset full] [--prompts hybrid]

Every piece is a file: a second call computes what is missing and prints the tables anew.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from llmeraser_jax.baselines import Baseline, RecEraser

from experiments import full_size, study
from experiments.llara import hybrid, sasrec
from experiments.llara.data import Corpus, load_corpus
from experiments.llara.prepare import (
    SCENARIOS,
    PrepareConfig,
    Prepared,
    Scenario,
    prepare,
    split_by_user,
    write_prepared,
)
from experiments.llara.scoring import (
    HIT_RATIO_GENERATED,
    HIT_RATIO_OF_VALID,
    HIT_RATIO_SCORED,
    Question,
    Scorer,
)
from experiments.workdirs import claim_settings
from llmeraser_jax import files
from llmeraser_jax.data import Recipe
from llmeraser_jax.evaluation.measures import metrics_as_json
from llmeraser_jax.evaluation.records import MetricMeaning
from llmeraser_jax.evaluation.tasks import Metric
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, load_model
from llmeraser_jax.parallel import parse_mesh
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import EraseConfig

# More than half of the rows are named by a modification, each with a path of its own: several retrainings.
METHODS = tuple(name for name in study.METHODS if name != "llmeraser-path")
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
class Preset:
    """Sizes that go together.

    Attributes:
        dtype: storage of the base.
        prepare: which rows.
        lora: the adapter.
        train: its training.
        erase: what all methods share.
        learning_rates: what rivals that descend are offered.
        max_length: tokens; a longer prompt is an error, since a list of candidates must not be cut.
        num_generated: questions of each set that are also answered by generation.
        num_kl: held-out rows behind the held-out KL.
        batch_size: prompts read together when candidates are scored.
        sasrec_epochs: of the recommender, where its embeddings are not given.
    """

    dtype: str
    prepare: PrepareConfig
    lora: LoraConfig
    train: TrainConfig
    erase: EraseConfig
    learning_rates: tuple[float, ...]
    max_length: int
    num_generated: int
    num_kl: int
    batch_size: int
    sasrec_epochs: int


SMALL_TRAIN = TrainConfig(
    epochs=16,
    batch_size=8,
    microbatch_size=2,
    learning_rate=4e-3,
    warmup_ratio=0.1,
    l2=1e-3,
    checkpoint_every_steps=50,
)
PRESETS: Mapping[str, Preset] = {
    "small": Preset(
        dtype="float32",
        prepare=PrepareConfig(num_rows=160, rows_per_user=4, template=0),
        lora=LoraConfig(rank=8, alpha=16.0, target_modules="all-linear"),
        train=SMALL_TRAIN,
        erase=EraseConfig(l2=SMALL_TRAIN.l2, chunk_size=2),
        learning_rates=study.LEARNING_RATES,
        max_length=1024,
        num_generated=100,
        num_kl=100,
        batch_size=4,
        sasrec_epochs=5,
    ),
    "full": Preset(
        dtype=full_size.DTYPE,
        prepare=PrepareConfig(),
        lora=full_size.LORA,
        train=full_size.TRAIN,
        erase=full_size.ERASE,
        learning_rates=full_size.LEARNING_RATES,
        max_length=1024,
        num_generated=1000,
        num_kl=1000,
        batch_size=8,
        sasrec_epochs=20,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlaraConfig(study.StudyOptions):
    """The experiment, besides which methods are compared. What is None is the preset's.

    Attributes:
        base: base model, a directory in Hugging Face layout.
        data: the sequences, see `data.load_corpus`.
        workdir: everything is kept there.
        preset: "small" for two cores, "full" for Llama-2-7B on one large GPU or a TPU slice.
        prompts: "text", or "hybrid": every title is followed by a projected item embedding.
        item_embeddings: `.npz` for hybrid prompts; None trains a SASRec on the training users.
        scenarios: which to run.
        num_rows: training rows.
        rows_per_user: of each user at most.
        num_heldout: rows held out by user.
        num_candidates: titles to choose from.
        max_history: items of a history shown.
        template: which of the three sentences.
        max_length: tokens of a sequence at most.
        epochs: of training.
        learning_rate: of training.
        microbatch_size: examples in one pass, in training and erasing.
        num_generated: questions of each set that are also answered by generation; 0 is none.
        num_kl: held-out rows behind the held-out KL.
        seed: of rows, candidates, requests, training and erasing.
        mesh: devices, e.g. data=4,model=2; empty is one device.
    """

    base: Path
    data: Path
    workdir: Path
    preset: Literal["small", "full"] = "small"
    prompts: Literal["text", "hybrid"] = "text"
    item_embeddings: Path | None = None
    scenarios: tuple[Scenario, ...] = SCENARIOS
    methods: tuple[str, ...] = METHODS
    num_rows: int | None = None
    rows_per_user: int | None = None
    num_heldout: int | None = None
    num_candidates: int | None = None
    max_history: int | None = None
    template: int | None = None
    max_length: int | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    microbatch_size: int | None = None
    num_generated: int | None = None
    num_kl: int | None = None
    seed: int = 0
    mesh: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.item_embeddings is not None and self.prompts != "hybrid":
            msg = "item_embeddings are read by hybrid prompts only; add --prompts hybrid."
            raise ValueError(msg)

    def resolve(self) -> Preset:
        """The preset with what is given here in its place."""
        preset = PRESETS[self.preset]

        def given(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

        prepare_fields = given(
            "num_rows", "rows_per_user", "num_heldout", "num_candidates", "max_history", "template"
        )
        train_fields = given("epochs", "learning_rate", "microbatch_size")
        erase_fields = {} if self.microbatch_size is None else {"chunk_size": self.microbatch_size}
        return dataclasses.replace(
            preset,
            prepare=dataclasses.replace(
                preset.prepare, **prepare_fields, hybrid=self.prompts == "hybrid", seed=self.seed
            ),
            train=dataclasses.replace(preset.train, **train_fields, seed=self.seed),
            erase=dataclasses.replace(preset.erase, **erase_fields, seed=self.seed),
            **given("max_length", "num_generated", "num_kl"),
        )


def recipe_of(preset: Preset) -> Recipe:
    """The prompt as it is, and the title after a space; the line break at its end is the end of the answer."""
    return Recipe(
        template="{instruction}",
        response_prefix=" ",
        add_bos=True,
        add_eos=False,
        max_length=preset.max_length,
        truncation_side="error",
    )


def embeddings_of(config: LlaraConfig, preset: Preset, corpus: Corpus) -> np.ndarray:
    """The table that hybrid prompts read: the given one, or that of a SASRec which never saw held-out users.

    It is trained once for the workdir.
    """
    path = config.item_embeddings
    if path is None:
        path = config.workdir / "sasrec" / "item_embeddings.npz"
        drawn = {k: getattr(preset.prepare, k) for k in ("seed", "num_heldout", "heldout_rows_per_user")}
        claim_settings(path.parent, {**drawn, "data": str(config.data), "epochs": preset.sasrec_epochs})
        if not path.exists():
            settings = sasrec.SasrecConfig(
                num_items=corpus.num_items, epochs=preset.sasrec_epochs, seed=config.seed
            )
            _, outside = split_by_user(corpus.train, preset.prepare)
            gone = {row.user for row in outside}
            sequences = [(*row.history, row.target) for row in corpus.train if row.user not in gone]
            started = time.perf_counter()
            params, losses = sasrec.train_sasrec(sequences, settings)
            ranked = sasrec.rank_next(params, settings, [row.history for row in corpus.test])
            targets = np.array([row.target for row in corpus.test])
            above = (ranked > ranked[np.arange(len(targets)), targets][:, None]).sum(1)
            files.atomic_write_json(
                path.parent / "sasrec.json",
                {
                    "config": dataclasses.asdict(settings),
                    "losses": losses,
                    "test_hit_ratio_at_10_of_all_items": float((above < 10).mean()),
                    "seconds": time.perf_counter() - started,
                },
            )
            sasrec.save_item_embeddings(path, params)
    return hybrid.load_item_embeddings(path, corpus.num_items)


class LlaraTask:
    """HitRatio@1 of scored candidates on all questions, and of generated titles on some.

    Args:
        model: text or hybrid.
        encode: as the training saw examples.
        questions: by set.
        num_generated: questions of each set that are also answered by generation.
        batch_size: prompts read together.
    """

    def __init__(
        self,
        model: Model,
        encode: study.Encode,
        questions: Mapping[str, Sequence[Question]],
        *,
        num_generated: int,
        batch_size: int,
    ):
        def scorer(chosen: Sequence[Question]) -> Scorer:
            like = encode([question.example for question in chosen[:1]])
            return Scorer(model, chosen, like, batch_size=batch_size)

        self._scorers = {
            name: (scorer(rows), scorer(spread(rows, num_generated)) if num_generated else None)
            for name, rows in questions.items()
        }

    def __call__(self, model: Model, params: LoraParams | None) -> Mapping[str, Any]:
        metrics: list[Metric] = []
        for split, (scored, generated) in self._scorers.items():
            found = [scored.scored_metric(params)]
            if generated is not None:
                found += generated.generated_metrics(params)
            metrics += [dataclasses.replace(metric, name=f"{split}: {metric.name}") for metric in found]
        return {"metrics": metrics_as_json(metrics)}


def _told(model: Model, num_candidates: int) -> dict[str, Baseline]:
    """RecEraser divides rows of hybrid prompts by their items' embeddings: the base cannot read item tokens."""
    if not isinstance(model, hybrid.HybridModel):
        return {}
    return {"receraser": RecEraser(embed=hybrid.MeanItemEmbedding(model.first_item, num_candidates))}


def make_scenario(
    config: LlaraConfig, name: Scenario, model: Model, corpus: Corpus
) -> tuple[study.Scenario, Prepared]:
    """Rows, requests and questions of one scenario, the same for every call.

    Methods are shown the released validation rows; the held-out rows and the test rows only measure.
    """
    preset = config.resolve()
    prepared = prepare(corpus, name, preset.prepare)
    questions = {split: prepared.questions[split] for split in ("held-out", "test")}

    def make_task(model: Model, encode: study.Encode) -> LlaraTask:
        return LlaraTask(model, encode, questions, num_generated=preset.num_generated, batch_size=preset.batch_size)

    scenario = study.Scenario(
        name=f"{name}, {config.prompts} prompts",
        model=model,
        recipe=recipe_of(preset),
        lora=preset.lora,
        train=preset.train,
        erase=preset.erase,
        learning_rates=preset.learning_rates,
        examples=prepared.train,
        requests=prepared.requests,
        shown=tuple(question.example for question in prepared.questions["validation"]),
        heldout=tuple(question.example for question in spread(questions["held-out"], preset.num_kl)),
        make_task=make_task,
        num_task_seeds=1,
        question="A model names the next item of a user's history, from "
        f"{preset.prepare.num_candidates} candidates. {QUESTIONS[name]}",
        metrics={
            f"{split}: {ratio}": MetricMeaning(meaning=meaning, better="higher")
            for split in questions
            for ratio, meaning in HIT_RATIOS.items()
        },
        users={example.id: user for example, user in zip(prepared.train, prepared.users, strict=True)},
        baselines=_told(model, preset.prepare.num_candidates),
        settings={
            "prepare": dataclasses.asdict(preset.prepare),
            "base": str(config.base),
            "dtype": preset.dtype,
            "num_generated": preset.num_generated,
            "num_kl": preset.num_kl,
        },
    )
    return scenario, prepared


def spread(questions: Sequence[Question], count: int) -> tuple[Question, ...]:
    """At most `count` questions, evenly spaced: they are in the order of users."""
    places = np.linspace(0, len(questions) - 1, min(count, len(questions))).astype(int)
    return tuple(questions[k] for k in places)


def load_base(config: LlaraConfig, preset: Preset, corpus: Corpus) -> Model:
    """The base, and for hybrid prompts its items."""
    model = load_model(config.base, dtype=preset.dtype, mesh=parse_mesh(config.mesh))
    if config.prompts == "hybrid":
        return hybrid.make_hybrid(model, embeddings_of(config, preset, corpus))
    return model


def main(config: LlaraConfig) -> None:
    """Runs the scenarios and prints their tables."""
    study.set_up_logging()
    preset = config.resolve()
    corpus = load_corpus(config.data)
    model = load_base(config, preset, corpus)
    for name in config.scenarios:
        directory = config.workdir / config.prompts / name
        scenario, prepared = make_scenario(config, name, model, corpus)
        write_prepared(directory / "prepared", prepared)
        counts = ", ".join(f"{count} {what}" for what, count in prepared.counts.items())
        sys.stdout.write(f"\n{name} ({config.prompts}): {counts}\n")
        study.show(scenario, directory, config)


if __name__ == "__main__":
    main(tyro.cli(LlaraConfig))
