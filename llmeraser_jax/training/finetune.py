"""The training loop of an adapter: Adam on the batch mean of `l(z)`, restartable at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from llmeraser_jax import files, losses, parallel, planning, trees
from llmeraser_jax.checkpoint import StepCheckpoints
from llmeraser_jax.data import TokenDataset
from llmeraser_jax.environment import peak_memory_bytes
from llmeraser_jax.lora import Lora, check_no_l2, is_decayed
from llmeraser_jax.losses import Objective
from llmeraser_jax.models import Model
from llmeraser_jax.runs import CHECKPOINT_DIRECTORY, FEATURES_DIRECTORY, TrainConfig
from llmeraser_jax.tracking import MetricsLogger, progress
from llmeraser_jax.training.batches import lay_out_mean, step_rows
from llmeraser_jax.training.dropout import dropout_objective, step_key, with_places
from llmeraser_jax.training.measure import measure
from llmeraser_jax.types import LoraParams, PyTree

_log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
IDENTITY_FILE = "training.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A trained adapter, with its losses and cost.

    Attributes:
        lora: the adapter after the last step.
        num_steps: optimiser steps in all.
        loss: mean data loss over the training data, without the L2 term.
        gradient_norm: norm of the gradient of the objective over all training data.
        data_gradient_norm: the same without the L2 term.
        seconds: spent on steps, over all restarts up to the last checkpoint before each.
        peak_memory_bytes: see `environment.peak_memory_bytes`.
        resumed_from: the step of the checkpoint that training went on from, or None.
        kept: by step, the hash of the state in each checkpoint that is kept after the training.
    """

    lora: LoraParams
    num_steps: int
    loss: float
    gradient_norm: float
    data_gradient_norm: float
    seconds: float
    peak_memory_bytes: int
    resumed_from: int | None
    kept: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Everything but the adapter and the checkpoints, as a JSON-like mapping."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("lora", "kept")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """Another training's steps, with other rows, or none, in some places of its data.

    Every step takes what is now in the places that it took then, at the learning rate that it had; the mean is over
    the rows that are there, and a step that is left without any is skipped. So the batches of all other rows, their
    order and the number of steps are those of the other training.

    Attributes:
        places: [places] of each place in the other training's data set the row that is there now; -1 is none.
        checkpoints: where the other training's checkpoints are.
        first_step: of the checkpoint to start from; 0 starts from the initial adapter.
        state_sha256: hash of the state in that checkpoint.
    """

    places: np.ndarray
    checkpoints: Path | None = None
    first_step: int = 0
    state_sha256: str = ""

    def to_mapping(self) -> dict[str, Any]:
        """What tells it from others, JSON-like."""
        places = hashlib.sha256(np.asarray(self.places, "<i8").tobytes()).hexdigest()
        return {"first_step": self.first_step, "places_sha256": places}

    def restore(self, like: PyTree) -> PyTree:
        """The state to start from.

        Raises:
            ValueError: it is not the one that was written.
        """
        assert self.checkpoints is not None
        with StepCheckpoints(self.checkpoints, read_only=True) as checkpoints:
            state, _ = checkpoints.restore(self.first_step, like)
        if trees.tree_sha256(state).hex() != self.state_sha256:
            msg = (
                f"The checkpoint of step {self.first_step} in {self.checkpoints} is not the one that the training "
                "wrote. Put that back, or retrain from the start."
            )
            raise ValueError(msg)
        return state


class Adam(NamedTuple):
    """The static settings of the compiled update; learning rates are arguments, so they cause no retracing."""

    b1: float
    b2: float
    eps: float
    max_grad_norm: float | None
    weight_decay: float = 0.0

    def transformation(self) -> optax.GradientTransformation:
        """Clipping, where asked for, then Adam's direction, then decoupled decay, where asked for."""
        parts: list[optax.GradientTransformation] = [optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)]
        if self.max_grad_norm is not None:
            parts.insert(0, optax.clip_by_global_norm(self.max_grad_norm))
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=_decayed))
        return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _decayed(params: LoraParams) -> LoraParams:
    return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path), params)


def adam_of(config: TrainConfig) -> Adam:
    """The part of the configuration that the update is compiled for."""
    return Adam(config.adam_b1, config.adam_b2, config.adam_eps, config.max_grad_norm, config.weight_decay)


def learning_rates(config: TrainConfig, num_steps: int) -> np.ndarray:
    """The learning rate of each step [num_steps]: linear warm-up, then a cosine towards zero.

    No step is spent at a rate of zero: the warm-up begins one increment above it, and the cosine would reach
    it one step after the last.
    """
    warmup_steps = int(config.warmup_ratio * num_steps)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=num_steps,
    )
    return np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)))


@partial(jax.jit, static_argnames=("adam", "l2"))
def adam_step(
    params: LoraParams,
    opt_state: optax.OptState,
    data_gradient: LoraParams,
    from_prior: LoraParams,
    learning_rate: Float[Array, ""],
    *,
    adam: Adam,
    l2: float,
) -> tuple[LoraParams, optax.OptState, Float[Array, ""]]:
    """One update with the gradient of the objective.

    Args:
        params: the adapter.
        opt_state: of `adam.transformation()`.
        data_gradient: batch mean of the data term's gradient.
        from_prior: `params - prior`, the gradient of the L2 term per unit of `l2`.
        learning_rate: of this step.
        adam: the transformation's settings.
        l2: lambda.

    Returns:
        The adapter, the optimiser's state, and the norm of the gradient before clipping.
    """
    gradient = trees.tree_axpy(l2, from_prior, data_gradient)
    direction, opt_state = adam.transformation().update(gradient, opt_state, params)
    return trees.tree_axpy(-learning_rate, direction, params), opt_state, trees.tree_norm(gradient)


def _identity(
    dataset: TokenDataset, config: TrainConfig, lora: LoraParams, replay: Replay | None
) -> dict[str, Any]:
    """Identifies a training: only the same one may resume from its checkpoints."""
    dropout = _dropout_of(lora)
    everything = dataset.stack_uniform(np.arange(len(dataset)), np.ones(len(dataset)), chunk_size=config.batch_size)
    numerical = {k: v for k, v in config.to_mapping().items() if k != "checkpoint_every_steps"}
    return {
        "config": numerical,
        "data_sha256": trees.tree_sha256(everything).hex(),
        "initial_adapter_sha256": trees.tree_sha256(lora).hex(),
        **({} if dataset.recipe.date is None else {"date": dataset.recipe.date}),
        **({"dropout": dropout} if dropout else {}),
        **({} if replay is None else {"replay": replay.to_mapping()}),
    }


def _dropout_of(lora: LoraParams) -> float:
    return getattr(getattr(lora, "config", None), "dropout", 0.0)


def _claim(workdir: Path, identity: dict[str, Any]) -> None:
    """Refuses a directory that holds another training, or other files.

    Raises:
        ValueError: names what differs.
        FileExistsError: names what is there.
    """
    path = workdir / IDENTITY_FILE
    if not path.exists():
        files.require_empty(workdir, but=(FEATURES_DIRECTORY,))
        files.atomic_write_json(path, identity)
        return
    found = files.read_json(path)
    expected = {**identity.pop("config"), **identity}
    stored = {**found.pop("config"), **found}
    different = [
        f"{key} ({stored.get(key)!r} there, {expected.get(key)!r} now)"
        for key in sorted(expected.keys() | stored.keys())
        if stored.get(key) != expected.get(key)
    ]
    if different:
        msg = (
            f"{workdir} holds an unfinished training that differs in {', '.join(different)}. "
            "Repeat its settings to go on, or name another directory."
        )
        raise ValueError(msg)


def finetune(
    model: Any,
    dataset: TokenDataset,
    config: TrainConfig,
    *,
    lora: LoraParams,
    workdir: str | os.PathLike[str] | None = None,
    tensorboard: bool = False,
) -> TrainResult:
    """Trains an adapter on `L(theta) = (1/n) sum_i l(z_i; theta)`, the L2 term inside each `l`.

    With a `workdir` the training can be killed at any moment, SIGKILL included: the same call goes on from
    the last checkpoint and ends with the same adapter, bit for bit (same devices, same number of threads).

    An adapter whose configuration has dropout is trained with it; the losses and gradient norms of the result are
    without, as everywhere else.

    Args:
        model: a `models.Model`, or anything with its `apply`, `base` and `mesh`.
        dataset: the training examples.
        config: hyper-parameters.
        lora: the adapter to start from.
        workdir: where checkpoints and `metrics.jsonl` go; None keeps nothing.
        tensorboard: also write TensorBoard events to `workdir/tensorboard`.

    Returns:
        The adapter, with loss and gradient norm of the objective over all training data.

    Raises:
        ValueError: the data set is empty, `workdir` holds another training, or an L2 term meets trained copies.
        FileExistsError: `workdir` holds something that is no training.
        RuntimeError: another process is training in `workdir`.
        FloatingPointError: loss or gradient is no longer finite.
    """
    if not len(dataset):
        msg = "The training set is empty; give at least one example."
        raise ValueError(msg)
    if isinstance(model, Model):
        dataset.require_vocabulary(model.vocabulary(lora))
    if tensorboard and workdir is None:
        msg = "TensorBoard output was asked for without a workdir to write it to; give a workdir."
        raise ValueError(msg)
    with contextlib.nullcontext() if workdir is None else files.exclusive_use(workdir):
        return finetune_held(model, dataset, config, lora=lora, workdir=workdir, tensorboard=tensorboard)


def finetune_held(
    model: Any,
    dataset: TokenDataset,
    config: TrainConfig,
    *,
    lora: LoraParams,
    workdir: str | os.PathLike[str] | None,
    tensorboard: bool,
    keep_checkpoints: bool = False,
    replay: Replay | None = None,
) -> TrainResult:
    """`finetune` for a caller that holds `workdir` for itself; same arguments, result and errors, and two more.

    Args:
        model: see `finetune`; so are the other arguments that are not named here.
        dataset: the training examples.
        config: hyper-parameters.
        lora: the adapter to start from.
        workdir: where checkpoints and metrics go; None keeps nothing.
        tensorboard: also write TensorBoard events.
        keep_checkpoints: keep those of the first epoch, after which every row has been seen.
        replay: the training whose steps are repeated; None is one of its own.
    """
    check_no_l2(getattr(lora, "config", None), config.l2)
    objective = losses.lm_objective(model.apply, model.base, l2=config.l2)
    lora = parallel.replicate(jax.tree.map(jnp.asarray, lora), model.mesh)
    with contextlib.ExitStack() as stack:
        checkpoints = metrics = None
        if workdir is not None:
            workdir, identity = Path(workdir), _identity(dataset, config, lora, replay)
            parallel.on_primary(partial(_claim, workdir, identity))
            keep_up_to = config.num_steps(len(dataset)) // config.epochs if keep_checkpoints else 0
            checkpoints = stack.enter_context(
                StepCheckpoints(workdir / CHECKPOINT_DIRECTORY, keep_up_to=keep_up_to)
            )
            metrics = stack.enter_context(
                MetricsLogger(
                    workdir / METRICS_FILE,
                    last_step=checkpoints.latest_step() or 0,
                    tensorboard_dir=workdir / "tensorboard" if tensorboard else None,
                )
            )
        microbatch = _microbatch(model, dataset, config, lora)
        return _train(model, objective, dataset, config, microbatch, lora, checkpoints, metrics, replay)


def _microbatch(model: Any, dataset: TokenDataset, config: TrainConfig, lora: LoraParams) -> int:
    """Examples of a forward and backward pass: as the configuration says, else what fits."""
    if config.microbatch_size is None and isinstance(model, Model) and isinstance(lora, Lora):
        shape = dataset.uniform_shape
        work = planning.workload_of(model, lora.config, shape.time, shape.response)
        return planning.auto_microbatch(work, config.batch_size) or config.examples_per_pass
    return config.examples_per_pass


def _train(
    model: Any,
    objective: Objective,
    dataset: TokenDataset,
    config: TrainConfig,
    microbatch_size: int,
    params: LoraParams,
    checkpoints: StepCheckpoints | None,
    metrics: MetricsLogger | None,
    replay: Replay | None,
) -> TrainResult:
    places = np.arange(len(dataset)) if replay is None else replay.places
    num_steps = config.num_steps(len(places))
    rates = learning_rates(config, num_steps)
    adam = adam_of(config)
    opt_state = parallel.replicate(adam.transformation().init(params), model.mesh)
    first_step, seconds_before, resumed_from = 0, 0.0, None
    dropout, step_objective = _dropout_of(params), objective
    if checkpoints is not None and (resumed_from := checkpoints.latest_step()) is not None:
        (params, opt_state), info = checkpoints.restore(resumed_from, (params, opt_state))
        first_step, seconds_before = resumed_from, info["seconds"]
        _log.info("Going on after step %d of %d.", first_step, num_steps)
    elif replay is not None and replay.first_step:
        first_step = replay.first_step
        params, opt_state = replay.restore((params, opt_state))

    start = time.perf_counter()
    steps_per_epoch = num_steps // config.epochs
    bar = progress(description="fine-tuning", total=num_steps, initial=first_step)
    unreported: tuple[int, Any, Any] | None = None

    def report() -> None:
        # One step late, so that reading a loss off the device does not keep the next step from starting.
        nonlocal unreported
        if unreported is None:
            return
        step, loss, norm = unreported[0], float(unreported[1]), float(unreported[2])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            msg = (
                f"At step {step} of {num_steps} the loss is {loss} and the gradient's norm {norm}. "
                f"Lower the learning rate ({config.learning_rate}) or set max_grad_norm."
            )
            raise FloatingPointError(msg)
        if metrics is not None:
            metrics.log(
                step,
                epoch=(step - 1) // steps_per_epoch,
                loss=loss,
                gradient_norm=norm,
                learning_rate=float(rates[step - 1]),
                seconds=seconds_before + time.perf_counter() - start,
            )
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()
        unreported = None

    with contextlib.closing(bar):
        for step in range(first_step, num_steps):
            indices = step_rows(places, step, seed=config.seed, batch_size=config.batch_size)
            if len(indices):
                stack = lay_out_mean(
                    dataset,
                    indices,
                    1.0 / len(indices),
                    batch_size=config.batch_size,
                    microbatch_size=microbatch_size,
                )
                if dropout:
                    stack = with_places(stack)
                    step_objective = dropout_objective(model.apply, model.base, step_key(config.seed, step))
                stack = parallel.place_stack(stack, model.mesh)
                loss, data_gradient = losses.loss_and_gradient_sums(step_objective, params, stack)
                params, opt_state, norm = adam_step(
                    params,
                    opt_state,
                    data_gradient,
                    objective.from_prior(params),
                    jnp.asarray(rates[step]),
                    adam=adam,
                    l2=objective.l2,
                )
                report()
                unreported = (step + 1, loss, norm)
            done = step + 1 == num_steps
            if checkpoints is not None and (done or (step + 1) % config.checkpoint_every_steps == 0):
                report()  # no checkpoint before its step was found finite and logged
                seconds = seconds_before + time.perf_counter() - start
                info: dict[str, Any] = {"seconds": seconds}
                if step + 1 <= checkpoints.keep_up_to:
                    info["sha256"] = trees.tree_sha256((params, opt_state)).hex()
                checkpoints.save(step + 1, (params, opt_state), info)
        report()
    jax.block_until_ready(params)
    seconds = seconds_before + time.perf_counter() - start
    measured = measure(
        objective,
        params,
        dataset,
        batch_size=config.batch_size,
        microbatch_size=microbatch_size,
        mesh=model.mesh,
    )
    return TrainResult(
        lora=params,
        num_steps=num_steps,
        loss=measured.loss,
        gradient_norm=measured.gradient_norm,
        data_gradient_norm=measured.data_gradient_norm,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        resumed_from=resumed_from,
        kept={}
        if checkpoints is None
        else {k: checkpoints.info(k)["sha256"] for k in checkpoints.steps() if k <= checkpoints.keep_up_to},
    )
