"""The paper's solver: mini-batch SGD or Adam on the quadratic program whose minimiser is the step.

Ding et al. (ICLR 2025, arXiv 2412.00383) write the influence step as the minimiser of the finite sum
`F(d) = (1/n) sum_i [1/2 d' hess l(z_i) d - b'd]` and descend on it with gradients `H_batch d - b` of mini-batches.
Where `H` has negative eigenvalues `F` has no minimiser, and the descent diverges along them. Damping belongs to the
operator.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import optax

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least, check_choice, check_positive
from llmeraser_jax.solvers import common, descent
from llmeraser_jax.types import LoraParams, Operator, Solution

_OPTIMISERS = {"sgd": optax.sgd, "adam": optax.adam}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuadraticDescent:
    """The solver: hyper-parameters only.

    Attributes:
        optimiser: `sgd` or `adam`.
        learning_rate: of the optimiser. SGD needs it below 2 over the largest eigenvalue of a mini-batch, and None
            leaves it to `for_eigenvalue`; Adam's is the size of a step in each number, whatever the right-hand
            side's.
        num_steps: mini-batch products; all are taken.
        batch_terms: terms of the sum in a mini-batch, drawn uniformly and independently.
        batch_size: examples in a term, for whoever makes the operator.
        seed: of the draws.
        rtol: call the solution converged where the true relative residual is at most this.
    """

    optimiser: Literal["sgd", "adam"] = "sgd"
    learning_rate: float | None = None
    num_steps: int = 100
    batch_terms: int = 1
    batch_size: int = 16
    seed: int = 0
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        check_choice(self, "optimiser", tuple(_OPTIMISERS))
        if self.optimiser == "adam" and self.learning_rate is None:
            msg = "optimiser 'adam' needs a learning_rate: no eigenvalue tells how long its steps should be."
            raise ValueError(msg)
        check_positive(self, "learning_rate")
        check_at_least(self, num_steps=1, batch_terms=1, batch_size=1)
        common.check_rtol(self)

    @property
    def max_products(self) -> int:
        """Products with one term each; the true residual's, with all, is not among them."""
        return self.num_steps * self.batch_terms

    @property
    def needs_eigenvalue(self) -> bool:
        """Whether the learning rate is left to `for_eigenvalue`."""
        return self.learning_rate is None

    def for_eigenvalue(self, largest: float) -> QuadraticDescent:
        """The solver with half of 1 / largest eigenvalue of a term as its learning rate, where it has none."""
        return self if self.learning_rate is not None else dataclasses.replace(self, learning_rate=0.5 / largest)

    def solve(self, operator: Operator, rhs: LoraParams) -> Solution:
        """Descends on `1/2 d'Hd - rhs'd` from d = 0.

        Args:
            operator: a `types.FiniteSum`; its terms are the mini-batches' examples.
            rhs: a vector of adapter space, float32 or wider.

        Returns:
            The solution. `history` holds mini-batch estimates `||b - H_batch d|| / ||b||` before each step, which
            are noisy and not the residual; `relative_residual` is the true one. The status is `DIVERGED`, with
            the last finite iterate, where numbers left the range or where the end is worse than no step.
            `negative_curvature` says that `d'Hd <= 0` at the end. `ritz_extremes` are nan. `num_products`
            counts products of single terms; the whole operator's, for the residual, is `num_terms` of them.

        Raises:
            TypeError: the operator is no finite sum.
            ValueError: there is no learning rate.
        """
        if self.learning_rate is None:
            msg = "learning_rate is None; state one, or take `for_eigenvalue` of an estimate."
            raise ValueError(msg)
        terms = descent.require_finite_sum(operator, self)
        key = jax.random.key(self.seed)

        def gradient(step, d):
            draw = jax.random.randint(jax.random.fold_in(key, step), (self.batch_terms,), 0, terms.num_terms)
            return trees.tree_sub(descent.mean_of_terms(terms, draw, d), rhs)

        optimiser = _OPTIMISERS[self.optimiser](self.learning_rate)
        state = descent.descend(optimiser, gradient, trees.tree_zeros_like(rhs), rhs, self.num_steps)
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
            worse_than_nothing_diverged=True,
        )
