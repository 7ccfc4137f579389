"""Right-hand sides at the edges of float32: an overflow is a failure, a huge side is not a zero one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.solvers import BlockConjugateGradients, ConjugateGradients, Minres, Refined, Status
from llmeraser_jax.types import Operator

DIAGONAL = np.array([1.0, 2.0, 4.0], np.float32)


class Scaled:
    """A diagonal operator over two leaves, one of them without numbers."""

    positive_semidefinite = True

    def __init__(self, scale: float):
        self.scale = scale

    def mv(self, v):
        return {"a": self.scale * DIAGONAL * v["a"], "empty": v["empty"]}


def side(size: float):
    return {"a": jnp.full((3,), size, jnp.float32), "empty": jnp.zeros((0, 2), jnp.float32)}


def solve(solver, operator: Operator, rhs):
    if isinstance(solver, BlockConjugateGradients):
        many = solver.solve(operator, jax.tree.map(lambda x: x[None], rhs))
        return jax.tree.map(lambda x: x[0], many.value), int(many.status[0])
    solution = solver.solve(operator, rhs)
    return solution.value, int(solution.status)


REFINED = Refined(solver=ConjugateGradients(rtol=0.05), approximation=lambda operator: operator, rtol=1e-4)
SOLVERS = [ConjugateGradients(rtol=1e-5), Minres(rtol=1e-5), BlockConjugateGradients(rtol=1e-5), REFINED]
NAMES = ["cg", "minres", "block cg", "refined"]


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_a_solution_beyond_the_range_of_its_dtype_is_a_failure(solver):
    value, status = solve(solver, Scaled(1e-3), side(1e36))
    assert status == Status.NON_FINITE
    assert not np.all(np.isfinite(value["a"]))


@pytest.mark.parametrize("size", [1.5e38, 3e38])
@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_the_largest_right_hand_sides_are_solved(solver, size):
    value, status = solve(solver, Scaled(1.0), side(size))
    assert status == Status.CONVERGED
    np.testing.assert_allclose(value["a"], np.float32(size) / DIAGONAL, rtol=1e-4)
    assert value["empty"].shape == (0, 2)
