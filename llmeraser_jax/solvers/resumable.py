"""Conjugate gradients as a Python loop that saves its state every few products and resumes after a kill.

For operators whose products take long or cannot be traced, such as those over data on the host
(`curvature.streamed_operator`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from llmeraser_jax import files, trees
from llmeraser_jax.checkpoint import StepCheckpoints
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.parallel import on_primary
from llmeraser_jax.solvers import common
from llmeraser_jax.solvers.cg import CGState, ConjugateGradients, python_while_loop
from llmeraser_jax.types import LoraParams, Operator, Preconditioner, Solution

FINGERPRINT_FILE = "solve.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumable:
    """The solver: `solver` as a Python loop that saves its state, and goes on from a saved state that it finds.

    A resumed solve makes bit for bit the iterates of an uninterrupted one, where the products do. The last state
    stays in the directory: solving again costs one product.

    Attributes:
        solver: hyper-parameters; its `while_loop` is not used.
        directory: of this solve alone; made if it does not exist.
        every: products between two saves.
        description: identifies the operator (data, curvature, damping, weights), since a function cannot be hashed.
            A saved state of another description is refused.
    """

    solver: ConjugateGradients
    directory: str | os.PathLike[str]
    every: int = 5
    description: str = ""

    def __post_init__(self) -> None:
        check_at_least(self, every=1)

    def solve(self, operator: Operator, rhs: LoraParams, preconditioner: Preconditioner | None = None) -> Solution:
        """Solves `A x = rhs` from x = 0, or from the saved state.

        Args:
            operator: its `mv` may be any Python function.
            rhs: a vector of adapter space, float32 or wider.
            preconditioner: as in `ConjugateGradients.solve`; a pytree.

        Returns:
            The solution. `num_products` counts those of earlier runs up to the state that was resumed from.

        Raises:
            ValueError: the directory holds the state of another solve; every difference is named.
        """
        solver = self.solver
        unit_rhs, unit = common.to_units(rhs)
        start = jax.jit(solver.init)(unit_rhs, preconditioner)
        rhs_sq = start.residual_sq
        advance = jax.jit(solver.advance)

        directory = Path(self.directory).absolute()
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.exclusive_use(directory))
            fingerprint = self._fingerprint(rhs, preconditioner)
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
                state = advance(state, operator.mv(state.direction), rhs_sq, preconditioner)
                if int(state.num_steps) % self.every == 0:
                    save(state)
                return state

            state = python_while_loop(lambda s: s.running, body, start)
            save(state)
        return solver.finish(operator, unit_rhs, unit, rhs_sq, state)

    def _fingerprint(self, rhs: LoraParams, preconditioner: Preconditioner | None) -> dict[str, Any]:
        # Of the hyper-parameters, those that change the iterates or the shape of the state.
        return {
            "right-hand side": trees.tree_sha256(rhs).hex(),
            "rtol": repr(float(self.solver.rtol)),
            "max_steps": self.solver.max_steps,
            "preconditioner": "none" if preconditioner is None else trees.tree_sha256(preconditioner).hex(),
            "description": self.description,
        }


def _claim(directory: Path, fingerprint: dict[str, Any]) -> None:
    """Records which solve the directory belongs to, or refuses it as another's."""
    path = directory / FINGERPRINT_FILE
    if not path.exists():
        if any(not entry.name.startswith(".") for entry in directory.iterdir()):
            msg = (
                f"{directory} holds files but no {FINGERPRINT_FILE}, so it is not the directory of a resumable "
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
