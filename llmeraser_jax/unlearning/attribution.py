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
from jax.sharding import Mesh

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, linearise
from llmeraser_jax.losses import Objective
from llmeraser_jax.solvers import BlockConjugateGradients, BlockSolution, describe
from llmeraser_jax.types import LoraParams, Operator
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import EditProblem, Weighted


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
    objective: Objective,
    params: LoraParams,
    problem: EditProblem,
    groups: Mapping[str, Sequence[int]],
    config: EraseConfig,
    *,
    mesh: Mesh | None = None,
) -> tuple[GroupStep, ...]:
    """The single influence step of every group, from one block solve.

    Args:
        objective: the loss that was trained.
        params: the adapter trained on the data as they stood.
        problem: the request.
        groups: by name, indices of training examples; together all that the request names, each once.
        config: curvature (one of `CURVATURES`), its data, constant damping, and the solve's steps and tolerance.
        mesh: devices; None is one.

    Raises:
        ValueError: the groups do not share out the named rows, or the configuration is not one of a single step.
    """
    if config.curvature not in CURVATURES or config.damping_kind != "constant":
        msg = (
            f"curvature is {config.curvature!r} and damping_kind {config.damping_kind!r}; attribution takes one of "
            f"{', '.join(CURVATURES)} and a constant damping."
        )
        raise ValueError(msg)
    listed = np.sort(np.concatenate([np.asarray(rows, np.int64) for rows in groups.values()] or [np.zeros(0)]))
    if not np.array_equal(listed, problem.named):
        msg = f"The groups hold rows {listed.tolist()}, the request names {problem.named.tolist()}, each once."
        raise ValueError(msg)
    evaluator = Evaluator(objective, problem, dataclasses.replace(config, method="step"), mesh)
    replacement_of = dict(zip(problem.named.tolist(), problem.replacements.tolist(), strict=True))
    parts = []
    for rows in groups.values():
        wanted = [replacement_of[int(i)] for i in rows if replacement_of[int(i)] >= 0]
        indices = np.concatenate([np.asarray(rows, np.int64), np.asarray(wanted, np.int64)])
        signs = np.concatenate([np.ones(len(rows)), -np.ones(len(wanted))])
        parts.append(evaluator.gradient(params, Weighted(indices, signs / problem.num_trained)))
    rhs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    rng = np.random.default_rng([config.seed, 1])
    weighted = problem.trained_mean(evaluator.curvature_sample, rng, without_named=evaluator.without_named)
    plain = DatasetCurvature(objective, params, evaluator.stack(weighted), CURVATURES[config.curvature])
    operator = Damped(linearise(plain, config.memory_budget_bytes), config.damping)
    solver = BlockConjugateGradients(rtol=config.cg_rtol, max_steps=config.cg_max_steps)
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
