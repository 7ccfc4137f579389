"""LiSSA: the Neumann series of the inverse with mini-batch products (Agarwal, Bullins and Hazan 2017).

As Koh and Liang (ICML 2017) use it for influence functions: `x <- b + (I - H_batch / scale) x` from `x = b`, then
`x / scale`, averaged over repeats. The expectation converges where all eigenvalues of H lie in (0, 2 scale); the
variance is bounded only where the mini-batches' eigenvalues do not exceed that range by much. Differs from their
code in two ways: damping is the operator's, and divergence is detected.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least, check_positive
from llmeraser_jax.solvers import common, descent
from llmeraser_jax.types import LoraParams, Operator, Solution

# Mini-batch residual relative to ||b||, 1 at the start, beyond which the series is called divergent.
DIVERGENCE = 1e8


@flax.struct.dataclass
class LissaState:
    """One repeat."""

    x: LoraParams  # the last finite iterate
    relative: Float[Array, ""]  # ||change of x|| / ||b||: the mini-batch residual of x / scale
    num_steps: Int[Array, ""]
    num_batches: Int[Array, ""]  # num_steps and that of a step that could not be taken
    running: Bool[Array, ""]
    non_finite: Bool[Array, ""]
    diverged: Bool[Array, ""]
    history: Float[Array, " max_steps"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lissa:
    """The solver: hyper-parameters only.

    Attributes:
        scale: above half the largest eigenvalue of the mini-batches' operators; larger is slower. None leaves it to
            `for_eigenvalue`.
        num_steps: terms of the series in each repeat ("recursion depth").
        repeats: independent estimates that are averaged.
        batch_terms: terms of the operator's sum in a mini-batch, drawn uniformly and independently.
        batch_size: examples in a term, for whoever makes the operator.
        seed: of the draws.
        rtol: call the solution converged where the true relative residual is at most this.
    """

    scale: float | None = None
    num_steps: int = 100
    repeats: int = 1
    batch_terms: int = 1
    batch_size: int = 16
    seed: int = 0
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        check_positive(self, "scale")
        check_at_least(self, num_steps=1, repeats=1, batch_terms=1, batch_size=1)
        common.check_rtol(self)

    @property
    def max_products(self) -> int:
        """Products with one term each; the true residual's, with all, is not among them."""
        return self.num_steps * self.batch_terms * self.repeats

    @property
    def needs_eigenvalue(self) -> bool:
        """Whether the scale is left to `for_eigenvalue`."""
        return self.scale is None

    def for_eigenvalue(self, largest: float) -> Lissa:
        """The solver with 1.5 times the largest eigenvalue of a term as its scale, where it has none."""
        return self if self.scale is not None else dataclasses.replace(self, scale=1.5 * largest)

    def solve(self, operator: Operator, rhs: LoraParams) -> Solution:
        """Estimates `A^-1 rhs`.

        Args:
            operator: a `types.FiniteSum`.
            rhs: a vector of adapter space, float32 or wider.

        Returns:
            The solution. `num_steps` is the longest repeat's, and `history` the worst repeat's mini-batch estimate
            `||b - H_batch x / scale|| / ||b||` before each step. The status is `DIVERGED` where any repeat did,
            or where the end is worse than no step; the value holds that repeat's last iterate, finite.
            `num_products` counts products of single terms in all repeats; the whole operator's, for the residual,
            is `num_terms` of them.

        Raises:
            TypeError: the operator is no finite sum.
            ValueError: there is no scale.
        """
        scale = self.scale
        if scale is None:
            msg = "scale is None; state one, or take `for_eigenvalue` of an estimate."
            raise ValueError(msg)
        terms = descent.require_finite_sum(operator, self)
        unit_rhs, unit = common.to_units(rhs)
        norm = trees.tree_norm(unit_rhs)
        never = jnp.zeros((), bool)

        def repeat(total, number):
            key = jax.random.fold_in(jax.random.key(self.seed), number)

            def body(state: LissaState) -> LissaState:
                step_key = jax.random.fold_in(key, state.num_steps)
                draw = jax.random.randint(step_key, (self.batch_terms,), 0, terms.num_terms)
                product = descent.mean_of_terms(terms, draw, state.x)
                change = trees.tree_axpy(-1 / scale, product, unit_rhs)
                x = trees.tree_add(state.x, change)
                relative = trees.tree_norm(change) / norm
                finite = jnp.isfinite(relative) & trees.tree_all_finite(x)
                grown = jnp.maximum(state.relative, jnp.nan_to_num(relative, nan=0, posinf=0)) > descent.GROWN
                diverged = jnp.where(finite, relative > DIVERGENCE, grown)
                num_steps = state.num_steps + finite.astype(jnp.int32)
                return LissaState(
                    x=trees.tree_where(finite, x, state.x),
                    relative=jnp.where(finite, relative, state.relative),
                    num_steps=num_steps,
                    num_batches=state.num_batches + 1,
                    running=finite & ~diverged & (num_steps < self.num_steps),
                    non_finite=~finite & ~diverged,
                    diverged=diverged,
                    history=jnp.where(finite, state.history.at[state.num_steps].set(relative), state.history),
                )

            start = LissaState(
                x=unit_rhs,
                relative=jnp.ones_like(norm),
                num_steps=jnp.zeros((), jnp.int32),
                num_batches=jnp.zeros((), jnp.int32),
                running=jnp.isfinite(norm) & (norm > 0),
                non_finite=~jnp.isfinite(norm),
                diverged=never,
                history=jnp.full((self.num_steps,), jnp.nan, norm.dtype),
            )
            end = jax.lax.while_loop(lambda s: s.running, body, start)
            total = trees.tree_axpy(1 / (scale * self.repeats), end.x, total)
            return total, (end.num_steps, end.num_batches, end.non_finite, end.diverged, end.history)

        value, (num_steps, num_batches, non_finite, diverged, history) = jax.lax.scan(
            repeat, trees.tree_zeros_like(rhs), jnp.arange(self.repeats)
        )
        return descent.conclude(
            operator,
            rhs,
            trees.tree_scale(unit, value),
            self.rtol,
            num_steps=jnp.max(num_steps),
            num_products=jnp.sum(num_batches, dtype=jnp.int32) * self.batch_terms + terms.num_terms,
            non_finite=jnp.any(non_finite),
            diverged=jnp.any(diverged),
            history=jax.lax.reduce(history, jnp.asarray(jnp.nan, history.dtype), jnp.fmax, (0,)),
            worse_than_nothing_diverged=True,
        )
