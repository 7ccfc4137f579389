"""LLaRA's task, the next item from 20 candidates: training, erasing, retraining and HitRatio@1, in one command.

    python -m experiments.llara.main --base DIR --data DIR --workdir DIR [--preset full] [--prompts hybrid]

Every piece is a file: a second call computes what is missing and prints the tables anew.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from experiments import full_size
from experiments.fidelity.cells import claim_settings
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
from experiments.llara.scoring import HIT_RATIO_GENERATED, HIT_RATIO_OF_VALID, HIT_RATIO_SCORED, Question, Scorer
from llmeraser_jax import files, trees
from llmeraser_jax.baselines import retrain
from llmeraser_jax.data import Recipe, TokenDataset, load_requests
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.evaluation.closure import gap_closure, seed_mean, seed_standard_deviation
from llmeraser_jax.evaluation.scoring import heldout_kl_of, score_examples
from llmeraser_jax.lora import Lora, LoraConfig
from llmeraser_jax.models import Model, load_model
from llmeraser_jax.parallel import parse_mesh
from llmeraser_jax.runs import RUN_FILE, Run, load_run
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.unlearning import EraseConfig, UnlearningError, erase_run, make_problem
from llmeraser_jax.unlearning.job import RECEIPT_FILE

logger = logging.getLogger("llara")

METHODS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "path": {"method": "path"},
    "paper-step": {"method": "step", "curvature": "hessian", "trust_region": False},
}
QUESTION_FILES = {"held-out": "held-out.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes that go together.

    Attributes:
        dtype: storage of the base.
        prepare: which rows.
        lora: the adapter.
        train: its training.
        erase: what all methods share.
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
        max_length=1024,
        num_generated=1000,
        num_kl=1000,
        batch_size=8,
        sasrec_epochs=20,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlaraConfig:
    """The experiment. What is None is the preset's.

    Attributes:
        base: base model, a directory in Hugging Face layout.
        data: the sequences, see `data.load_corpus`.
        workdir: everything is kept there.
        preset: "small" for two cores, "full" for Llama-2-7B on one large GPU or a TPU slice.
        prompts: "text", or "hybrid": every title is followed by a projected item embedding.
        item_embeddings: `.npz` for hybrid prompts; None trains a SASRec on the training users.
        scenarios: which to run.
        methods: how to erase; names in `METHODS`.
        retrain_seeds: retrainings of each scenario, at least 2.
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
    methods: tuple[str, ...] = tuple(METHODS)
    retrain_seeds: int = 3
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
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            msg = f"Unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}."
            raise ValueError(msg)
        if self.retrain_seeds < 2:
            msg = f"retrain_seeds is {self.retrain_seeds}; the held-out KL needs at least 2."
            raise ValueError(msg)
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


class Study:
    """One scenario: its data, and the models made or loaded when first needed.

    Args:
        config: the experiment.
        scenario: which.
        model: the base; hybrid where prompts are.
        corpus: the sequences.
    """

    def __init__(self, config: LlaraConfig, scenario: Scenario, model: Model, corpus: Corpus):
        self.config, self.preset, self.model = config, config.resolve(), model
        self.directory = config.workdir / config.prompts / scenario
        self.prepared: Prepared = prepare(corpus, scenario, self.preset.prepare)
        settings = {
            name: dataclasses.asdict(getattr(self.preset, name)) for name in ("prepare", "lora", "train", "erase")
        }
        base = {"base": str(config.base), "dtype": self.preset.dtype, "max_length": self.preset.max_length}
        measured = {"num_generated": self.preset.num_generated, "num_kl": self.preset.num_kl}
        claim_settings(self.directory, {**settings, **base, **measured})
        self.data = self.directory / "data"
        write_prepared(self.data, self.prepared)

    @functools.cached_property
    def before(self) -> Run:
        """The trained model."""
        return finetune_run(
            self.model,
            self.data / "train.jsonl",
            self.directory / "before",
            recipe=recipe_of(self.preset),
            lora=self.preset.lora,
            config=self.preset.train,
        )

    @functools.cached_property
    def retrained(self) -> tuple[Run, ...]:
        """Models trained on the edited data."""
        requests = load_requests(self.data / "requests.jsonl", self.before.load_examples())
        return retrain(
            self.before,
            requests,
            self.directory / "retrained",
            seeds=self.config.retrain_seeds,
            model=self.model,
        )

    def erased(self, method: str) -> Run | str:
        """The model after erasing, or why there is none. The validation rows show where removed rows should end."""
        workdir = self.directory / f"unlearned-{method}"
        if (workdir / RUN_FILE).exists():
            return load_run(workdir)
        try:
            run, _ = erase_run(
                self.before,
                self.data / "requests.jsonl",
                workdir,
                dataclasses.replace(self.preset.erase, **METHODS[method]),
                model=self.model,
                heldout_path=self.data / QUESTION_FILES["validation"],
            )
        except UnlearningError as error:
            return str(error)
        return run

    @functools.cached_property
    def _dataset(self) -> TokenDataset:
        return self.before.encode(self.before.load_examples(), self.model.tokenizer)

    @functools.cached_property
    def _problem(self):
        requests = load_requests(self.data / "requests.jsonl", self.before.load_examples())
        return make_problem(self.model, self._dataset, requests)

    @functools.cached_property
    def _scorers(self) -> dict[str, tuple[Scorer, Scorer | None]]:
        """For each set of questions: all of them, and those that are answered by generation too."""

        def scorer(questions):
            return Scorer(self.model, questions, self._dataset, batch_size=self.preset.batch_size)

        count = self.preset.num_generated
        return {
            name: (scorer(questions), scorer(spread(questions, count)) if count else None)
            for name, questions in self.prepared.questions.items()
        }

    def score(self, name: str, run: Run) -> dict[str, Any]:
        """Losses on S and the task's metrics of one model, measured once: `scores/<name>.json`."""
        path = self.directory / "scores" / f"{name}.json"
        if path.exists():
            return files.read_json(path)
        started = time.perf_counter()
        lora = run.load_adapter(self.model)
        problem = self._problem
        named = score_examples(self.model, lora, problem.examples, problem.named).losses
        wanted = score_examples(self.model, lora, problem.examples, problem.wanted).losses
        metrics: dict[str, dict[str, Any]] = {}
        for split, (scored, generated) in self._scorers.items():
            found = [scored.scored_metric(lora)]
            if generated is not None:
                found += generated.generated_metrics(lora)
            metrics[split] = {m.name: {**dataclasses.asdict(m), "valid_ratio": m.valid_ratio} for m in found}
        result = {
            "name": name,
            "forget_loss": float(named.mean()),
            "wanted_loss": float(wanted.mean()) if len(wanted) else None,
            "metrics": metrics,
            "cost": {k: run.result[k] for k in ("gradient_equivalents", "seconds")},
            "scoring_seconds": time.perf_counter() - started,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write_json(path, result)
        logger.info("%s/%s: %s", self.directory.name, name, _told(result))
        return result

    def heldout_kl(self, models: Mapping[str, Run]) -> dict[str, Any]:
        """Held-out KL of every model, and the seed floor: `scores/heldout_kl.json`."""
        path = self.directory / "scores" / "heldout_kl.json"
        found = files.read_json(path) if path.exists() else {"candidates": {}}
        if set(found["candidates"]) >= set(models):
            return found
        questions = spread(self.prepared.questions["held-out"], self.preset.num_kl)
        rows = self.before.encode([q.example for q in questions], self.model.tokenizer)
        adapters: dict[str, Lora] = {name: run.load_adapter(self.model) for name, run in models.items()}
        result = heldout_kl_of(self.model, rows, adapters, [run.load_adapter(self.model) for run in self.retrained])
        found = {
            "candidates": {name: result.heldout_kl(name) for name in models},
            "seed_floor": result.seed_floor,
            "num_rows": len(rows),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write_json(path, found)
        return found

    def run(self) -> dict[str, Any]:
        """Everything of the scenario, computed where it is missing: what `results.json` holds."""
        result = self.before.result
        logger.info("%s: trained, loss %.4f, %.0f s", self.directory.name, result["loss"], result["seconds"])
        models: dict[str, Run] = {"before": self.before}
        failed: dict[str, str] = {}
        for method in self.config.methods:
            run = self.erased(method)
            if isinstance(run, str):
                failed[method] = run
                logger.warning("%s/%s: no step: %s", self.directory.name, method, run)
            else:
                models[method] = run
        scores = {name: self.score(name, run) for name, run in models.items()}
        retrained = [self.score(f"seed_{run.train_config.seed}", run) for run in self.retrained]
        lora = self.before.load_adapter(self.model)
        moved = {
            name: float(trees.tree_norm(trees.tree_sub(run.load_adapter(self.model), lora)))
            for name, run in models.items()
            if name != "before"
        }
        return {
            "scenario": self.directory.name,
            "counts": dict(self.prepared.counts),
            "num_truncated": self._dataset.num_truncated,
            "longest_prompt": max(len(row.tokens) for row in self._dataset.encoded),
            "training_loss": result["loss"],
            "models": scores,
            "retrained": retrained,
            "heldout_kl": self.heldout_kl(models),
            "delta_norm": moved,
            "adapter_norm": float(trees.tree_norm(lora)),
            "outcomes": {
                name: files.read_json(run.path / RECEIPT_FILE)["outcome"]
                for name, run in models.items()
                if name != "before"
            },
            "failed": failed,
        }


def spread(questions: Sequence[Question], count: int) -> tuple[Question, ...]:
    """At most `count` questions, evenly spaced: they are in the order of users."""
    places = np.linspace(0, len(questions) - 1, min(count, len(questions))).astype(int)
    return tuple(questions[k] for k in places)


def _told(result: Mapping[str, Any]) -> str:
    metric = result["metrics"]["held-out"][HIT_RATIO_SCORED]
    wanted = "" if result["wanted_loss"] is None else f", wanted {result['wanted_loss']:.3f}"
    return (
        f"loss on S {result['forget_loss']:.3f}{wanted}, held-out {metric['correct']} of {metric['total']}, "
        f"{result['scoring_seconds']:.0f} s"
    )


def _share(metrics: Sequence[Mapping[str, Any]], key: str = "value") -> str:
    """`value (standard error) correct / valid / N`; of several models the mean of each."""
    values = [m[key] for m in metrics]
    if any(value is None for value in values):
        return "–"
    if key != "value":
        return f"{np.mean(values):.3f}"
    error = seed_mean([m["standard_error"] for m in metrics])
    counts = " / ".join(f"{np.mean([m[k] for m in metrics]):g}" for k in ("correct", "valid", "total"))
    return f"{np.mean(values):.3f} ({error:.3f}) {counts}"


def render_table(results: Mapping[str, Any]) -> str:
    """One Markdown row per model: before, retrained, and each method."""
    titles = (
        "model",
        "loss, as trained",
        "loss, wanted",
        "closure (trained / wanted)",
        "held-out KL",
        f"held-out: {HIT_RATIO_SCORED}",
        f"test: {HIT_RATIO_SCORED}",
        f"held-out: {HIT_RATIO_GENERATED}",
        "of valid",
        "ValidRatio",
        "gradient equivalents",
        "seconds",
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    before, retrained = results["models"]["before"], results["retrained"]
    reference = {k: seed_mean([r["cost"][k] for r in retrained]) for k in ("gradient_equivalents", "seconds")}

    def loss(scores, key):
        values = [s[key] for s in scores]
        if values[0] is None:
            return "–"
        spread = f" ± {seed_standard_deviation(values):.3f}" if len(values) > 1 else ""
        return f"{seed_mean(values):.3f}{spread}"

    def closure(score, key):
        if score[key] is None:
            return "–"
        value = gap_closure(before[key], score[key], [r[key] for r in retrained]).value
        return "–" if value is None else f"{value:.2f}"

    def row(name, scores, kl, closures="–", compare=False):
        held = [s["metrics"]["held-out"] for s in scores]
        generated = [m[HIT_RATIO_GENERATED] for m in held if HIT_RATIO_GENERATED in m]
        of_valid = [m[HIT_RATIO_OF_VALID] for m in held if HIT_RATIO_OF_VALID in m]
        spent = []
        for k in ("gradient_equivalents", "seconds"):
            value = seed_mean([s["cost"][k] for s in scores])
            spent.append(f"{value:.0f} ({value / reference[k]:.2f})" if compare else f"{value:.0f}")
        cells = (
            name,
            loss(scores, "forget_loss"),
            loss(scores, "wanted_loss"),
            closures,
            f"{kl:.3f}",
            _share([m[HIT_RATIO_SCORED] for m in held]),
            _share([s["metrics"]["test"][HIT_RATIO_SCORED] for s in scores]),
            _share(generated) if generated else "–",
            _share(of_valid) if of_valid else "–",
            _share(generated, "valid_ratio") if generated else "–",
            *spent,
        )
        lines.append("| " + " | ".join(cells) + " |")

    kls = results["heldout_kl"]
    row("before", [before], kls["candidates"]["before"])
    row(f"retrained, {len(retrained)} seeds", retrained, kls["seed_floor"])
    for name, score in results["models"].items():
        if name != "before":
            closures = f"{closure(score, 'forget_loss')} / {closure(score, 'wanted_loss')}"
            row(name, [score], kls["candidates"][name], closures, compare=True)
    for name, reason in results["failed"].items():
        lines.append(f"| {name} | no step: {reason} |" + " |" * (len(titles) - 2))
    return "\n".join(lines) + "\n"


def load_base(config: LlaraConfig, preset: Preset, corpus: Corpus) -> Model:
    """The base, and for hybrid prompts its items."""
    model = load_model(config.base, dtype=preset.dtype, mesh=parse_mesh(config.mesh))
    if config.prompts == "hybrid":
        return hybrid.make_hybrid(model, embeddings_of(config, preset, corpus))
    return model


def main(config: LlaraConfig) -> None:
    """Runs the scenarios and prints their tables."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    preset = config.resolve()
    corpus = load_corpus(config.data)
    model = load_base(config, preset, corpus)
    for scenario in config.scenarios:
        study = Study(config, scenario, model, corpus)
        results = study.run()
        files.atomic_write_json(
            study.directory / "results.json",
            {**results, "versions": library_versions(), "devices": describe_devices()},
        )
        table = render_table(results)
        files.atomic_write_text(study.directory / "table.md", table)
        counts = ", ".join(f"{count} {name}" for name, count in results["counts"].items())
        sys.stdout.write(f"\n{scenario} ({config.prompts}): {counts}; longest prompt ")
        sys.stdout.write(f"{results['longest_prompt']} tokens\n\n{table}")
        for name, outcome in results["outcomes"].items():
            sys.stdout.write(f"{name}: {outcome}\n")
    sys.stdout.write(f"\n{describe_devices()}; {json.dumps(library_versions())}\n")


if __name__ == "__main__":
    main(tyro.cli(LlaraConfig))
