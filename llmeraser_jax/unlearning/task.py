"""The task: an adapter, the data it was trained on, and what is to be forgotten or changed."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llmeraser_jax.data import (
    Action,
    Example,
    Request,
    TokenDataset,
    edited_example,
    encode_examples,
    find_look_alikes,
)
from llmeraser_jax.lora import check_no_l2
from llmeraser_jax.losses import Objective, lm_objective
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import replicate
from llmeraser_jax.runs import Run, RunError
from llmeraser_jax.text import short_repr
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.types import ExampleSet, LoraParams
from llmeraser_jax.unlearning.problem import EditProblem


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UnlearningTask:
    """What a method is given.

    For a language model: the `Model`, its adapter, the encoded training data, the requests, and how the adapter was
    trained. For any other model: its `Objective`, its parameters, and an `EditProblem` as the requests.

    Attributes:
        model: the base, or the objective that was trained.
        adapter: the parameters trained on the data as they stood; replicated over the model's devices.
        requests: validated against the data (`data.load_requests`), or the edit problem itself.
        data: the training set as it stood, encoded, with its texts; None where `requests` is an edit problem.
        training: how the adapter was trained; its `l2` is the objective's lambda. None where `model` is an
            objective.
        calibration: rows of the same kind that were not trained on; they show where removed rows should end.
        initial: the adapter that training started from; None draws one from a seed where one is needed.
        target_loss: where removed rows should end, nats per token, instead of the calibration rows' mean loss.
        modified: [s] for each forget row, whether its query is what changes; None reads it off the requests.
        retraining_cost: gradient equivalents of a retraining; None works it out from `training`.
        users: whose example each is, in the order of `data`; None where that is not known.
        unstated: fields of `training` that nobody knows; see `Run.unstated`.
        workdir: where rivals that train keep checkpoints; None keeps nothing.
    """

    model: Model | Objective
    adapter: LoraParams
    requests: Sequence[Request] | EditProblem
    data: TokenDataset | None = None
    training: TrainConfig | None = None
    calibration: ExampleSet | None = None
    initial: LoraParams | None = None
    target_loss: float | None = None
    modified: np.ndarray | None = None
    retraining_cost: float | None = None
    users: tuple[str, ...] | None = None
    unstated: tuple[str, ...] = ()
    workdir: Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, Objective) != isinstance(self.requests, EditProblem):
            msg = (
                "A task is a Model with data and requests, or an Objective with an EditProblem; got "
                f"{type(self.model).__name__} with {type(self.requests).__name__}."
            )
            raise ValueError(msg)
        if isinstance(self.model, Model) and (self.data is None or self.training is None):
            msg = "A task of a language model needs its data and its training, whose l2 is the objective's."
            raise ValueError(msg)
        if isinstance(self.model, Model) and self.data is not None:
            self.data.require_vocabulary(self.model.vocabulary(self.adapter))
        if not isinstance(self.requests, EditProblem) and not self.requests:
            msg = "There are no requests; nothing to erase."
            raise ValueError(msg)
        if self.target_loss is not None and not (self.target_loss > 0 and np.isfinite(self.target_loss)):
            msg = f"target_loss is {self.target_loss}; it must be finite and above 0."
            raise ValueError(msg)
        if self.users is not None and len(self.users) != len(self.dataset):
            msg = f"There are {len(self.users)} users for {len(self.dataset)} examples; give one per example."
            raise ValueError(msg)
        # Beside the base, on every device: programs refuse arguments on some of the devices of several processes.
        object.__setattr__(self, "adapter", replicate(self.adapter, self.mesh))

    def __repr__(self) -> str:
        requests = self.requests if isinstance(self.requests, EditProblem) else f"{len(self.requests)} requests"
        model = self.model if isinstance(self.model, Model) else "an objective"
        calibration = None if self.calibration is None else len(self.calibration)
        data = None if self.data is None else len(self.data)
        return short_repr(self, model=model, data=data, requests=requests, calibration=calibration)

    @property
    def base_model(self) -> Model | None:
        """The base; None where the task is of another kind of model."""
        return self.model if isinstance(self.model, Model) else None

    @property
    def language_model(self) -> Model:
        """The base.

        Raises:
            TypeError: the task is of another kind of model.
        """
        if not isinstance(self.model, Model):
            msg = "This needs a language model; the task has an objective of another kind."
            raise TypeError(msg)
        return self.model

    @property
    def dataset(self) -> TokenDataset:
        """The encoded training set of a language model.

        Raises:
            TypeError: the task is of another kind of model.
        """
        if self.data is None:
            msg = "This needs a language model's data; the task has an edit problem over other rows."
            raise TypeError(msg)
        return self.data

    @property
    def mesh(self) -> Mesh | None:
        """The model's devices."""
        return self.model.mesh if isinstance(self.model, Model) else None

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective that was trained."""
        if isinstance(self.model, Objective):
            return self.model
        assert self.training is not None  # of a language model
        check_no_l2(getattr(self.adapter, "config", None), self.training.l2)
        return lm_objective(self.model.apply, self.model.base, l2=self.training.l2)

    @functools.cached_property
    def problem(self) -> EditProblem[Any]:
        """The requests as index arrays over the examples as trained, followed by their replacements."""
        if isinstance(self.requests, EditProblem):
            return self.requests
        return make_problem(self.language_model, self.dataset, self.requests)

    @functools.cached_property
    def look_alikes(self) -> tuple[np.ndarray, ...] | None:
        """For each forget row the retained rows whose text may say the same; None where nobody looked."""
        problem = self.problem
        if self.data is None or not len(problem.retained):
            return problem.look_alikes
        return find_look_alikes(self.data, problem.named, problem.retained)

    @functools.cached_property
    def query_changes(self) -> np.ndarray:
        """[s] for each forget row, whether its query is what changes: such edits have targets of their own."""
        if self.modified is not None:
            return np.asarray(self.modified, bool)
        if isinstance(self.requests, EditProblem):
            return np.zeros(len(self.problem.named), bool)
        action_of = {request.id: request.action for request in self.requests}
        examples = self.dataset.examples
        return np.array([action_of[examples[i].id] is Action.MODIFY_QUERY for i in self.problem.named], bool)

    @functools.cached_property
    def cost_of_retraining(self) -> float | None:
        """Gradient equivalents: epochs times the examples after the requests; None where it is not known."""
        if self.retraining_cost is not None or self.training is None:
            return self.retraining_cost
        return float(self.training.epochs * self.problem.num_edited_total)

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

    def require_training(self) -> TrainConfig:
        """`training`, for a method that repeats it.

        Raises:
            RunError: parts of it are not known.
        """
        needed = [name for name in self.unstated if name != "seed"]
        if needed or self.training is None:
            msg = (
                f"The training did not state {' and '.join(needed) or 'its options'}, which this method repeats. "
                "Adopt the adapter with a recipe that states them, or pass a configuration."
            )
            raise RunError(msg)
        return self.training

    def initial_adapter(self, seed: int) -> Any:
        """The adapter that training started from; where it is not known, one drawn from `seed`."""
        if self.initial is not None:
            return self.initial
        return self.language_model.init_lora(jax.random.key(seed), self.adapter.config)


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
        features=dataset.features,
    )


def make_problem(model: Model, dataset: TokenDataset, requests: Sequence[Request]) -> EditProblem[TokenDataset]:
    """The requests as index arrays over the examples as trained, followed by their replacements.

    Args:
        model: its tokenizer encodes the replacements.
        dataset: the training set as it stood.
        requests: validated against `dataset.examples` (`data.load_requests`).

    Raises:
        ValueError: a replacement that the recipe cannot encode, or whose change is lost when its prompt is cut
            to the recipe's `max_length`; named by id.
    """
    if len(dataset.examples) != len(dataset):
        msg = "The data set was made without texts; use data.encode_examples, so that edits can be encoded."
        raise ValueError(msg)
    by_id = {request.id: request for request in requests}
    dataset.indices_of(by_id)
    named = np.array([i for i, example in enumerate(dataset.examples) if example.id in by_id], np.int64)
    replacements, edited = [], []
    for index in named:
        example = dataset.examples[index]
        replacement = edited_example(example, by_id[example.id])
        if replacement is None:
            replacements.append(-1)
        else:
            replacements.append(len(dataset) + len(edited))
            edited.append(replacement)
    together = encode_examples(
        (*dataset.examples, *edited),
        dataset.recipe,
        model.tokenizer,
        buckets=dataset.buckets,
        normalizer=dataset.normalizer,
    )
    if together.dropped_ids:
        msg = (
            f"The changed example {together.dropped_ids[0]!r} has no token under the loss within max_length = "
            f"{dataset.recipe.max_length}; request its removal."
        )
        raise ValueError(msg)
    replacements = np.array(replacements, np.int64)
    lost = [
        dataset.examples[i].id
        for i, j in zip(named, replacements, strict=True)
        if j >= 0
        and np.array_equal(together.encoded[i].tokens, together.encoded[j].tokens)
        and together.encoded[i].images == together.encoded[j].images
    ]
    if lost:
        msg = (
            f"The changes to {', '.join(lost[:10])} leave the same tokens, since the changed part of the prompt "
            f"is cut off at max_length = {dataset.recipe.max_length}. There is nothing to erase for them."
        )
        raise ValueError(msg)
    return EditProblem(together, len(dataset), named, replacements)


def task_of_run(
    run: Run,
    requests: Sequence[Request],
    *,
    model: Model | None = None,
    data_path: str | os.PathLike[str] | None = None,
    examples: Sequence[Example] | None = None,
    calibration: Sequence[Example] | None = None,
    target_loss: float | None = None,
    users: Mapping[str, str] | None = None,
    training: TrainConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
) -> UnlearningTask:
    """A run directory and requests as a task.

    Args:
        run: the run to forget from.
        requests: validated against its data.
        model: its base model where it is loaded already.
        data_path: where its training data is now; None is where it was.
        examples: its training data where `run.load_examples` has loaded it already.
        calibration: examples of the same kind that were not trained on.
        target_loss: see `UnlearningTask`.
        users: from example id to user id, for all examples.
        training: how it was trained, where the run does not wholly know; None is the run's.
        workdir: where rivals that train keep checkpoints.
        mesh: where to load the model to, if it is loaded here.

    Raises:
        RunError: the data or the model is not the run's.
        ValueError: an example without a user.
    """
    examples = run.load_examples(data_path) if examples is None else examples
    model = run.load_or_verify_model(model, mesh=mesh)
    if users is not None:
        missing = [example.id for example in examples if example.id not in users]
        if missing:
            msg = f"{len(missing)} examples have no user, the first is {missing[0]!r}; name one for each."
            raise ValueError(msg)
    return UnlearningTask(
        model=model,
        adapter=run.load_adapter(model),
        data=run.encode(examples, model.tokenizer),
        requests=tuple(requests),
        training=run.train_config if training is None else training,
        calibration=None if calibration is None else run.encode(calibration, model.tokenizer),
        initial=run.load_initial_adapter(model),
        target_loss=target_loss,
        users=None if users is None else tuple(users[example.id] for example in examples),
        unstated=run.unstated if training is None else (),
        workdir=None if workdir is None else Path(workdir),
    )
