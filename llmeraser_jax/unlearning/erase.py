"""`erase`: a task and a method, to new parameters and their receipt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from llmeraser_jax import planning, tracking
from llmeraser_jax.curvature.row_sets import ROW_MEMORY_BYTES
from llmeraser_jax.models import Model
from llmeraser_jax.unlearning.auto import Auto
from llmeraser_jax.unlearning.budget import Budget
from llmeraser_jax.unlearning.known_rows import KnownRows
from llmeraser_jax.unlearning.result import Method, Result
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import Workspace

_AUTO = Auto()


def erase(
    task: UnlearningTask,
    method: Method = _AUTO,
    budget: float | None = None,
    *,
    seed: int = 0,
    chunk_size: int | Literal["auto"] = "auto",
    directory: Path | None = None,
    audit: bool = False,
    known: KnownRows | None = None,
    on_step: Callable[[Any], None] = lambda record: None,
    progress: bool | None = None,
) -> Result:
    """Makes the adapter forget, or remember differently, what the task's requests name.

    The parameter change is that of influence functions (LLMEraser: Ding et al., arXiv 2412.00383):
    `(C + rho I)^-1 (1/n) sum_S (g - g')`, in one step as they take it, along the influence path, or with
    coefficients that end every row at its target. The L2 term belongs to each example, so a removal drops its
    share.

    Args:
        task: what is to be forgotten. Without calibration rows (or `target_loss`) removals go along the path, and
            whether removed rows have arrived is not judged.
        method: how; any `Method`.
        budget: at most this share of a retraining's gradient equivalents; None is 1 where the cost of a
            retraining is known, `inf` lifts the limit. Steps are planned to fit, and every cost is asked for
            before it is spent: what was reached by then is the result, and the receipt says that it is partial.
        seed: of every sample drawn.
        chunk_size: examples per micro-batch; memory grows with it, results do not change. auto is 16 on CPUs, and
            what fits a language model on accelerators.
        directory: where streamed solves keep their state.
        audit: report gradient norms of all examples instead of a sample.
        known: losses under the adapter as trained, of an earlier request; gets those that are computed.
        on_step: called after every accepted step.
        progress: show a progress bar; None is on a terminal and in a notebook.

    Returns:
        The new parameters, their cost and the receipt. The change is zero where target matching finds every row
        where retraining would be expected to leave it; the receipt says so.

    Raises:
        UnlearningError: no usable step was found; there is no result.
        ValueError: a replacement that cannot be encoded, or a row whose loss is not finite.
    """
    with tracking.progress(description="erasing the forget rows", total=100, shown=progress) as bar:

        def moved(record: Any) -> None:
            bar.update(round(100 * record.progress) - bar.n)
            on_step(record)

        workspace = Workspace(
            budget=Budget.of_share(budget, task.cost_of_retraining),
            mesh=task.mesh,
            chunk_size=_chunk_size(task) if chunk_size == "auto" else chunk_size,
            seed=seed,
            directory=directory,
            audit=audit,
            on_step=moved,
            known=known,
        )
        return method.run(task, workspace)


def _chunk_size(task: UnlearningTask) -> int:
    if not isinstance(task.model, Model):
        return planning.CHUNK_SIZE
    shape = task.dataset.uniform_shape
    work = planning.workload_of(task.model, task.adapter.config, shape.time, shape.response)
    return planning.auto_chunk_size(work, ROW_MEMORY_BYTES)
