"""Solvers, dampings, preconditioners and streaming of a step: on ridge they all have dense answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, block_mean_eigenvalues, mean_eigenvalue
from llmeraser_jax.curvature.kfac import load_ekfac
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.solvers import (
    MAX_CORRECTIONS,
    ConjugateGradients,
    Lissa,
    Minres,
    QuadraticDescent,
    ReferenceCompat,
    Status,
)
from llmeraser_jax.types import Solver
from llmeraser_jax.unlearning import (
    Corrected,
    CurvatureSpec,
    KroneckerPreconditioner,
    Path,
    RowPreconditioner,
    Step,
    Weighted,
    Workspace,
    erase,
)
from llmeraser_jax.unlearning.inverse import InverseCurvature
from tests.problems import join_params, receipt_of, ridge_objective, ridge_task, solves_of, split_params
from tests.unlearning import test_path_on_ridge
from tests.unlearning.test_path_on_ridge import CURVATURE, L2, SOLVER, D, N, erase_ridge, make_problem
from tests.unlearning.test_target_matching import L2 as HEAD_L2
from tests.unlearning.test_target_matching import OBJECTIVE, erase_head, make
from tests.unlearning.test_target_matching import memorised as memorised_rows

memorised = memorised_rows  # the fixture, under a name of this module


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


STEP = dataclasses.replace(test_path_on_ridge.STEP, trust_region=None)


def step(problem, before, solver: Solver = SOLVER, **changes):
    """A single step without a trust region, with another solver or curvature."""
    curvature = dataclasses.replace(CURVATURE, **changes)
    return erase_ridge(problem, before, dataclasses.replace(STEP, solver=solver, curvature=curvature))


def inverse_of(problem, before, solver: Solver = SOLVER, **changes) -> InverseCurvature:
    """What such a step solves with."""
    curvature = dataclasses.replace(CURVATURE, **changes)
    return InverseCurvature(ridge_task(problem, before, L2), Workspace(chunk_size=4), curvature, solver)


def moved(result, before):
    return join_params(result.params) - before


def dense_step(problem, damping=0.0):
    x, y = problem.examples.inputs, problem.examples.targets
    theta = np.linalg.solve(x[:N].T @ x[:N] / N + L2 * np.eye(D), x[:N].T @ y[:N] / N)
    gradient = lambda i: x[i] * (x[i] @ theta - y[i]) + L2 * theta  # noqa: E731
    b = sum(gradient(i) for i in problem.named) - sum((gradient(j) for j in problem.wanted), np.zeros(D))
    return np.linalg.solve(x[:N].T @ x[:N] / N + (L2 + damping) * np.eye(D), b / N)


@pytest.mark.parametrize(
    ("changes", "rtol"),
    [
        ({"solver": Minres(rtol=1e-14, max_steps=50)}, 1e-8),
        ({"solver": QuadraticDescent(num_steps=4000, batch_size=40)}, 1e-4),
        ({"solver": Lissa(num_steps=2000, batch_size=40)}, 1e-4),
        ({"memory_budget_bytes": 0}, 1e-8),
        ({"kind": "auto"}, 1e-8),
    ],
)
def test_every_solver_finds_the_dense_step(changes, rtol):
    problem, before, _ = make_problem("rqc")
    result = step(problem, before, **changes)
    np.testing.assert_allclose(moved(result, before), dense_step(problem), rtol=rtol, atol=rtol / 100)


def test_the_public_script_moves_every_number_by_its_learning_rate_and_is_not_called_converged():
    problem, before, _ = make_problem("r")
    result = step(problem, before, ReferenceCompat(seed=0))
    receipt = receipt_of(result)
    assert np.all(np.abs(moved(result, before)) < 3e-4)
    assert solves_of(result)[0].status is not Status.CONVERGED
    # 20 products of single examples; one with all, for the residual, is no work of the script's.
    assert result.cost.curvature == pytest.approx(1.5 * 20)
    assert result.cost.diagnostics >= 1.5 * N
    assert receipt.product_asymmetry is None, (
        "no conjugate gradients, no two products with all rows to look at symmetry"
    )


ROWS = ConjugateGradients(max_steps=15, preconditioner=RowPreconditioner())
KRONECKER = ConjugateGradients(max_steps=1, preconditioner=KroneckerPreconditioner())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"solver": ConjugateGradients(max_steps=7)}, (8 * 1.0 + 1 / 3) * N),
        ({"solver": ConjugateGradients(max_steps=7), "memory_budget_bytes": 0}, 8 * 1.5 * N),
        # A first solve and at most three corrections of it, each with a residual in float32.
        ({"solver": Minres(max_steps=7), "matmul_precision": "bfloat16"}, ((1 + MAX_CORRECTIONS) * 9 + 1 / 3) * N),
        ({"solver": Lissa(num_steps=30, batch_size=4)}, 1.5 * 30 * 4 + 4 * 5 * 1.5 * 4),
        ({"solver": Lissa(num_steps=30, batch_size=4, scale=2.0)}, 1.5 * 30 * 4),
        (
            {"solver": Lissa(num_steps=30, batch_size=4, batch_terms=2, repeats=3)},
            1.5 * 30 * 4 * 6 + 4 * 5 * 1.5 * 4,
        ),
        ({"solver": ReferenceCompat()}, 1.5 * 20),
        ({"solver": ROWS, "damping": 0.1}, (16 * 1.0 + 1 / 3 + 1 / 3 + 8 * 2 / 3) * N),
        # Two passes of one root (a forward third and two backward thirds), a step's product and the residual's.
        ({"solver": KRONECKER, "damping": 0.1}, (2 * 1.0 + 2 * 1.5) * N),
    ],
)
def test_the_cost_of_a_whole_solve_is_known_before_it(changes, expected):
    problem, _, _ = make_problem("r")
    assert inverse_of(problem, np.zeros(D), **changes).largest_cost(N) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["mean-eigenvalue", "per-matrix"])
def test_relative_dampings_are_multiples_of_the_estimated_mean_eigenvalues(kind):
    problem, before, _ = make_problem("r")
    params = split_params(before)
    inverse = inverse_of(problem, before, damping=0.3, damping_kind=kind)
    weighted = Weighted(np.arange(N), np.full(N, 1 / N))
    stack = inverse.workspace.stack(problem.examples, weighted)
    operator = DatasetCurvature(ridge_objective(L2), params, stack, CURVATURES["gauss-newton"])
    key = jax.random.key(inverse.workspace.seed)
    estimate = mean_eigenvalue if kind == "mean-eigenvalue" else block_mean_eigenvalues
    expected = jax.tree.map(lambda mean: 0.3 * mean, estimate(operator, key, params, 4))
    found = inverse._damping(operator)
    assert inverse.workspace.budget.cost.curvature == pytest.approx(4 * 1.5 * N)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)
    assert inverse.least_damping == pytest.approx(min(float(x) for x in jax.tree.leaves(expected)))
    # And they are what the solve adds: (C + D) delta = b.
    rhs = split_params(np.arange(1.0, D + 1))
    delta = inverse.solve(params, weighted, rhs).value
    x = problem.examples.inputs[:N]
    sizes = (1, D - 1)
    diagonal = np.concatenate(
        [np.full(n, float(r)) for n, r in zip(sizes, jax.tree.leaves(expected) * 2, strict=False)]
    )
    matrix = x.T @ x / N + L2 * np.eye(D) + np.diag(diagonal)
    np.testing.assert_allclose(matrix @ join_params(delta), np.arange(1.0, D + 1), rtol=1e-9)
    energy = join_params(delta) @ np.diag(diagonal) @ join_params(delta)
    assert inverse.damping_energy(delta) == pytest.approx(energy)


def test_streamed_solves_are_those_in_memory_and_go_on_from_their_states(tmp_path):
    problem, before, _ = make_problem("rqc", num_buckets=2)
    spec = dataclasses.replace(CURVATURE, damping=0.01)

    def run(spec, directory=None):
        path = Path(num_steps=3, curvature=spec, solver=SOLVER, trust_region=None)
        return erase(ridge_task(problem, before, L2), path, chunk_size=4, directory=directory)

    in_memory = run(spec)
    streamed = dataclasses.replace(spec, stream=True)
    first = run(streamed, tmp_path / "solves")
    np.testing.assert_allclose(join_params(first.params), join_params(in_memory.params), rtol=1e-10)
    assert sorted(p.name for p in (tmp_path / "solves").iterdir()) == ["solve_1", "solve_2", "solve_3"]
    again = run(streamed, tmp_path / "solves")
    np.testing.assert_array_equal(join_params(again.params), join_params(first.params))
    # A state of other settings is refused rather than gone on with.
    with pytest.raises(ValueError, match="another one"):
        run(dataclasses.replace(streamed, damping=0.02), tmp_path / "solves")
    with pytest.raises(ValueError, match="has no directory to save"):
        run(streamed)


def test_kronecker_factors_give_the_step_and_are_kept_for_the_next_request(memorised, tmp_path):
    problem, params, _ = make(memorised, "remove")
    kronecker = KroneckerPreconditioner(num_roots=2, directory=tmp_path / "factors")
    method = Step(
        curvature=CurvatureSpec(data="all", damping=0.05),
        solver=ConjugateGradients(max_steps=1, preconditioner=kronecker),
        trust_region=None,
    )
    first = erase_head(problem, params, method)
    everything = Weighted(np.arange(len(memorised[0])), np.full(len(memorised[0]), 1 / len(memorised[0])))
    stack = Workspace(chunk_size=8).stack(problem.examples, everything)
    factors = load_ekfac(tmp_path / "factors", params, stack, mu=0.05 + HEAD_L2)
    rhs = gradient_sum(OBJECTIVE, params, problem.examples.stack(problem.named, np.full(4, 1 / 48), chunk_size=8))
    # The factors' direction, at the length that minimises the quadratic.
    direction = factors.solve(rhs)
    operator = DatasetCurvature(OBJECTIVE, params, stack, CURVATURES["gauss-newton"])
    product = operator.mv(direction)["w"] + 0.05 * direction["w"]
    length = jnp.vdot(rhs["w"], direction["w"]) / jnp.vdot(direction["w"], product)
    np.testing.assert_allclose(first.params["w"] - params["w"], length * direction["w"], rtol=1e-9)
    residual = jnp.linalg.norm(rhs["w"] - length * product) / jnp.linalg.norm(rhs["w"])
    (record,) = solves_of(first)
    assert record.relative_residual == pytest.approx(float(residual)) and record.iterations == 1
    # Two passes with two roots each, a product and one for the residual; later requests pay the products alone.
    assert first.cost.curvature == pytest.approx(48 * (2 * (1 / 3 + 2 * 2 / 3) + 2 * 1.5))
    other, _, _ = make(memorised, "correct")
    assert erase_head(other, params, method).cost.curvature == pytest.approx(48 * 2 * 1.5)
    with pytest.raises(ValueError, match="another adapter"):
        erase_head(problem, {"w": params["w"] + 1}, method)


def test_a_row_preconditioner_finds_the_same_step_in_fewer_products_and_is_paid_for(memorised):
    problem, params, _ = make(memorised, "remove")
    spec = CurvatureSpec(data="all", damping=1e-5, memory_budget_bytes=0)
    solver = ConjugateGradients(rtol=1e-8, max_steps=200)
    plain = Step(curvature=spec, solver=solver, trust_region=None)
    preconditioned = dataclasses.replace(solver, preconditioner=RowPreconditioner())
    without = erase_head(problem, params, plain)
    result = erase_head(problem, params, dataclasses.replace(plain, solver=preconditioned))
    np.testing.assert_allclose(result.params["w"], without.params["w"], rtol=1e-5, atol=1e-7)
    (record,), (other,) = solves_of(result), solves_of(without)
    assert record.status is other.status is Status.CONVERGED
    fewer, more = record.iterations, other.iterations
    assert fewer < more
    assert result.cost.curvature == pytest.approx(48 * (1.5 * (fewer + 1) + 1 / 3 + 8 * 2 / 3))


def test_the_receipt_s_facts_about_the_matrix_are_measured():
    problem, before, _ = make_problem("rqc")
    result = step(problem, before, kind="auto")
    receipt, (record,) = receipt_of(result), solves_of(result)
    assert receipt.product_asymmetry is not None and 0 <= receipt.product_asymmetry < 1e-12
    assert receipt.curvature_reason.startswith("hessian: no solve met non-positive curvature")
    x = problem.examples.inputs[:N]
    eigenvalues = np.linalg.eigvalsh(x.T @ x / N + L2 * np.eye(D))
    np.testing.assert_allclose(record.ritz_extremes, eigenvalues[[0, -1]], rtol=1e-6)


def spec(**changes):
    return lambda: CurvatureSpec(**changes)


def with_solver(solver, **changes):
    return lambda: Step(curvature=CurvatureSpec(**changes), solver=solver)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (spec(memory_budget_bytes=-1), "memory_budget_bytes is -1"),
        (spec(data="all", sample_size=3), "sample_size is 3, and data 'all'"),
        (spec(data="retained", sample_size=3), "sample_size is 3, and data 'retained'"),
        (spec(stream=True, damping_kind="per-matrix"), "stream goes with damping_kind 'constant'"),
        (spec(stream=True, matmul_precision="bfloat16"), "stream goes with .* matmul_precision 'float32'"),
        (with_solver(Minres(), stream=True), "stream goes with ConjugateGradients; the solver is Minres"),
        (with_solver(Lissa(), stream=True), "stream goes with ConjugateGradients; the solver is Lissa"),
        (with_solver(Lissa(), matmul_precision="bfloat16"), "'bfloat16' goes with ConjugateGradients or Minres"),
        *(
            (with_solver(solver, **changes), "A preconditioner goes with kind 'gauss-newton'")
            for solver in (ROWS, KRONECKER)
            for changes in (
                {"kind": "hessian"},
                {"kind": "auto"},
                {"kind": "empirical-fisher"},
                {"stream": True},
                {"damping_kind": "per-matrix"},
                {"matmul_precision": "bfloat16"},
            )
        ),
        (lambda: Path(curvature=CurvatureSpec(kind="hessian"), solver=ROWS), "A preconditioner goes with"),
        (lambda: Corrected(curvature=CurvatureSpec(kind="hessian"), solver=ROWS), "A preconditioner goes with"),
        (lambda: RowPreconditioner(num_roots=0), "num_roots is 0"),
        (lambda: KroneckerPreconditioner(num_roots=0), "num_roots is 0"),
    ],
)
def test_choices_that_have_no_effect_together_are_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("method", [Path, Corrected])
def test_factors_that_are_kept_belong_to_one_adapter_and_to_single_steps(method, tmp_path):
    kept = ConjugateGradients(preconditioner=KroneckerPreconditioner(directory=tmp_path))
    with pytest.raises(ValueError, match="its directory keeps factors of one adapter"):
        method(solver=kept)
    Step(solver=kept)
