"""A method and a solver that the package does not have, written here, behind the package's interfaces."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.solvers import Status
from llmeraser_jax.types import Solution, Solver
from llmeraser_jax.unlearning import Auto, CurvatureSpec, Method, Path, Result, Step, UnlearningError, erase
from tests.problems import join_params, receipt_of, ridge_task, solves_of
from tests.unlearning.test_inverse import dense_step
from tests.unlearning.test_path_on_ridge import CURVATURE, L2, N, erase_ridge, make_problem
from tests.unlearning.test_target_matching import MATCHING, erase_head, make
from tests.unlearning.test_target_matching import memorised as memorised_rows

memorised = memorised_rows  # the fixture, under a name of this module


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink:
    """Forgets everything a little."""

    share: float = 0.25

    def run(self, task, workspace) -> Result:
        workspace.budget.spend("training", 10.0)
        params = trees.tree_scale(1 - self.share, task.adapter)
        return Result(params=params, before=task.adapter, cost=workspace.budget.cost, seconds=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Richardson:
    """`x <- x + rate (b - A x)` from 0."""

    rate: float
    num_steps: int

    @property
    def max_products(self) -> int:
        return self.num_steps + 1

    def solve(self, operator, rhs) -> Solution:
        def residual(x):
            return trees.tree_sub(rhs, operator.mv(x))

        def step(x, _):
            left = residual(x)
            return trees.tree_axpy(self.rate, left, x), trees.tree_norm(left) / trees.tree_norm(rhs)

        x, history = jax.lax.scan(step, trees.tree_zeros_like(rhs), length=self.num_steps)
        relative = trees.tree_norm(residual(x)) / trees.tree_norm(rhs)
        return Solution(
            value=x,
            status=jnp.where(relative < 1e-9, Status.CONVERGED, Status.MAX_STEPS).astype(jnp.int32),
            num_steps=jnp.int32(self.num_steps),
            num_products=jnp.int32(self.max_products),
            relative_residual=relative,
            negative_curvature=jnp.zeros((), bool),
            history=history,
        )


RICHARDSON = Richardson(rate=0.5, num_steps=200)


def test_a_method_is_anything_that_runs_and_gives_no_receipt():
    problem, before, _ = make_problem("rqc")
    assert isinstance(Shrink(), Method)
    task = ridge_task(problem, before, L2, retraining_cost=100.0)
    result = erase(task, Shrink(share=0.5), 0.2)
    np.testing.assert_allclose(join_params(result.delta), -0.5 * before, rtol=1e-12)
    assert result.receipt is None and result.model is None
    assert result.cost.training == 10 and result.cost.share_of_retraining == pytest.approx(0.1)


def test_a_solver_takes_a_step_and_is_in_its_receipt():
    problem, before, _ = make_problem("rqc")
    assert isinstance(RICHARDSON, Solver)
    uncached = dataclasses.replace(CURVATURE, memory_budget_bytes=0)
    result = erase_ridge(problem, before, Step(curvature=uncached, solver=RICHARDSON, trust_region=None))
    np.testing.assert_allclose(join_params(result.delta), dense_step(problem), rtol=1e-8)
    receipt, (record,) = receipt_of(result), solves_of(result)
    assert record.status is Status.CONVERGED and receipt.solver.converged and receipt.solver.certified
    assert record.iterations == 200 and record.products == 201 and len(record.residual_history) == 200
    assert result.cost.curvature == pytest.approx(201 * 1.5 * N)
    told = json.loads(json.dumps(receipt.to_mapping()))["config"]["method"]["solver"]
    assert told == {"type": "Richardson", "rate": 0.5, "num_steps": 200}


def test_a_solver_serves_the_path_as_well():
    problem, before, retrained = make_problem("rqc")
    result = erase_ridge(
        problem, before, Path(num_steps=3, curvature=CURVATURE, solver=RICHARDSON, trust_region=None)
    )
    np.testing.assert_allclose(join_params(result.params), retrained, atol=1e-9)


def test_a_solver_that_did_not_arrive_is_not_called_converged_and_a_sample_has_its_standard_error():
    problem, before, _ = make_problem("r")
    spec = CurvatureSpec(sample_size=12, damping=0.1)
    result = erase_ridge(problem, before, Step(curvature=spec, solver=Richardson(rate=0.1, num_steps=3)))
    receipt = receipt_of(result)
    assert receipt.solver.status.startswith("not converged") and not receipt.solver.converged
    assert receipt.step_standard_error is not None and 0 < receipt.step_standard_error < 1


def test_a_budget_holds_for_a_solver_that_cannot_take_fewer_steps():
    problem, before, _ = make_problem("r")
    step = Step(curvature=CURVATURE, solver=Richardson(rate=0.5, num_steps=20), trust_region=None)
    whole = erase_ridge(problem, before, step).cost.total
    with pytest.raises(UnlearningError, match="has no room for the next step"):
        erase_ridge(problem, before, step, 0.9, retraining_cost=whole)
    assert erase_ridge(problem, before, step, 1.0, retraining_cost=whole).cost.total <= whole * (1 + 1e-9)


def test_auto_falls_back_to_a_step_by_that_solver(memorised):
    problem, params, calibration = make(memorised, "remove")
    stuck = dataclasses.replace(MATCHING, row_ridge=1e9, num_steps=2, restoration_steps=0)
    fallback = Step(curvature=CurvatureSpec(damping=1.0), solver=Richardson(rate=0.3, num_steps=30))
    receipt = receipt_of(erase_head(problem, params, Auto(first=stuck, fallback=fallback), calibration))
    assert receipt.attempts and not receipt.complete  # one step does not forget what was memorised
    assert receipt.config["method"]["fallback"]["solver"]["type"] == "Richardson"
    assert receipt.attempts[0].startswith("step: ")
