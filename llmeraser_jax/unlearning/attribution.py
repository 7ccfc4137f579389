"""Who moved the adapter: the single step of a request, split by groups of its rows, in one block solve.

The influence step is linear in its right-hand side, so the steps of several groups (one per user, or one per
request that arrived) add up to the step of all. They share every primal pass and one Krylov space (`block-cg`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, linearise
from llmeraser_jax.solvers import BlockConjugateGradients, BlockSolution, describe
from llmeraser_jax.types import LoraParams, Operator
from llmeraser_jax.unlearning.inverse import DEFAULT_SAMPLE, CurvatureSpec
from llmeraser_jax.unlearning.problem import Weighted
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import Workspace

_SPEC = CurvatureSpec()
_SOLVER = BlockConjugateGradients(rtol=0.05, max_steps=15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupStep:
    """One group's part of the step.

    Attributes:
        name: of the group.
        num_rows: named rows in it.
        delta: `(C + rho I)^-1 b_group`.
        delta_norm: its Euclidean norm.
        share: `<delta, total> / ||total||^2`: its part of the whole step, which sum to 1.
        status: how its solve ended, in words.
        relative_residual: true residual over its right-hand side's norm.
    """

    name: str
    num_rows: int
    delta: LoraParams
    delta_norm: float
    share: float
    status: str
    relative_residual: float


@partial(jax.jit, static_argnames="solver")
def _solve(solver: BlockConjugateGradients, operator: Operator, rhs: LoraParams) -> BlockSolution:
    return solver.solve(operator, rhs)


def attribute(
    task: UnlearningTask,
    groups: Mapping[str, Sequence[int]],
    *,
    curvature: CurvatureSpec = _SPEC,
    solver: BlockConjugateGradients = _SOLVER,
    workspace: Workspace | None = None,
) -> tuple[GroupStep, ...]:
    """The single influence step of every group, from one block solve.

    Args:
        task: the request.
        groups: by name, indices of training examples; together all that the request names, each once.
        curvature: one kind with a constant damping, matmul precision float32 and no stream.
        solver: of the block system.
        workspace: where to compute.

    Raises:
        ValueError: the groups do not share out the named rows, or the curvature is not one of a block solve.
    """
    problem, objective, params = task.problem, task.objective, task.adapter
    workspace = Workspace(mesh=task.mesh) if workspace is None else workspace
    if (
        curvature.kind == "auto"
        or curvature.damping_kind != "constant"
        or curvature.matmul_precision != "float32"
        or curvature.stream
    ):
        msg = (
            f"kind is {curvature.kind!r}, damping_kind {curvature.damping_kind!r}, matmul_precision "
            f"{curvature.matmul_precision!r}, stream {curvature.stream}; attribution takes one of "
            f"{', '.join(CURVATURES)}, a constant damping, 'float32' and no stream."
        )
        raise ValueError(msg)
    listed = np.sort(np.concatenate([np.asarray(rows, np.int64) for rows in groups.values()] or [np.zeros(0)]))
    if not np.array_equal(listed, problem.named):
        msg = f"The groups hold rows {listed.tolist()}, the request names {problem.named.tolist()}, each once."
        raise ValueError(msg)
    replacement_of = dict(zip(problem.named.tolist(), problem.replacements.tolist(), strict=True))
    parts = []
    for rows in groups.values():
        wanted = [replacement_of[int(i)] for i in rows if replacement_of[int(i)] >= 0]
        indices = np.concatenate([np.asarray(rows, np.int64), np.asarray(wanted, np.int64)])
        signs = np.concatenate([np.ones(len(rows)), -np.ones(len(wanted))])
        weighted = Weighted(indices, signs / problem.num_trained)
        parts.append(workspace.gradient(objective, params, problem.examples, weighted))
    rhs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    size = None
    if curvature.data == "sample":
        size = DEFAULT_SAMPLE if curvature.sample_size is None else curvature.sample_size
    weighted = problem.trained_mean(size, workspace.rng(1), without_named=curvature.without_forget_rows)
    stack = workspace.stack(problem.examples, weighted)
    plain = DatasetCurvature(objective, params, stack, CURVATURES[curvature.kind])
    operator = Damped(linearise(plain, curvature.memory_budget_bytes), curvature.damping)
    solution = _solve(solver, operator, rhs)
    total = jax.tree.map(lambda x: x.sum(0), solution.value)
    total_sq = float(trees.tree_vdot(total, total))
    steps = []
    for place, (name, rows) in enumerate(groups.items()):
        delta = jax.tree.map(lambda x, place=place: x[place], solution.value)
        steps.append(
            GroupStep(
                name=name,
                num_rows=len(rows),
                delta=delta,
                delta_norm=float(trees.tree_norm(delta)),
                share=float(trees.tree_vdot(delta, total)) / total_sq if total_sq > 0 else float("nan"),
                status=describe(int(solution.status[place])),
                relative_residual=float(solution.relative_residual[place]),
            )
        )
    return tuple(steps)
