"""Exact unlearning from a checkpoint: the training goes on as if it had never seen the forgotten rows.

A training that kept its checkpoints (`finetune --keep-checkpoints`) is repeated from the last one before the first
step that takes a forgotten or changed row. Which step that is follows from the seed: the order of every epoch is a
pure function of seed and epoch. From there every step takes the rows that it took in the training, in their order
and at its learning rate, with the forgotten ones left out and the changed ones in their new form (`Replay`).

The steps before the checkpoint take none of these rows, so the result is that of the same training on the edited
data from its start, bit for bit, on the same devices and number of threads. It is one draw of what retraining
gives: that of the run's own seed, with the order of the rows that are left as it was.

Every row is seen in the first epoch, so a replay saves at most one epoch of the training, and on average half of
one for a single row; checkpoints after the first epoch serve nobody and are not kept. On the demo's 120 rows,
trained with `finetune --keep-checkpoints --checkpoint-every-steps 1 --epochs 3 --batch-size 16`, forgetting the row
in the middle of the first epoch's order takes 309 gradient equivalents with `retrain --replay` and 357 with
`--seeds 1`: 13 % less. Of 16 rows drawn at random one is nearly always in the first steps: 0.4 % less on average.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmeraser_jax import data
from llmeraser_jax.data import BucketShape, Request, TokenDataset
from llmeraser_jax.models import Model
from llmeraser_jax.runs import Run, RunError
from llmeraser_jax.training.batches import step_indices
from llmeraser_jax.training.finetune import CHECKPOINT_DIRECTORY, Replay
from llmeraser_jax.training.job import train_run

_log = logging.getLogger(__name__)


def run_with_checkpoints(run: Run) -> Run | None:
    """The run itself, or the one that it was derived from in any number of erasures, that kept checkpoints.

    Returns:
        None where there is none, or where it is not at hand as it was; the log says why.
    """
    while not run.result.get("checkpoints"):
        derived = run.kind == "erase" or "replayed_from_step" in run.result
        if not derived or run.parent is None:
            return None
        try:
            run = run.load_parent()
        except (RunError, FileNotFoundError) as error:
            _log.warning("No replay from checkpoints: %s", error)
            return None
    if not run.can_hash:
        _log.warning("No replay from checkpoints: without %s's key nobody knows which rows changed.", run.path)
        return None
    return run


def plan_replay(trained: Run, dataset: TokenDataset) -> Replay:
    """From which checkpoint to go on, and what is in the places of the training's data.

    Args:
        trained: the run that kept checkpoints.
        dataset: the edited data, encoded in the shape of the training.

    Raises:
        RunError: a row that the training did not have.
    """
    held = trained.token_hashes or ("",) * len(trained.data_ids)
    ids = [id_ for id_, tokens in zip(trained.data_ids, held, strict=True) if tokens is not None]
    row_of = {id_: row for row, id_ in enumerate(dataset.ids)}
    new = sorted(row_of.keys() - set(ids))
    if new:
        msg = f"{trained.path} was not trained on {len(new)} of the rows to replay with, as {new[0]!r}; retrain."
        raise RunError(msg)
    hash_of = dict(zip(trained.data_ids, trained.data_hashes, strict=True))
    places = np.array([row_of.get(id_, -1) for id_ in ids], np.int64)
    same = {e.id for e in dataset.examples if trained.content_hash(e) == hash_of[e.id]}
    changed = np.array([id_ not in same for id_ in ids])
    config = trained.train_config
    first_seen = next(
        (
            step
            for step in range(config.num_steps(len(ids)) // config.epochs)
            if changed[
                step_indices(step, seed=config.seed, num_examples=len(ids), batch_size=config.batch_size)
            ].any()
        ),
        config.num_steps(len(ids)),
    )
    kept = {int(step): sha256 for step, sha256 in trained.result["checkpoints"].items()}
    shape = BucketShape(**trained.result["shape"])
    usable = [step for step in kept if step <= first_seen]
    if dataset.uniform_shape != shape:
        _log.warning("A changed row is longer than all rows of the training; the replay begins at its start.")
        usable = []
    step = max(usable, default=0)
    _log.info("The first step that takes a forgotten row is %d; going on after step %d.", first_seen + 1, step)
    return Replay(
        places=places,
        checkpoints=trained.path / CHECKPOINT_DIRECTORY,
        first_step=step,
        state_sha256=kept.get(step, ""),
    )


def replay(
    run: Run,
    requests: Sequence[Request],
    workdir: str | os.PathLike[str],
    *,
    model: Model | None = None,
    data_path: str | os.PathLike[str] | None = None,
) -> Run:
    """Makes `workdir` a run directory of the training without the forgotten rows, from the last checkpoint before.

    Called again after a kill it goes on where it was.

    Args:
        run: a run that kept checkpoints, or one derived from it by erasures: then without their rows either.
        requests: what to edit in the data of `run`.
        workdir: new, empty, or left by an interrupted call.
        model: the base model where it is loaded already.
        data_path: where the run's training data is now; None is where it was.

    Returns:
        The finished run; its `result` has `replayed_from_step`, and `gradient_equivalents` of what was computed.

    Raises:
        RunError: no checkpoints are at hand, or the data or model is not the run's.
        ValueError: requests that leave nothing, or a checkpoint that is not the one that was written.
    """
    trained = run_with_checkpoints(run)
    if trained is None:
        msg = (
            f"{run.path} has no checkpoints to replay from; train with keep_checkpoints, or retrain from the start."
        )
        raise RunError(msg)
    edited = data.apply_requests(run.load_examples(data_path), requests)
    if not edited:
        msg = "The requests remove every example; there is nothing left to train on."
        raise ValueError(msg)
    model = run.load_or_verify_model(model)
    dataset = run.encode(edited, model.tokenizer, buckets=[BucketShape(**trained.result["shape"])])
    initial = trained.load_initial_adapter(model)
    assert initial is not None  # of a training of our own
    return train_run(
        model,
        dataset,
        Path(workdir),
        kind="retrain",
        examples=edited,
        data_path=None,
        config=trained.train_config,
        initial_lora=initial,
        parent=run.reference(),
        replay=plan_replay(trained, dataset),
    )
