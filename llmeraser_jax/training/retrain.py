"""Exact unlearning by retraining: the oracle that every method is compared with."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from llmeraser_jax import data
from llmeraser_jax.data import Request
from llmeraser_jax.models import Model
from llmeraser_jax.runs import Run, RunError, TrainConfig
from llmeraser_jax.training.job import train_run

_log = logging.getLogger(__name__)


def retrain(
    run: Run,
    requests: Sequence[Request],
    workdir: str | os.PathLike[str],
    *,
    seeds: int | Sequence[int] = 3,
    model: Model | None = None,
    data_path: str | os.PathLike[str] | None = None,
    config: TrainConfig | None = None,
    drop_dropout: bool = False,
    tensorboard: bool = False,
) -> tuple[Run, ...]:
    """Trains again on the edited data with the run's recipe, once per seed, in `workdir/seed_<seed>`.

    Every retraining starts from the initial adapter of the run where that is known, and otherwise from one
    drawn from its own seed. Epochs stay, steps follow from the number of examples left. Called again, it goes
    on where it was and skips the seeds that are finished.

    Args:
        run: the run whose training is repeated.
        requests: what to edit in its data; may be empty, to measure how far seeds alone move the model.
        workdir: the directory of the retrained runs.
        seeds: how many, or which; all must differ from each other and from the run's own.
        model: the run's base model where it is loaded already.
        data_path: where the run's training data is now; None is where it was.
        config: what to train with where the run's own configuration is not wholly known (adopted adapters);
            its epochs and l2 must be the run's. None is the run's own.
        drop_dropout: retrain without dropout an adapter that was trained with it.
        tensorboard: also write TensorBoard events.

    Returns:
        One finished run per seed, whose `result` has `seconds` and `gradient_equivalents`, epochs times the
        number of examples left.

    Raises:
        RunError: the data or model is not the run's, or what a retraining needs is not known.
        ValueError: invalid seeds, or requests that do not fit the data.
    """
    config = retraining_config(run, config)
    own = None if "seed" in run.unstated else run.train_config.seed
    chosen = choose_seeds(seeds, own=own, of=str(run.path))
    lora_config = run.lora_config
    if lora_config.dropout and drop_dropout:
        _log.warning("The adapter was trained with dropout %g; retraining goes without.", lora_config.dropout)
        lora_config = dataclasses.replace(lora_config, dropout=0.0)
    edited = data.apply_requests(run.load_examples(data_path), requests)
    if not edited:
        msg = "The requests remove every example; there is nothing left to retrain on."
        raise ValueError(msg)
    model = run.load_or_verify_model(model)
    dataset = run.encode(edited, model.tokenizer)
    initial = run.load_initial_adapter(model)
    retrained = []
    for position, seed in enumerate(chosen, start=1):
        _log.info("Retraining %d of %d (seed %d) on %d examples.", position, len(chosen), seed, len(edited))
        retrained.append(
            train_run(
                model,
                dataset,
                Path(workdir) / f"seed_{seed}",
                kind="retrain",
                examples=edited,
                data_path=None,
                config=dataclasses.replace(config, seed=seed),
                initial_lora=initial or model.init_lora(jax.random.key(seed), lora_config),
                parent=run.reference(),
                tensorboard=tensorboard,
            )
        )
    return tuple(retrained)


def retraining_config(run: Run, config: TrainConfig | None = None) -> TrainConfig:
    """What a run is retrained with: its own configuration, or the one given, which has to agree with it.

    Raises:
        RunError: what a retraining needs is not known, or does not agree.
    """
    if config is None:
        needed = [name for name in run.unstated if name != "seed"]
        if needed:
            msg = (
                f"The recipe of {run.path} does not state {' and '.join(needed)}, which a retraining needs. "
                "Adopt the adapter with a recipe that states them, or pass a configuration."
            )
            raise RunError(msg)
        return run.train_config
    for name in ("epochs", "l2"):
        if getattr(config, name) != getattr(run.train_config, name):
            msg = (
                f"{name} is {getattr(config, name)} in the configuration given and "
                f"{getattr(run.train_config, name)} in {run.path}; a retraining repeats it."
            )
            raise RunError(msg)
    return config


def choose_seeds(seeds: int | Sequence[int], *, own: int | None, of: str) -> tuple[int, ...]:
    """The seeds of retrainings: those given, or so many that follow the model's own.

    Args:
        seeds: how many, or which.
        own: the seed of the model being edited; None where it is not known.
        of: what error messages call that model.

    Raises:
        ValueError: none, some twice, or `own` among them.
    """
    if isinstance(seeds, int):
        if seeds < 1:
            msg = f"{seeds} retrainings were asked for; ask for at least 1."
            raise ValueError(msg)
        start = 0 if own is None else own + 1
        return tuple((start + k) % 2**32 for k in range(seeds))
    chosen = tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        msg = f"seeds are {list(chosen)}; name at least one, and each once."
        raise ValueError(msg)
    if own in chosen:
        msg = (
            f"seeds are {list(chosen)}, and {own} is the seed of {of} itself: a retraining in the order "
            "of the model being edited understates how far retrained models lie apart. Name another."
        )
        raise ValueError(msg)
    return chosen
