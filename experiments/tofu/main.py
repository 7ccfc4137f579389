"""TOFU: forgetting fictitious authors, by every way to forget, with TOFU's own measures.

    python -m experiments.tofu.main small|full --base DIR --data DIR --workdir DIR

fine-tunes, retrains, forgets by each method and measures; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import study
from experiments.common import command_line, spread
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.data import Action, Example, Recipe, Request
from llmeraser_jax.evaluation import tofu
from llmeraser_jax.evaluation.records import MetricMeaning
from llmeraser_jax.models import Model

ROWS_PER_AUTHOR = 20
NUM_AUTHORS = 200
FIRST_FORGOTTEN = 190  # forget05 is the last ten authors
FIRST_PERTURBED = 180  # forget10 and its perturbed answers begin here
WORLD_FACTS = "world_facts_perturbed.json"  # read where it is there
# A path, and the Hessian over all rows, cost several retrainings here.
METHODS = tuple(name for name in study.METHODS if name not in ("path", "paper-step"))
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
class TofuConfig(study.TaskConfig):
    """The experiment. `data` holds TOFU's `full.json`, `forget05.json`, `forget10_perturbed.json` and
    `real_authors_perturbed.json`.

    Attributes:
        num_forgotten: authors of forget05 that are trained on and removed, its first ones.
        num_retained: authors that are trained on and stay: up to ten of those whose perturbed answers were
            released (180 to 189), the others from 0 on.
        num_shown: authors that are not trained on, before author 180, as calibration rows.
        num_heldout: more of them: held-out KL, and non-members of membership inference.
        num_utility: questions of retained authors, real authors and world facts each, behind the model utility.
    """

    methods: tuple[str, ...] = METHODS
    num_forgotten: int = 1
    num_retained: int = 19
    num_shown: int = 3
    num_heldout: int = 3
    num_utility: int = 20
    max_length: int = 512
    rank: int = 16
    epochs: int = 8
    batch_size: int = 16
    learning_rate: float = 6e-3

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, num_forgotten=1, num_retained=1, num_shown=1, num_heldout=1, num_utility=1)
        if self.num_forgotten > NUM_AUTHORS - FIRST_FORGOTTEN:
            msg = f"num_forgotten is {self.num_forgotten}; forget05 has 10 authors."
            raise ValueError(msg)
        wanted = self.num_retained + self.num_shown + self.num_heldout
        if wanted > FIRST_FORGOTTEN:
            msg = f"{wanted} authors are to stay or to be left out; there are {FIRST_FORGOTTEN} beside forget05."
            raise ValueError(msg)

    @property
    def recipe(self) -> Recipe:
        """TOFU's prompt for Llama-2 with EOS; or question and answer in lines, without EOS. Nothing is cut."""
        shared: dict[str, Any] = {"max_length": self.max_length, "truncation_side": "error", "add_bos": True}
        if self.full:
            return Recipe(template="[INST] {instruction} [/INST]", response_prefix="", add_eos=True, **shared)
        return Recipe(template="qa", add_eos=False, **shared)


# All 200 authors; six of them are not trained on.
PRESETS = {
    "small": TofuConfig(),
    "full": TofuConfig(
        **{**study.FULL_SIZE, "num_forgotten": 10, "num_retained": 184, "num_utility": 200, "max_length": 512}
    ),
}


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


def make_task(
    encode: study.Encode, forgotten: tofu.Questions, retained: tofu.Questions, others: Sequence[tofu.Questions]
) -> Any:
    """Truth ratios on the forgotten authors' questions, and the model utility, of a model.

    Args:
        encode: as the training saw examples.
        forgotten, retained: authors' questions with their wrong answers.
        others: the same of real authors and, where there are any, world facts; without these the utility is the
            harmonic mean of six numbers, not of nine.
    """

    def measure(model: Model, params: Any) -> Mapping[str, Any]:
        parts = [
            tofu.score_questions(model, params, questions, encode).utility(choice=choice)
            for questions, choice in ((retained, False), *((questions, True) for questions in others))
        ]
        name = "model utility" if len(parts) == 3 else "utility of 6"
        values = {name: tofu.model_utility(parts), "ROUGE-L, retained": parts[0].rouge}
        metrics = {name: {"value": value, "standard_error": None} for name, value in values.items()}
        scores = tofu.score_questions(model, params, forgotten, encode, with_answers=False)
        for mean in ("geometric", "arithmetic"):
            each = tofu.forget_truth_ratios(scores.truth_ratio(mean=mean))
            error = float(each.std(ddof=1) / np.sqrt(len(each)))
            metrics[f"truth ratio ({mean})"] = {"value": float(each.mean()), "standard_error": error}
        ratios = scores.truth_ratio().tolist()
        return {"metrics": metrics, "truth_ratios": ratios, "utility_parts": [*map(dataclasses.asdict, parts)]}

    return measure


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
        return tofu.questions_from_rows([perturbed[row] for row in spread(rows, count)])

    def questions_of(name: str) -> tofu.Questions:
        return tofu.questions_from_rows(read_rows(config.data / name)[: config.num_utility])

    real = questions_of("real_authors_perturbed.json")
    world = questions_of(WORLD_FACTS) if (config.data / WORLD_FACTS).exists() else None
    forgotten = perturbed_of(authors.forgotten, ROWS_PER_AUTHOR * len(authors.forgotten))
    retained = perturbed_of(authors.retained, config.num_utility)

    train = examples((*authors.retained, *authors.forgotten))
    counts = ("num_forgotten", "num_retained", "num_shown", "num_heldout", "num_utility")
    return config.scenario(
        name="forget05",
        model=model,
        recipe=config.recipe,
        examples=train,
        requests=tuple(Request(id=example.id, action=Action.REMOVE) for example in examples(authors.forgotten)),
        shown=examples(authors.shown),
        heldout=examples(authors.heldout),
        make_task=lambda _, encode: make_task(
            encode, forgotten, retained, [real] if world is None else [real, world]
        ),
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
    study.show(make_scenario(config, config.load_base()), config.workdir / "forget05", config)


if __name__ == "__main__":
    main(command_line(PRESETS))
