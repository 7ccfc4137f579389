"""Conjugate gradients over data that stay on the host, one product at a time, resumable after a kill.

Owns the operator whose products run over batches that an iterator yields, and the loop that saves the
recurrence every few products, so that a solve of hours does not start again from nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llmeraser_jax import files, trees
from llmeraser_jax.checkpoint import StepCheckpoints
from llmeraser_jax.parallel import on_primary
from llmeraser_jax.solvers import common
from llmeraser_jax.solvers.cg import CGState, ConjugateGradients, python_while_loop
from llmeraser_jax.types import Batch, LoraParams, Operator, Preconditioner, Solution

FINGERPRINT_FILE = "solve.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedOperator:
    """`sum over batches of product(batch, v) + shift * v`, with one batch in memory at a time.

    `mv` is a Python function: this operator is for `solve_streamed` and for solvers with `python_while_loop`,
    not for jit.

    Attributes:
        batches: called once for each product; yields the same batches in the same order every time, or the
            operator is not one linear map and the recurrence is not valid.
        product: `(batch, v) -> vector of adapter space`, linear and symmetric in `v`, already weighted; jitted by
            the caller, so that one compilation serves all products.
        shift: L2 term and damping together.
        positive_semidefinite: declared, not measured.
    """

    batches: Callable[[], Iterable[Batch]]
    product: Callable[[Batch, LoraParams], LoraParams]
    shift: float = 0.0
    positive_semidefinite: bool = False

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`, summed in at least float32; leaves have the dtypes of `v`."""
        total = jax.tree.map(lambda x: (self.shift * x).astype(jnp.promote_types(x.dtype, jnp.float32)), v)
        for batch in self.batches():
            total = _accumulate(total, self.product(batch, v))
        return jax.tree.map(lambda t, x: t.astype(x.dtype), total, v)


@jax.jit
def _accumulate(total: LoraParams, term: LoraParams) -> LoraParams:
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, term)


def _fingerprint(
    solver: ConjugateGradients, rhs: LoraParams, preconditioner: Preconditioner | None, description: str
) -> dict[str, Any]:
    # Of the hyper-parameters, those that change the iterates or the shape of the state.
    return {
        "right-hand side": trees.tree_sha256(rhs).hex(),
        "rtol": repr(float(solver.rtol)),
        "max_steps": solver.max_steps,
        "radius": repr(float(solver.radius)),  # text, because JSON has no infinity
        "preconditioner": "none" if preconditioner is None else trees.tree_sha256(preconditioner).hex(),
        "description": description,
    }


def _claim(directory: Path, fingerprint: dict[str, Any]) -> None:
    """Marks the directory as that of this solve, or refuses it as another's."""
    path = directory / FINGERPRINT_FILE
    if not path.exists():
        if any(not entry.name.startswith(".") for entry in directory.iterdir()):
            msg = (
                f"{directory} holds files but no {FINGERPRINT_FILE}, so it is not the directory of a streamed "
                f"solve. Name a new directory or empty this one."
            )
            raise ValueError(msg)
        files.atomic_write_json(path, fingerprint)
        return
    stored = files.read_json(path)
    problems = [f"{k} was {stored.get(k)!r}, is {v!r}" for k, v in fingerprint.items() if stored.get(k) != v]
    if problems:
        msg = (
            f"The solve saved in {directory} is another one: {'; '.join(problems)}. "
            f"Give this solve a directory of its own, or remove that one to start again."
        )
        raise ValueError(msg)


def solve_streamed(
    solver: ConjugateGradients,
    operator: Operator,
    rhs: LoraParams,
    *,
    checkpoint_directory: str | os.PathLike[str],
    every: int = 5,
    preconditioner: Preconditioner | None = None,
    description: str = "",
) -> Solution:
    """`solver.solve` as a Python loop that saves its state, and goes on from the state it finds saved.

    A resumed solve makes bit for bit the iterates of one that was never interrupted, where the products do.
    The last state stays in the directory: calling again costs a product or two, not the solve.

    Args:
        solver: hyper-parameters; its `while_loop` is not used.
        operator: its `mv` may be any Python function, such as a `StreamedOperator`'s.
        rhs: a vector of adapter space, float32 or wider.
        checkpoint_directory: of this solve alone; made if it is not there.
        every: save after so many products.
        preconditioner: as in `ConjugateGradients.solve`; a pytree.
        description: whatever identifies the operator (data, curvature, damping, weights), since a function cannot
            be hashed. A saved state of another description is refused.

    Returns:
        The solution.

    Raises:
        ValueError: the directory holds the state of another solve; every difference is named.
    """
    if every < 1:
        msg = f"every is {every}; it must be at least 1."
        raise ValueError(msg)
    unit_rhs, unit = common.to_units(rhs)
    radius = solver.unit_radius(None, unit)
    start = jax.jit(solver.init)(unit_rhs, preconditioner)
    rhs_sq = start.residual_sq
    bounded = not isinstance(radius, float)

    @jax.jit
    def advance(state, product, rhs_sq, preconditioner, radius):
        return solver.advance(state, product, rhs_sq, preconditioner, radius if bounded else solver.radius)

    directory = Path(checkpoint_directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.exclusive_use(directory))
        fingerprint = _fingerprint(solver, rhs, preconditioner, description)
        on_primary(lambda: _claim(directory, fingerprint))
        checkpoints = stack.enter_context(StepCheckpoints(directory / "states"))
        saved = checkpoints.latest_step()
        if saved is not None:
            start, _ = checkpoints.restore(saved, start)

        def save(state: CGState) -> None:
            nonlocal saved
            step = int(state.num_steps)
            if step != saved and step > 0:
                checkpoints.save(step, state, {})
                saved = step

        def body(state: CGState) -> CGState:
            state = advance(state, operator.mv(state.direction), rhs_sq, preconditioner, radius)
            if int(state.num_steps) % every == 0:
                save(state)
            return state

        state = python_while_loop(lambda s: s.running, body, start)
        save(state)
    return solver.finish(operator, unit_rhs, unit, rhs_sq, state)
