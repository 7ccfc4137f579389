"""Newton's step with stored curvature: K-FADE and WIN-U. Both use EK-FAC, and need an objective with roots.

**K-FADE** (McKinney et al. 2026, *Gauss-Newton Unlearning for the LLM Era*, arXiv 2602.10568): a few Gauss-Newton
steps uphill on S, each of which changes the predictions on retained rows as little as possible. Of the paper its
abstract and introduction were at hand; how a step's length is set, and that the factors are made once, are this
package's reading: each step solves

    max_d b'd   with   1/2 d'(G_R + mu I) d = kl,   b = (1/n) sum_S (g - g'),

G_R the mean over retained rows: so `kl` is what the curvature predicts for their mean KL, in nats per token, and

    d = sqrt(2 kl / b'v) v,   v = (G_R + mu I)^-1 b

with b computed anew at each step, and the factors once, from a sample. What differs besides: edits; an adapter's
matrices and not the model's; gradients of the cross entropy, the L2 term included. An update can be applied again
after further training, as in the paper: `lora.add_delta(further, result.delta)`, at no cost.

**WIN-U** (Zhao et al. 2026, arXiv 2604.13438): one Newton step on what is left, from curvature of all the data
that was stored at the end of training, and S alone: no retained row is read. With A the stored curvature and U the
rows of the named examples' Gauss-Newton matrices, the curvature of what is left is `A - U'U`, inverted by
Woodbury's identity. Of this paper too the rest is this package's reading. A is EK-FAC's here, whose making counts
as preparation; where it is exact (one matrix, one output), the step is Newton's. What differs: edits, whose
replacements' rows are added; U are random roots, `num_roots` for each example; and since EK-FAC does not couple
matrices, and A - U'U need not be positive definite, mu is doubled until the largest eigenvalue of `U A^-1 U'` is
at most `max_leverage`.
"""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.curvature import EkFac, factored_curvature
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.parallel import replicate, to_host
from llmeraser_jax.rivals.descent import require_positive
from llmeraser_jax.types import ExampleStack, LoraParams
from llmeraser_jax.unlearning import (
    Cost,
    KroneckerPreconditioner,
    Result,
    UnlearningError,
    UnlearningTask,
    Weighted,
    Workspace,
)
from llmeraser_jax.unlearning.budget import BACKWARD, FORWARD, GRADIENT
from llmeraser_jax.unlearning.inverse import make_ekfac

_factored_curvature = jax.jit(factored_curvature, static_argnames="num_roots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GaussNewton:
    """What the two let a user choose.

    Attributes:
        damping: rho, added besides the L2 term's lambda.
        num_roots: random roots of each example's Gauss-Newton matrix.
    """

    damping: float = 1e-3
    num_roots: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "damping")
        check_at_least(self, num_roots=1)

    @property
    def factors_cost(self) -> float:
        """Gradient equivalents of the factors, per example."""
        return KroneckerPreconditioner(num_roots=self.num_roots).gradient_equivalents

    def factors(self, task: UnlearningTask, params: LoraParams, stack: ExampleStack, seed: int) -> EkFac:
        """EK-FAC of `sum_i c_i G(z_i) + (damping + sum_i c_i l2) I`."""
        keys = jax.random.split(jax.random.key(seed))
        return make_ekfac(task.objective, params, stack, *keys, self.damping, self.num_roots)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KFade(_GaussNewton):
    """A few uphill Gauss-Newton steps on S with the retained rows' curvature.

    Attributes:
        num_steps: how many.
        kl: predicted change of the retained rows' predictions per step, nats per token.
        sample_size: retained rows behind the factors; None is all.
    """

    num_steps: int = 3
    kl: float = 1e-3
    sample_size: int | None = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "kl")
        check_at_least(self, num_steps=1, **({} if self.sample_size is None else {"sample_size": 1}))

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Moves the task's parameters.

        Raises:
            ValueError: every row is named, or the gradient is zero.
        """
        started = time.perf_counter()
        problem, params, scales = task.problem, replicate(task.adapter, task.mesh), []
        if not len(problem.retained):
            msg = "Every training row is named; there is no retained row whose curvature holds the steps."
            raise ValueError(msg)
        rhs = problem.influence_rhs()
        direction = workspace.stack(problem.examples, rhs)
        drawn = problem.trained_mean(self.sample_size, workspace.rng(), without_named=True)
        mean = Weighted(drawn.indices, drawn.weights / drawn.weights.sum())
        factors = self.factors(task, params, workspace.stack(problem.examples, mean), workspace.seed)
        for _ in range(self.num_steps):
            gradient = gradient_sum(task.objective, params, direction)
            solved = factors.solve(gradient)
            slope = float(trees.tree_vdot(gradient, solved))
            if not slope > 0:
                msg = f"The gradient on the forget set has slope {slope} along the step; there is no way uphill."
                raise ValueError(msg)
            scales.append(math.sqrt(2 * self.kl / slope))
            params = trees.tree_axpy(scales[-1], solved, params)
        return Result(
            model=task.base_model,
            params=params,
            before=task.adapter,
            cost=Cost(
                rhs=GRADIENT * self.num_steps * len(rhs.indices),
                curvature=self.factors_cost * len(mean.indices),
                retraining=task.cost_of_retraining,
            ),
            seconds=time.perf_counter() - started,
            details={"scales": scales},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinU(_GaussNewton):
    """One Newton step on what is left, by Woodbury's identity, without a retained row.

    Attributes:
        max_leverage: below 1; damping grows until no direction of S has more of the stored curvature.
    """

    num_roots: int = 4
    max_leverage: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.max_leverage < 1:
            msg = f"max_leverage is {self.max_leverage}; it must lie between 0 and 1."
            raise ValueError(msg)

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Moves the task's parameters.

        Raises:
            UnlearningError: no damping makes the curvature of what is left positive definite.
        """
        problem, objective, params = task.problem, task.objective, replicate(task.adapter, task.mesh)
        n = problem.num_trained
        everything = workspace.stack(problem.examples, problem.trained_mean(None, workspace.rng()))
        stored = self.factors(task, params, everything, workspace.seed)
        started = time.perf_counter()
        rhs = problem.influence_rhs()
        stack = workspace.stack(problem.examples, rhs)
        gradient = gradient_sum(objective, params, stack)
        key = jax.random.fold_in(jax.random.key(workspace.seed), 1)
        found = _factored_curvature(objective, params, stack, key, damping=0.0, num_roots=self.num_roots)
        roots, weights = found.rows, found.weights
        coefficients = to_host(weights).astype(np.float64)
        kept = np.flatnonzero(coefficients)  # the rest is padding
        signs = -np.sign(coefficients[kept])  # the right-hand side subtracts what is to be added, and so do these
        size = jnp.sqrt(jnp.abs(weights[kept]))
        rows = jax.tree.map(lambda x: x[kept] * size.reshape(-1, *[1] * (x.ndim - 1)), roots)
        turned, turned_gradient = jax.vmap(stored.to_basis)(rows), stored.to_basis(gradient)
        leaving = signs < 0
        # A removal drops its share of the L2 term.
        rho, l2 = self.damping, objective.l2 * problem.num_edited_total / n
        while True:
            scaled = jax.tree.map(lambda x, s: x / (s + rho + l2), turned, stored.eigenvalues)  # noqa: B023
            gram = to_host(trees.rows_gram(turned, scaled)).astype(np.float64)
            leverage = float(np.linalg.eigvalsh(gram[np.ix_(leaving, leaving)])[-1])
            if leverage <= self.max_leverage:
                break
            rho *= 2
            if not (math.isfinite(leverage) and math.isfinite(rho)):
                msg = f"The forget set's curvature is not finite (leverage {leverage} at damping {rho})."
                raise UnlearningError(msg)
        inner = to_host(trees.rows_vdot(scaled, turned_gradient)).astype(np.float64)
        small = np.linalg.solve(np.diag(signs) + gram, inner)
        rest = trees.tree_sub(gradient, trees.combine_rows(jnp.asarray(small, size.dtype), rows))
        step = stored.with_mu(rho + l2).solve(rest)
        return Result(
            model=task.base_model,
            params=trees.tree_add(params, step),
            before=task.adapter,
            cost=Cost(
                rhs=GRADIENT * len(rhs.indices),
                curvature=(FORWARD + self.num_roots * BACKWARD) * len(rhs.indices),
                preparation=self.factors_cost * n,
                retraining=task.cost_of_retraining,
            ),
            seconds=time.perf_counter() - started,
            details={"damping": rho, "leverage": leverage},
        )
