"""Fine-tuning from files to a run directory, for `llmeraser finetune` and every retraining."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llmeraser_jax import data, files
from llmeraser_jax.data import Example, Recipe, TokenDataset
from llmeraser_jax.lora import Lora, LoraConfig
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import from_primary, mirrored, on_primary
from llmeraser_jax.runs import (
    FEATURES_DIRECTORY,
    RUN_FILE,
    Run,
    RunError,
    TrainConfig,
    base_dtype,
    differing_settings,
    load_run,
    model_fingerprint,
    run_settings,
    write_run,
)
from llmeraser_jax.training.batches import step_rows
from llmeraser_jax.training.finetune import (
    CHECKPOINT_DIRECTORY,
    IDENTITY_FILE,
    Replay,
    TrainResult,
    finetune_held,
)

_log = logging.getLogger(__name__)


def finetune_run(
    model: Model,
    data_path: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    lora: LoraConfig | None = None,
    config: TrainConfig | None = None,
    tensorboard: bool = False,
    keep_checkpoints: bool = False,
) -> Run:
    """Fine-tunes an adapter on a data file and makes `workdir` a run directory.

    The initial adapter is drawn from `config.seed`. Killed at any moment and called again it goes on; called
    once more after the end it does nothing.

    Args:
        model: the base model.
        data_path: the training examples, see `data.load_examples`.
        workdir: new, empty, or left by an interrupted call with the same settings.
        recipe: how examples become tokens; None is the defaults.
        lora: the adapter's shape and scale; None is the defaults.
        config: how it is trained; None is the defaults.
        tensorboard: also write TensorBoard events.
        keep_checkpoints: keep those of the first epoch, one every `config.checkpoint_every_steps`, so that
            `training.replay` can go on from before a row was seen.

    Returns:
        The finished run.

    Raises:
        RunError: `workdir` is a run with other settings.
        ValueError: unusable data or settings, see `data.encode_examples` and `training.finetune`.
    """
    lora, config = lora or LoraConfig(), config or TrainConfig()
    examples = data.load_examples(mirrored(data_path))
    recipe = recipe or Recipe()
    if recipe.date is None:
        recipe = dataclasses.replace(recipe, date=from_primary(lambda: _date_of(Path(workdir))))
    return train_run(
        model,
        data.encode_examples(
            examples, recipe, model.tokenizer, features_directory=Path(workdir) / FEATURES_DIRECTORY
        ),
        workdir,
        kind="finetune",
        examples=examples,
        data_path=data_path,
        config=config,
        initial_lora=model.init_lora(jax.random.key(config.seed), lora),
        tensorboard=tensorboard,
        keep_checkpoints=keep_checkpoints,
    )


def train_run(
    model: Model,
    dataset: TokenDataset,
    workdir: str | os.PathLike[str],
    *,
    kind: str,
    examples: Sequence[Example],
    data_path: str | os.PathLike[str] | None,
    config: TrainConfig,
    initial_lora: Lora,
    parent: Mapping[str, str] | None = None,
    tensorboard: bool = False,
    keep_checkpoints: bool = False,
    replay: Replay | None = None,
) -> Run:
    """Trains in `workdir` and makes it a run directory; resumes, or does nothing if it is finished.

    Args:
        model: the base model.
        dataset: `examples`, encoded.
        workdir: new, empty, or left by an interrupted call with the same settings.
        kind: see `runs.KINDS`.
        examples: the training examples.
        data_path: the file they are in; None stores them in the run directory.
        config: how the adapter is trained.
        initial_lora: the adapter to start from.
        parent: the run that this one is derived from.
        tensorboard: also write TensorBoard events.
        keep_checkpoints: see `finetune_run`.
        replay: the training whose steps are repeated; None is one of its own.

    Raises:
        RunError: `workdir` is a run with other settings.
        ValueError: see `training.finetune`.
    """
    workdir = Path(workdir)
    with files.exclusive_use(workdir):
        if from_primary((workdir / RUN_FILE).exists):
            run = load_run(workdir)
            wanted = run_settings(
                kind=kind,
                model_sha256=model_fingerprint(model.path),
                model_dtype=base_dtype(model),
                model_quantization=model.quantization,
                matmul_precision=model.config.matmul_precision,
                recipe=dataset.recipe,
                lora_config=initial_lora.config,
                train_config=config,
                data_ids=[example.id for example in examples],
                data_hashes=[run.content_hash(example) for example in examples],
                parent=parent,
            )
            differing = differing_settings(run.settings(), wanted)
            if differing:
                msg = f"{workdir} is a finished run that differs in {', '.join(differing)}. Name another directory."
                raise RunError(msg)
            _log.info("%s is finished already, with the same settings; nothing is done.", workdir)
        else:
            result = finetune_held(
                model,
                dataset,
                config,
                lora=initial_lora,
                workdir=workdir,
                tensorboard=tensorboard,
                keep_checkpoints=keep_checkpoints,
                replay=replay,
            )
            on_primary(
                lambda: write_run(
                    workdir,
                    kind=kind,
                    model=model,
                    recipe=dataset.recipe,
                    normalizer=dataset.normalizer,
                    train_config=config,
                    examples=examples,
                    data_path=data_path,
                    lora=result.lora,
                    initial_lora=initial_lora,
                    result={
                        **result.summary(),
                        "num_truncated": dataset.num_truncated,
                        "num_dropped": len(dataset.dropped_ids),
                        "gradient_equivalents": float(_num_rows_seen(config, dataset, replay)),
                        **_kept(result, dataset),
                        **({} if replay is None else {"replayed_from_step": replay.first_step}),
                    },
                    parent=parent,
                    dataset=dataset,
                )
            )
            run = load_run(workdir)
        on_primary(lambda: _tidy(run))
    return run


def _date_of(workdir: Path) -> str | None:
    """The current date that the chat template wrote when the training in `workdir` began; None without one."""
    if (workdir / RUN_FILE).exists():
        return load_run(workdir).recipe.date
    if (workdir / IDENTITY_FILE).exists():
        return files.read_json(workdir / IDENTITY_FILE).get("date")
    return None


def _num_rows_seen(config: TrainConfig, dataset: TokenDataset, replay: Replay | None) -> int:
    """Forward and backward passes of single examples, over all steps that were computed."""
    if replay is None:
        return config.epochs * len(dataset)
    steps = range(replay.first_step, config.num_steps(len(replay.places)))
    return sum(
        len(step_rows(replay.places, step, seed=config.seed, batch_size=config.batch_size)) for step in steps
    )


def _kept(result: TrainResult, dataset: TokenDataset) -> dict[str, Any]:
    """Of the record, what a replay needs: the checkpoints, and the shape that their steps were computed in."""
    if not result.kept:
        return {}
    shape = dataset.uniform_shape
    return {
        "checkpoints": {str(step): sha256 for step, sha256 in result.kept.items()},
        "shape": {"time": shape.time, "response": shape.response},
    }


def _tidy(run: Run) -> None:
    """Removes the files that only an unfinished training needs."""
    kept = run.result.get("checkpoints", {})
    if kept:
        for entry in (run.path / CHECKPOINT_DIRECTORY).iterdir():
            if entry.name.isdigit() and entry.name not in kept:
                shutil.rmtree(entry)
    else:
        shutil.rmtree(run.path / CHECKPOINT_DIRECTORY, ignore_errors=True)
    (run.path / IDENTITY_FILE).unlink(missing_ok=True)
