"""TOFU: forgetting fictitious authors, by every way to forget, with TOFU's own measures.

    python -m experiments.tofu.main small --base DIR --data DIR --workdir DIR
    python -m experiments.tofu.main full --base LLAMA_2_7B --data DIR --workdir DIR

fine-tunes, retrains, forgets by each method and measures; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy.stats import hmean

from experiments import full_size, study
from llmeraser_jax.data import Action, Example, Recipe, Request
from llmeraser_jax.evaluation import tofu
from llmeraser_jax.evaluation.records import MetricMeaning
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, load_model
from llmeraser_jax.parallel import parse_mesh
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.unlearning import EraseConfig

ROWS_PER_AUTHOR = 20
NUM_AUTHORS = 200
FIRST_FORGOTTEN = 190  # forget05 is the last ten authors
FIRST_PERTURBED = 180  # forget10 and its perturbed answers begin here
WORLD_FACTS = "world_facts_perturbed.json"  # read where it is there
# A path, and the Hessian over all rows, cost several retrainings here.
METHODS = tuple(name for name in study.METHODS if name not in ("llmeraser-path", "llmeraser-paper-step"))
_RATIO = (
    "mean of min(R, 1/R) on the forgotten questions, R the probability of the wrong answers over the right one's"
)
METRICS = {
    "model utility": MetricMeaning(
        meaning="TOFU's own: harmonic mean of probability, ROUGE-L recall and truth ratio on retained authors, "
        "real authors and world facts.",
        better="higher",
    ),
    "utility of 6": MetricMeaning(
        meaning="harmonic mean of probability, ROUGE-L recall and truth ratio on retained and on real authors, "
        "without the world facts of TOFU's own, whose file was not there.",
        better="higher",
    ),
    "ROUGE-L, retained": MetricMeaning(
        meaning="ROUGE-L recall of generated answers about retained authors.", better="higher"
    ),
    "truth ratio (geometric)": MetricMeaning(
        meaning=f"{_RATIO}; geometric mean over wrong answers, as released.", better="retrained"
    ),
    "truth ratio (arithmetic)": MetricMeaning(
        meaning="the same with the arithmetic mean over wrong answers, as in the paper.", better="retrained"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofuConfig(study.StudyOptions):
    """The experiment, besides which methods are compared; the defaults are what the README reports.

    Attributes:
        base: base model, a directory in Hugging Face layout.
        data: TOFU's `full.json`, `forget05.json`, `forget10_perturbed.json` and `real_authors_perturbed.json`.
        workdir: everything is kept there.
        num_forgotten: authors of forget05 that are trained on and removed, its first ones.
        num_retained: authors that are trained on and stay: up to ten of those whose perturbed answers were
            released (180 to 189), the others from 0 on.
        num_shown: authors that are not trained on, before author 180, and that erasing by matching is shown.
        num_heldout: more of them: held-out KL, and non-members of membership inference.
        num_utility: questions of retained authors, real authors and world facts each, behind the model utility.
        max_length: tokens; a longer row is an error.
        rank: of the adapter, on all projections.
        epochs: of training.
        learning_rate: of training.
        batch_size: of training.
        l2: lambda.
        seed: of training.
    """

    base: Path
    data: Path
    workdir: Path
    methods: tuple[str, ...] = METHODS
    num_forgotten: int = 1
    num_retained: int = 19
    num_shown: int = 3
    num_heldout: int = 3
    num_utility: int = 20
    max_length: int = 512
    rank: int = 16
    epochs: int = 8
    learning_rate: float = 6e-3
    batch_size: int = 16
    l2: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.num_forgotten <= NUM_AUTHORS - FIRST_FORGOTTEN:
            msg = f"num_forgotten is {self.num_forgotten}; forget05 has 10 authors."
            raise ValueError(msg)
        for name in ("num_retained", "num_shown", "num_heldout", "num_utility"):
            if getattr(self, name) < 1:
                msg = f"{name} is {getattr(self, name)}; it must be at least 1."
                raise ValueError(msg)
        wanted = self.num_retained + self.num_shown + self.num_heldout
        if wanted > FIRST_FORGOTTEN:
            msg = f"{wanted} authors are to stay or to be left out; there are {FIRST_FORGOTTEN} beside forget05."
            raise ValueError(msg)

    @property
    def recipe(self) -> Recipe:
        """Question and answer in lines; without EOS, which the small base was never trained to give."""
        return Recipe(
            template="qa", add_bos=True, add_eos=False, max_length=self.max_length, truncation_side="error"
        )

    @property
    def lora(self) -> LoraConfig:
        """The adapter."""
        return LoraConfig(rank=self.rank, alpha=2.0 * self.rank, target_modules="all-linear")

    @property
    def train(self) -> TrainConfig:
        """Its training, in small micro-batches: float32 on a CPU is bound by memory."""
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            microbatch_size=min(2, self.batch_size),
            learning_rate=self.learning_rate,
            warmup_ratio=0.1,
            l2=self.l2,
            seed=self.seed,
            checkpoint_every_steps=200,
        )

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """What rivals that descend are offered."""
        return study.LEARNING_RATES

    @property
    def erase(self) -> EraseConfig:
        """What the package's own ways share."""
        return EraseConfig(l2=self.l2, chunk_size=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullTofuConfig(full_size.FullSize, TofuConfig):
    """All 200 authors on Llama-2-7B with the settings of `experiments.full_size`; six of them stay outside."""

    num_forgotten: int = 10
    num_retained: int = 184
    num_utility: int = 200
    max_length: int = 512
    batch_size: int = full_size.TRAIN.batch_size

    @property
    def recipe(self) -> Recipe:
        """TOFU's prompt for Llama-2, with EOS."""
        return Recipe(
            template="[INST] {instruction} [/INST]", response_prefix="", max_length=self.max_length,
            truncation_side="error", add_bos=True, add_eos=True,
        )  # fmt: skip

    @property
    def train(self) -> TrainConfig:
        """Its training."""
        return dataclasses.replace(super().train, batch_size=self.batch_size)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """TOFU's files: a JSON object in each line.

    Raises:
        FileNotFoundError: says what the file is for.
    """
    if not path.exists():
        msg = f"{path} is not there; `data` is a directory with TOFU's files as released."
        raise FileNotFoundError(msg)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Authors:
    """Who is trained on, forgotten, and neither: author numbers, 20 rows of full.json each."""

    forgotten: tuple[int, ...]
    retained: tuple[int, ...]
    shown: tuple[int, ...]
    heldout: tuple[int, ...]


def choose_authors(config: TofuConfig) -> Authors:
    """The same for equal counts; nobody is in two groups."""
    with_perturbed = list(range(FIRST_PERTURBED, FIRST_FORGOTTEN))
    others = list(range(FIRST_PERTURBED))
    retained = (with_perturbed + others)[: config.num_retained]
    outside = [author for author in reversed(others) if author not in retained]
    return Authors(
        forgotten=tuple(range(FIRST_FORGOTTEN, FIRST_FORGOTTEN + config.num_forgotten)),
        retained=tuple(sorted(retained)),
        shown=tuple(outside[: config.num_shown]),
        heldout=tuple(outside[config.num_shown : config.num_shown + config.num_heldout]),
    )


def rows_of(authors: Sequence[int]) -> list[int]:
    """Their places in full.json."""
    return [ROWS_PER_AUTHOR * author + k for author in authors for k in range(ROWS_PER_AUTHOR)]


class TofuTask:
    """Truth ratios on the forgotten authors' questions, and the model utility.

    Args:
        encode: as the training saw examples.
        forgotten, retained, real_authors: questions with their wrong answers.
        world_facts: the same; without them the utility is the harmonic mean of six numbers, not of nine.
    """

    def __init__(
        self,
        encode: study.Encode,
        *,
        forgotten: tofu.Questions,
        retained: tofu.Questions,
        real_authors: tofu.Questions,
        world_facts: tofu.Questions | None = None,
    ):
        self.encode, self.forgotten, self.retained = encode, forgotten, retained
        self.others = (real_authors,) if world_facts is None else (real_authors, world_facts)

    def __call__(self, model: Model, params: Any) -> Mapping[str, Any]:
        forgotten = tofu.score_questions(model, params, self.forgotten, self.encode, with_answers=False)
        parts = [
            tofu.score_questions(model, params, questions, self.encode).utility(choice=choice)
            for questions, choice in ((self.retained, False), *((questions, True) for questions in self.others))
        ]
        ratios = {mean: forgotten.truth_ratio(mean=mean) for mean in ("geometric", "arithmetic")}
        if len(parts) == 3:
            retained, real, world = parts
            nine = tofu.ModelUtility(retained=retained, real_authors=real, world_facts=world)
            utility = {"model utility": nine.value}
        else:
            utility = {"utility of 6": float(hmean([n for part in parts for n in dataclasses.astuple(part)]))}
        values = {**utility, "ROUGE-L, retained": parts[0].rouge}
        metrics = {name: {"value": value, "standard_error": None} for name, value in values.items()}
        for mean, found in ratios.items():
            each = tofu.forget_truth_ratios(found)
            metrics[f"truth ratio ({mean})"] = {
                "value": float(each.mean()),
                "standard_error": float(each.std(ddof=1) / np.sqrt(len(each))),
            }
        return {
            "metrics": metrics,
            "truth_ratios": ratios["geometric"].tolist(),
            "utility_parts": [dataclasses.asdict(part) for part in parts],
        }


def make_scenario(config: TofuConfig, model: Model) -> study.Scenario:
    """Rows and requests, the same for every call.

    Raises:
        ValueError: the files are not TOFU's: their rows do not agree.
    """
    full = read_rows(config.data / "full.json")
    perturbed = read_rows(config.data / "forget10_perturbed.json")
    forget05 = read_rows(config.data / "forget05.json")
    if len(full) != NUM_AUTHORS * ROWS_PER_AUTHOR or forget05 != full[FIRST_FORGOTTEN * ROWS_PER_AUTHOR :]:
        msg = f"full.json has {len(full)} rows and forget05.json {len(forget05)}; the latter must end the former."
        raise ValueError(msg)
    authors = choose_authors(config)

    def examples(chosen: Sequence[int]) -> tuple[Example, ...]:
        return tuple(
            Example(id=str(row), instruction=full[row]["question"], response=full[row]["answer"], format="question")
            for row in rows_of(chosen)
        )

    def perturbed_of(chosen: Sequence[int], count: int) -> tofu.Questions:
        rows = rows_of([author - FIRST_PERTURBED for author in chosen if author >= FIRST_PERTURBED])
        places = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
        return tofu.questions_from_rows([perturbed[rows[place]] for place in places])

    def questions_of(name: str) -> tofu.Questions:
        return tofu.questions_from_rows(read_rows(config.data / name)[: config.num_utility])

    real = questions_of("real_authors_perturbed.json")
    world = questions_of(WORLD_FACTS) if (config.data / WORLD_FACTS).exists() else None
    forgotten = perturbed_of(authors.forgotten, ROWS_PER_AUTHOR * len(authors.forgotten))
    retained = perturbed_of(authors.retained, config.num_utility)

    def make_task(_: Model, encode: study.Encode) -> TofuTask:
        return TofuTask(encode, forgotten=forgotten, retained=retained, real_authors=real, world_facts=world)

    train = examples((*authors.retained, *authors.forgotten))
    counts = ("num_forgotten", "num_retained", "num_shown", "num_heldout", "num_utility")
    return study.Scenario(
        name="forget05",
        model=model,
        recipe=config.recipe,
        lora=config.lora,
        train=config.train,
        erase=config.erase,
        learning_rates=config.learning_rates,
        examples=train,
        requests=tuple(Request(id=example.id, action=Action.REMOVE) for example in examples(authors.forgotten)),
        shown=examples(authors.shown),
        heldout=examples(authors.heldout),
        make_task=make_task,
        users={example.id: str(int(example.id) // ROWS_PER_AUTHOR) for example in train},
        num_task_seeds=1,
        question=f"Can a model forget all that it was taught about {len(authors.forgotten)} of "
        f"{len(authors.forgotten) + len(authors.retained)} fictitious authors (TOFU), as if it had never read of "
        "them, and still answer about the others?",
        metrics=METRICS,
        settings={
            **{name: getattr(config, name) for name in counts},
            **({} if world is None else {"num_world_facts": len(world.answered)}),
        },
    )


def main(config: TofuConfig) -> None:
    """Runs the scenario and prints its tables."""
    study.set_up_logging()
    full = isinstance(config, FullTofuConfig)
    mesh = parse_mesh(config.mesh) if full else None
    model = load_model(config.base, dtype=full_size.DTYPE if full else "float32", mesh=mesh)
    study.show(make_scenario(config, model), config.workdir / "forget05", config)


Preset = (
    Annotated[TofuConfig, tyro.conf.subcommand("small")] | Annotated[FullTofuConfig, tyro.conf.subcommand("full")]
)

if __name__ == "__main__":
    main(tyro.cli(Preset))
