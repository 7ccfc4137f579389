"""`Solution.num_products` against the products that an operator saw, for every solver and every way to end."""

import collections

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llmeraser_jax.solvers import (
    BlockConjugateGradients,
    ConjugateGradients,
    DirectInverse,
    Lissa,
    Minres,
    QuadraticDescent,
    ReferenceCompat,
    Refined,
    Resumable,
    Status,
)
from tests.solvers.systems import D, DensePreconditioner, as_tree, noisy_terms, rhs, symmetric

SEEN = collections.Counter()


@flax.struct.dataclass
class Counting:
    """The mean of matrices [n, p, p]; every product with one vector is counted when it is computed."""

    matrices: jnp.ndarray
    name: str = flax.struct.field(pytree_node=False, default="operator")

    positive_semidefinite = False

    @property
    def num_terms(self) -> int:
        return self.matrices.shape[0]

    def _multiply(self, matrix, v, kind):
        flat, unravel = ravel_pytree(v)
        jax.debug.callback(lambda _: SEEN.update([(self.name, kind)]), flat[0])
        return unravel(matrix @ flat)

    def term_mv(self, k, v):
        return self._multiply(self.matrices[k], v, "term")

    def mv(self, v):
        return self._multiply(self.matrices.mean(0), v, "whole")


@pytest.fixture(autouse=True)
def _count_from_zero():
    SEEN.clear()
    with jax.enable_x64(True):
        yield


def operator(eigenvalues, num_terms=1, **kwargs):
    return Counting(jnp.asarray(noisy_terms(symmetric(eigenvalues), num_terms, 0.0)), **kwargs)


def solve(solver, *args, **kwargs):
    solution = jax.block_until_ready(jax.jit(lambda *a: solver.solve(*a, **kwargs))(*args))
    jax.effects_barrier()
    return solution


DEFINITE = np.linspace(0.5, 4, D)
INDEFINITE = np.linspace(-1, 4, D)


@pytest.mark.parametrize("solver", [ConjugateGradients, Minres])
@pytest.mark.parametrize(
    ("eigenvalues", "settings", "scale"),
    [
        (DEFINITE, {"rtol": 1e-3, "max_steps": 50}, 1.0),
        (DEFINITE, {"rtol": 1e-9, "max_steps": 3}, 1.0),
        (INDEFINITE, {"rtol": 1e-6, "max_steps": 50}, 1.0),  # the last product of CG is not followed by a step
        (np.full(D, np.nan), {}, 1.0),
        (np.zeros(D), {}, 1.0),
        (DEFINITE, {}, 0.0),
        (DEFINITE, {}, np.nan),
    ],
)
def test_krylov_solvers_count_their_products(solver, eigenvalues, settings, scale):
    solution = solve(solver(**settings), operator(eigenvalues), as_tree(scale * rhs()))
    assert int(solution.num_products) == SEEN["operator", "whole"] >= 1


def test_a_step_that_cannot_be_taken_is_counted():
    solution = solve(ConjugateGradients(rtol=1e-6, max_steps=50), operator(INDEFINITE), as_tree(rhs()))
    assert int(solution.status) == Status.NEGATIVE_CURVATURE
    assert int(solution.num_products) == int(solution.num_steps) + 2


def test_a_preconditioner_changes_nothing_of_it():
    preconditioner = DensePreconditioner(jnp.diag(1 / DEFINITE))
    solver = ConjugateGradients(rtol=1e-3, max_steps=50)
    solution = solve(solver, operator(DEFINITE), as_tree(rhs()), preconditioner)
    assert int(solution.num_products) == SEEN["operator", "whole"]


def test_a_block_counts_products_with_single_vectors():
    columns = np.stack([rhs(1), rhs(2), np.zeros(D)])
    solution = solve(BlockConjugateGradients(rtol=1e-3, max_steps=50), operator(DEFINITE), as_tree(columns))
    assert int(solution.num_products.sum()) == SEEN["operator", "whole"]


def test_a_block_that_meets_negative_curvature_counts_that_product():
    columns = np.stack([rhs(1), rhs(2)])
    solution = solve(BlockConjugateGradients(rtol=1e-6, max_steps=50), operator(-DEFINITE), as_tree(columns))
    assert int(solution.num_products.sum()) == SEEN["operator", "whole"] == 4


def test_the_direct_inverse_needs_one_product():
    inverse = DensePreconditioner(jnp.asarray(np.linalg.inv(symmetric(DEFINITE))))
    solution = solve(DirectInverse(inverse), operator(DEFINITE), as_tree(rhs()))
    assert int(solution.num_products) == SEEN["operator", "whole"] == 1


@pytest.mark.parametrize(
    "solver",
    [
        QuadraticDescent(learning_rate=0.3, num_steps=7, batch_terms=2),
        QuadraticDescent(learning_rate=1e200, num_steps=7),  # leaves the range on the way
        ReferenceCompat(num_steps=5, batch_terms=3),
        Lissa(scale=4.0, num_steps=6, repeats=3, batch_terms=2),
        Lissa(scale=1e-200, num_steps=6, repeats=2),  # diverges
    ],
)
def test_stochastic_solvers_count_products_of_terms(solver):
    num_terms = 4
    solution = solve(solver, operator(DEFINITE, num_terms), as_tree(rhs()))
    assert SEEN["operator", "whole"] == 1
    assert int(solution.num_products) == SEEN["operator", "term"] + num_terms


def test_refinement_counts_inner_and_exact_products():
    approximate, exact = operator(DEFINITE * 1.1, name="approximate"), operator(DEFINITE, name="exact")
    solver = ConjugateGradients(rtol=1e-2, max_steps=50)
    refined = Refined(solver=solver, approximation=lambda _: approximate, rtol=1e-5)
    solution = solve(refined, exact, as_tree(rhs()))
    assert int(solution.num_exact_products) == SEEN["exact", "whole"] > 1
    assert int(solution.num_products) == SEEN["approximate", "whole"] + SEEN["exact", "whole"]


def test_a_streamed_solve_counts_the_products_of_its_earlier_runs(tmp_path):
    calls = []

    class Plain:
        positive_semidefinite = True

        def mv(self, v):
            calls.append(1)
            flat, unravel = ravel_pytree(v)
            return unravel(jnp.asarray(symmetric(DEFINITE)) @ flat)

    for max_products in (3, 100):

        class Killed(Plain):
            def mv(self, v, limit=max_products):
                if len(calls) == limit:
                    raise KeyboardInterrupt
                return super().mv(v)

        solver = ConjugateGradients(rtol=1e-6, max_steps=50)
        try:
            resumable = Resumable(solver=solver, directory=tmp_path / "solve", every=1)
            solution = resumable.solve(Killed(), as_tree(rhs()))
        except KeyboardInterrupt:
            continue
    assert int(solution.num_products) == len(calls) > 4
