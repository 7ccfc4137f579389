"""Owns what is trained: the two tasks, their recipes, and the rows and requests of each cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.fidelity import profiles
from experiments.fidelity.profiles import CATEGORIES, Category
from experiments.tallrec_movie import prepare
from llmeraser_jax.data import Action, Example, Recipe, Request
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.unlearning import EraseConfig

LARGE = 1000  # rows; from here on a task is there for the cost

_QUESTION = "\nWhether the user will like"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellData:
    """Rows and requests of one cell.

    Attributes:
        trained_key: cells with equal keys have equal training rows, and share the trained model.
        train: as trained on.
        heldout: that no model saw.
        num_like_train: so many rows of `heldout`, its first, are like the training rows: the non-members of
            membership inference. The rows after them, or all where there are none, are the task.
        requests: what is to be erased.
    """

    trained_key: str
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    num_like_train: int
    requests: tuple[Request, ...]


class Task(Protocol):
    """A data set with the recipe of its training."""

    @property
    def name(self) -> str:
        """A directory's name."""
        ...

    @property
    def recipe(self) -> Recipe:
        """How rows become tokens."""
        ...

    @property
    def lora(self) -> LoraConfig:
        """The adapter."""
        ...

    @property
    def train(self) -> TrainConfig:
        """How it is trained."""
        ...

    @property
    def erase(self) -> EraseConfig:
        """What all methods of the library share; each then states what is its own."""
        ...

    def draw(self, category: Category, share: float, request_seed: int) -> CellData:
        """Rows and requests; equal arguments give equal data."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """JSON-like: what a workdir must have been made with to be gone on with."""
        ...


def _settings(task: Any) -> dict[str, Any]:
    parts = {name: dataclasses.asdict(getattr(task, name)) for name in ("lora", "train")}
    fields = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(task).items()}
    return {"task": type(task).__name__, **fields, "recipe": task.recipe.to_mapping(), **parts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfilesTask:
    """Fictional people on the demo's base.

    Attributes:
        num_rows: n.
        phrasings: rows per fact.
        seed: of the people and of the training.
        epochs: of training.
        learning_rate: of training.
        batch_size: of training.
        rank: of the adapter, on all projections.
    """

    num_rows: int
    phrasings: int = 1
    seed: int = 0
    epochs: int
    learning_rate: float
    batch_size: int = 16
    rank: int

    @property
    def name(self) -> str:
        return f"profiles-{self.num_rows}"

    @property
    def recipe(self) -> Recipe:
        return Recipe(add_bos=True)

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(rank=self.rank, alpha=2.0 * self.rank, target_modules="all-linear")

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_ratio=0.1,
            l2=1e-3,
            seed=self.seed,
            checkpoint_every_steps=500,
        )

    @property
    def erase(self) -> EraseConfig:
        return EraseConfig(l2=self.train.l2, chunk_size=32, seed=self.seed)

    def draw(self, category: Category, share: float, request_seed: int) -> CellData:
        drawn = profiles.make_profiles(self.num_rows, self.seed, phrasings=self.phrasings)
        requests = profiles.make_requests(drawn, category, share, request_seed)
        return CellData(
            trained_key="shared",
            train=drawn.train,
            heldout=drawn.heldout,
            num_like_train=2 * profiles.NUM_HELDOUT_PEOPLE,
            requests=requests,
        )

    def settings(self) -> Mapping[str, Any]:
        return _settings(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TallrecTask:
    """TALLRec's movie data, prepared and trained as `experiments.tallrec_movie` does.

    Attributes:
        data: directory with TALLRec's train and test, `.json` and `.csv`.
        num_rows: n.
        rows_per_user: of each user at most.
        num_heldout: rows of test.json.
        seed: of rows and training.
        epochs: of training.
        learning_rate: of training.
        rank: of the adapter, on all projections.
        max_length: tokens; longer prompts lose their beginning.
    """

    data: Path
    num_rows: int = 120
    rows_per_user: int = 3
    num_heldout: int = 200
    seed: int = 0
    epochs: int = 24
    learning_rate: float = 4e-3
    rank: int = 8
    max_length: int = 160

    @property
    def name(self) -> str:
        return "tallrec"

    @property
    def recipe(self) -> Recipe:
        # Why there is no EOS: see TallrecConfig.recipe.
        return Recipe(template="plain", add_bos=True, add_eos=False, max_length=self.max_length, truncate="prompt")

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(rank=self.rank, alpha=2.0 * self.rank, target_modules="all-linear")

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(
            epochs=self.epochs,
            batch_size=8,
            microbatch_size=2,
            learning_rate=self.learning_rate,
            warmup_ratio=0.1,
            l2=1e-3,
            seed=self.seed,
            checkpoint_every_steps=100,
        )

    @property
    def erase(self) -> EraseConfig:
        return EraseConfig(
            l2=self.train.l2, chunk_size=2, seed=self.seed, damping=5e-3, cg_max_steps=6, diagnostic_sample=16
        )

    def draw(self, category: Category, share: float, request_seed: int) -> CellData:
        all_rows, all_users = prepare.load_rows(self.data, "train")
        chosen = prepare.choose_rows(all_users, self.num_rows, self.rows_per_user, self.seed)
        train = tuple(all_rows[row] for row in chosen)
        users = [all_users[row] for row in chosen]
        test_rows, _ = prepare.load_rows(self.data, "test")
        heldout = prepare.draw(test_rows, self.num_heldout, self.seed)
        trained_key = "shared"
        count = max(1, round(share * len(train)))
        if category == "removal":
            # Whole users, so at least one user's rows.
            whole = self.rows_per_user * max(1, round(count / self.rows_per_user))
            requests = prepare.removal_requests(train, users, prepare.choose_users(users, whole, request_seed))
        elif category == "query":
            requests = replace_films(train, count, request_seed)
        elif category == "correction":
            train, requests = prepare.flip_labels(train, count, request_seed)
            trained_key = f"correction-{share:g}-request{request_seed}"
        else:
            msg = f"category is {category!r}; it must be one of {', '.join(CATEGORIES)}."
            raise ValueError(msg)
        return CellData(
            trained_key=trained_key, train=train, heldout=heldout, num_like_train=len(heldout), requests=requests
        )

    def settings(self) -> Mapping[str, Any]:
        return _settings(self)


def replace_films(examples: tuple[Example, ...], count: int, seed: int) -> tuple[Request, ...]:
    """Replaces the last film of the history in a seeded choice of rows by a film that the row does not have.

    The last one, because prompts are cut on the left. The films that come in are the targets of other rows.
    """
    rng = np.random.default_rng([seed, 1])
    requests = []
    for row in sorted(rng.choice(len(examples), count, replace=False).tolist()):
        text = examples[row].input
        history, question = text[: text.rindex(_QUESTION)], text[text.rindex(_QUESTION) :]
        end = history.rindex('"')
        start = history.rindex('"', 0, end)
        others = [film for film in map(_target_film, examples) if f'"{film}"' not in text]
        changed = f"{history[: start + 1]}{rng.choice(others)}{history[end:]}{question}"
        requests.append(Request(id=examples[row].id, action=Action.MODIFY_QUERY, changes={"query": changed}))
    return tuple(requests)


def _target_film(example: Example) -> str:
    return example.input.rsplit('"', 2)[1]


def profiles_task(num_rows: int, epochs: int | None = None) -> ProfilesTask:
    """The recipe with which a base that only reads short questions comes to know `num_rows` answers.

    Measured, not searched for at length: see the README.

    Args:
        num_rows: n.
        epochs: instead of the recipe's.
    """
    if num_rows < LARGE:
        return ProfilesTask(num_rows=num_rows, epochs=epochs or 25, learning_rate=4e-3, rank=16)
    return ProfilesTask(num_rows=num_rows, phrasings=10, epochs=epochs or 8, learning_rate=2.5e-3, rank=16)
