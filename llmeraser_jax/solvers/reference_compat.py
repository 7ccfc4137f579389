"""The solve of the method's public PyTorch script, constants and all. To compare against, not to use.

The script descends on `d' (H_batch d) / 2 - b'd` with PyTorch's Adam, but the product `H_batch d` is a constant
to its automatic differentiation, so the gradient is `1/2 H_batch d - b` and the fixed point `2 H^-1 b`, twice the
influence step. From its constant start and with its learning rate, 20 steps move each number by about 2e-4
whatever the right-hand side: the direction is that of the signs of `b`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least, check_positive
from llmeraser_jax.solvers import common, descent
from llmeraser_jax.types import LoraParams, Operator, Solution


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceCompat:
    """The solver: the script's constants as defaults.

    Attributes:
        learning_rate: Adam's; betas 0.9 and 0.999, epsilon 1e-8 as in PyTorch.
        num_steps: mini-batch products; all are taken.
        batch_terms: terms of the sum in a mini-batch. The script's batch is one example, so the terms have to be
            single examples for the same numbers.
        batch_size: examples in a term, for whoever makes the operator.
        start: every number of the first iterate.
        weight_decay: times the iterate, added to the gradient before Adam (L2, not decoupled).
        seed: of uniform independent draws of terms; None takes the terms in order, again and again.
        rtol: call the solution converged where the true relative residual `||b - H d|| / ||b||` is at most this.
    """

    learning_rate: float = 1e-5
    num_steps: int = 20
    batch_terms: int = 1
    batch_size: int = 1
    start: float = 1e-5
    weight_decay: float = 1e-5
    seed: int | None = None
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        check_at_least(self, weight_decay=0)
        check_positive(self, "learning_rate")
        check_at_least(self, num_steps=1, batch_terms=1, batch_size=1)
        common.check_rtol(self)

    @property
    def max_products(self) -> int:
        """Products with one term each; the true residual's, with all, is not among them."""
        return self.num_steps * self.batch_terms

    @property
    def needs_eigenvalue(self) -> bool:
        """False: the script states its learning rate."""
        return False

    def solve(self, operator: Operator, rhs: LoraParams) -> Solution:
        """Runs the script's loop.

        Args:
            operator: a `types.FiniteSum`.
            rhs: a vector of adapter space, float32 or wider.

        Returns:
            The solution. `history` holds `||1/2 H_batch d - b|| / ||b||` before each step; `relative_residual` is
            that of the system `H d = b`, which the loop does not solve. A zero or non-finite right-hand side
            gives a zero value in place of the constant start. `num_products` counts products of single terms; the
            whole operator's, for the residual, is `num_terms` of them.

        Raises:
            TypeError: the operator is no finite sum.
        """
        terms = descent.require_finite_sum(operator, self)

        def drawn(step):
            if self.seed is None:
                return (step * self.batch_terms + jnp.arange(self.batch_terms)) % terms.num_terms
            key = jax.random.fold_in(jax.random.key(self.seed), step)
            return jax.random.randint(key, (self.batch_terms,), 0, terms.num_terms)

        def gradient(step, d):
            return trees.tree_axpy(0.5, descent.mean_of_terms(terms, drawn(step), d), trees.tree_scale(-1.0, rhs))

        optimiser = optax.chain(
            optax.add_decayed_weights(self.weight_decay),
            optax.adam(self.learning_rate, b1=0.9, b2=0.999, eps=1e-8),
        )
        start = jax.tree.map(lambda leaf: jnp.full_like(leaf, self.start), rhs)
        state = descent.descend(optimiser, gradient, start, rhs, self.num_steps)
        return descent.conclude(
            operator,
            rhs,
            state.x,
            self.rtol,
            num_steps=state.num_steps,
            num_products=state.num_gradients * self.batch_terms + terms.num_terms,
            non_finite=state.non_finite,
            diverged=state.diverged,
            history=state.history,
            worse_than_nothing_diverged=False,
        )
