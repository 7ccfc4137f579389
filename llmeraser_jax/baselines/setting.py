"""Owns the interface of the baselines: what one is given (`Setting`), what it returns (`Fitted`), how it is run.

A baseline is a frozen configuration with a method `fit(setting) -> Fitted`; `fit` here does the same from a run
directory and requests. Costs are in gradient equivalents (`unlearning/cost.py`): a forward and backward pass of one
example is 1, a forward pass alone 1/3. What had to be computed before any request came (the shards of SISA and
RecEraser) is counted apart.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float

from llmeraser_jax import data
from llmeraser_jax.data import Example, Request, TokenDataset
from llmeraser_jax.lora import Lora
from llmeraser_jax.losses import Objective, example_losses, lm_objective, stacking_order
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import place_stack
from llmeraser_jax.runs import Run, RunError
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning.erase import make_problem
from llmeraser_jax.unlearning.problem import EditProblem

_CHUNK_SIZE = 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What a baseline is given: a trained adapter, its data, and what is to be forgotten.

    Attributes:
        model: the base.
        lora: the adapter trained on `dataset`.
        dataset: the training set as it stood, encoded, with its texts.
        requests: validated against it (`data.load_requests`).
        train: how the adapter was trained.
        initial: the adapter that training started from; None draws one from a seed where one is needed.
        heldout: rows of the same kind that were not trained on; only matched erasing uses them.
        users: whose example each is, in the order of `dataset`; None where that is not known.
        unstated: fields of `train` that nobody knows; see `Run.unstated`.
        workdir: where trainings keep checkpoints, so that a call that was killed goes on; None keeps nothing.
    """

    model: Model
    lora: Lora
    dataset: TokenDataset
    requests: tuple[Request, ...]
    train: TrainConfig
    initial: Lora | None = None
    heldout: TokenDataset | None = None
    users: tuple[str, ...] | None = None
    unstated: tuple[str, ...] = ()
    workdir: Path | None = None

    def __post_init__(self) -> None:
        if not self.requests:
            msg = "There are no requests; there is nothing to forget."
            raise ValueError(msg)
        if self.users is not None and len(self.users) != len(self.dataset):
            msg = f"There are {len(self.users)} users for {len(self.dataset)} examples; give one per example."
            raise ValueError(msg)

    @functools.cached_property
    def problem(self) -> EditProblem[TokenDataset]:
        """The requests as index arrays over the examples as trained, followed by their replacements."""
        return make_problem(self.model, self.dataset, self.requests)

    @functools.cached_property
    def current(self) -> np.ndarray:
        """For each trained example where it is now [n]: an index into `problem.examples`, or -1 where it went."""
        current = np.arange(self.problem.num_trained)
        current[self.problem.named] = self.problem.replacements
        return current

    @functools.cached_property
    def edited(self) -> TokenDataset:
        """The n' examples after the requests, in their old order."""
        return take(self.problem.examples, self.current[self.current >= 0])

    @property
    def objective(self) -> Objective:
        """The objective that was trained."""
        return lm_objective(self.model.apply, self.model.base, l2=self.train.l2)

    @property
    def training(self) -> TrainConfig:
        """`train`, for a baseline that repeats it.

        Raises:
            RunError: parts of it are not known.
        """
        needed = [name for name in self.unstated if name != "seed"]
        if needed:
            msg = (
                f"The training did not state {' and '.join(needed)}, which this baseline repeats. Adopt the "
                "adapter with a recipe that states them, or pass a configuration."
            )
            raise RunError(msg)
        return self.train

    def initial_adapter(self, seed: int) -> Lora:
        """The adapter that training started from; where it is not known, one drawn from `seed`."""
        if self.initial is not None:
            return self.initial
        return self.model.init_lora(jax.random.key(seed), self.lora.config)


def take(dataset: TokenDataset, indices: np.ndarray) -> TokenDataset:
    """Some rows of a data set as one of their own, in the same shapes."""
    encoded = [dataset.encoded[int(i)] for i in indices]
    examples = [dataset.examples[int(i)] for i in indices] if dataset.examples else []
    cut = set(dataset.truncated_ids)
    return TokenDataset(
        encoded,
        dataset.recipe,
        buckets=dataset.buckets,
        examples=examples,
        normalizer=dataset.normalizer,
        truncated_ids=[e.id for e in encoded if e.id in cut],
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """What a baseline returns.

    `params` goes wherever an adapter goes, together with `model`: `model.apply(model.base, params, ...)` are the
    logits, and `model` serves plain adapters too.

    Attributes:
        model: the setting's, or the `EnsembleModel` of it that reads an ensemble.
        params: a `Lora`, or an `Ensemble` of them.
        before: what the baseline would have used had no request come: the setting's adapter, or its ensemble.
        gradient_equivalents: cost of carrying out the requests.
        seconds: the same in wall-clock time, compilation included.
        preparation_gradient_equivalents: cost of what had to be there before the requests, in place of the
            setting's adapter.
        preparation_seconds: the same in wall-clock time.
        details: JSON-like, for the record.
    """

    model: Model
    params: LoraParams
    before: LoraParams
    gradient_equivalents: float
    seconds: float
    preparation_gradient_equivalents: float = 0.0
    preparation_seconds: float = 0.0
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def losses(self, dataset: TokenDataset, indices: np.ndarray | None = None) -> Float[np.ndarray, " examples"]:
        """Response loss of each example under `params`, in the order asked for, without the L2 term."""
        return response_losses(self.model, self.params, dataset, indices)


def response_losses(
    model: Model, params: LoraParams | None, dataset: TokenDataset, indices: np.ndarray | None = None
) -> Float[np.ndarray, " examples"]:
    """Response loss of each example under an adapter or an ensemble, in the order asked for.

    Args:
        model: the base, or an `EnsembleModel` of it.
        params: what `model.apply` reads.
        dataset: encoded examples.
        indices: which; None is all.
    """
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    objective = lm_objective(model.apply, model.base, l2=0.0)
    stack = dataset.stack(indices, np.ones(len(indices)), chunk_size=_CHUNK_SIZE)
    losses = np.zeros(len(indices))
    losses[stacking_order(dataset, indices)] = example_losses(objective, params, place_stack(stack, model.mesh))
    return losses


@runtime_checkable
class Baseline(Protocol):
    """A way to forget: a frozen, hashable configuration that is fitted to a setting."""

    def fit(self, setting: Setting) -> Fitted:
        """The adapter or ensemble after the setting's requests."""
        ...


def setting_of_run(
    run: Run,
    requests: Sequence[Request],
    *,
    model: Model | None = None,
    data_path: str | os.PathLike[str] | None = None,
    heldout: Sequence[Example] | None = None,
    users: Mapping[str, str] | None = None,
    config: TrainConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
) -> Setting:
    """A run directory and requests as a `Setting`.

    Args:
        run: the run to forget from.
        requests: validated against its data.
        model: its base model where it is loaded already.
        data_path: where its training data is now; None is where it was.
        heldout: examples of the same kind that were not trained on.
        users: from example id to user id, for all examples.
        config: how it was trained, where the run does not wholly know; None is the run's.
        workdir: where trainings keep checkpoints.

    Raises:
        RunError: the data or the model is not the run's.
        ValueError: an example without a user.
    """
    examples = run.load_examples(data_path)
    if model is None:
        model = run.load_model()
    else:
        run.verify_model(model)
    if users is not None:
        missing = [example.id for example in examples if example.id not in users]
        if missing:
            msg = f"{len(missing)} examples have no user, the first is {missing[0]!r}; name one for each."
            raise ValueError(msg)
    return Setting(
        model=model,
        lora=run.load_adapter(model),
        dataset=run.encode(examples, model.tokenizer),
        requests=tuple(requests),
        train=run.train_config if config is None else config,
        initial=run.load_initial_adapter(model),
        heldout=None if heldout is None else run.encode(heldout, model.tokenizer),
        users=None if users is None else tuple(users[example.id] for example in examples),
        unstated=run.unstated if config is None else (),
        workdir=None if workdir is None else Path(workdir),
    )


def fit(
    baseline: Baseline, run: Run, requests: Sequence[Request] | str | os.PathLike[str], **options: Any
) -> Fitted:
    """Carries requests out on a run directory with a baseline; writes nothing but checkpoints in `workdir`.

    Args:
        baseline: an entry of `BASELINES`, or a configuration of one's own.
        run: the run to forget from.
        requests: parsed requests, or the path of a request file.
        options: as for `setting_of_run`.
    """
    if isinstance(requests, str | os.PathLike):
        requests = data.load_requests(requests, run.load_examples(options.get("data_path")))
    return baseline.fit(setting_of_run(run, requests, **options))
