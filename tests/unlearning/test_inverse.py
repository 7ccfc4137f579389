"""Solvers, dampings, samples and streaming behind one configuration: on ridge they all have dense answers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, block_mean_eigenvalues, mean_eigenvalue
from llmeraser_jax.curvature.kfac import load_ekfac
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.solvers import Status
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.dispatch import unlearn
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import Weighted
from tests.problems import join_params, ridge_objective, split_params
from tests.unlearning.test_matched import CONFIG, OBJECTIVE, make
from tests.unlearning.test_matched import memorised as memorised_rows
from tests.unlearning.test_path_on_ridge import L2, D, N, config, make_problem

memorised = memorised_rows  # the fixture, under a name of this module


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def step(problem, before, directory=None, **changes):
    settings = config(method="step", trust_region=False, **changes)
    return unlearn(ridge_objective(L2), split_params(before), problem, settings, checkpoint_directory=directory)


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
        ({"solver": "minres"}, 1e-8),
        ({"solver": "descent", "solver_steps": 4000, "learning_rate": 0.05, "solver_batch_size": 40}, 1e-4),
        ({"solver": "lissa", "solver_steps": 2000, "solver_batch_size": 40}, 1e-4),
        ({"memory_budget_bytes": 0}, 1e-8),
        ({"curvature": "auto"}, 1e-8),
    ],
)
def test_every_solver_finds_the_dense_step(changes, rtol):
    problem, before, _ = make_problem("rqc")
    result = step(problem, before, **changes)
    np.testing.assert_allclose(moved(result, before), dense_step(problem), rtol=rtol, atol=rtol / 100)


def test_the_public_script_moves_every_number_by_its_learning_rate_and_is_not_called_converged():
    problem, before, _ = make_problem("r")
    result = step(problem, before, solver="reference-compat")
    assert np.all(np.abs(moved(result, before)) < 3e-4)
    assert result.steps[0].status is not Status.CONVERGED
    # 20 products of single examples; one with all, for the residual, is no work of the script's.
    assert result.cost.curvature == pytest.approx(1.5 * 20)
    assert result.cost.diagnostics >= 1.5 * N
    assert np.isnan(result.asymmetry), "no conjugate gradients, no two products with all rows to look at symmetry"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cg_max_steps": 7}, (8 * 1.0 + 1 / 3) * N),
        ({"cg_max_steps": 7, "memory_budget_bytes": 0}, 8 * 1.5 * N),
        ({"solver": "lissa", "solver_steps": 30, "solver_batch_size": 4}, 1.5 * 30 * 4 + 4 * 5 * 1.5 * 4),
        ({"solver": "reference-compat"}, 1.5 * 20),
        # Two passes of one root (a forward third and two backward thirds), a step's product and the residual's.
        ({"solver": "ekfac", "damping": 0.1}, (2 * 1.0 + 2 * 1.5) * N),
    ],
)
def test_the_cost_of_a_whole_solve_is_known_before_it(changes, expected):
    problem, _, _ = make_problem("r")
    evaluator = Evaluator(ridge_objective(L2), problem, config(method="step", **changes))
    assert evaluator.largest_solve_cost(N) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["mean-eigenvalue", "per-matrix"])
def test_relative_dampings_are_multiples_of_the_estimated_mean_eigenvalues(kind):
    problem, before, _ = make_problem("r")
    params = split_params(before)
    settings = config(method="step", damping=0.3, damping_kind=kind)
    evaluator = Evaluator(ridge_objective(L2), problem, settings)
    weighted = Weighted(np.arange(N), np.full(N, 1 / N))
    operator = DatasetCurvature(ridge_objective(L2), params, evaluator.stack(weighted), CURVATURES["gauss-newton"])
    key = jax.random.key(settings.seed)
    estimate = mean_eigenvalue if kind == "mean-eigenvalue" else block_mean_eigenvalues
    expected = jax.tree.map(lambda mean: 0.3 * mean, estimate(operator, key, params, 4))
    found = evaluator.damping(operator)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)
    assert evaluator.least_damping == pytest.approx(min(float(x) for x in jax.tree.leaves(expected)))
    # And they are what the solve adds: (C + D) delta = b.
    rhs = split_params(np.arange(1.0, D + 1))
    delta = evaluator.solve(params, weighted, rhs).value
    x = problem.examples.inputs[:N]
    sizes = (1, D - 1)
    diagonal = np.concatenate(
        [np.full(n, float(r)) for n, r in zip(sizes, jax.tree.leaves(expected) * 2, strict=False)]
    )
    matrix = x.T @ x / N + L2 * np.eye(D) + np.diag(diagonal)
    np.testing.assert_allclose(matrix @ join_params(delta), np.arange(1.0, D + 1), rtol=1e-9)
    energy = join_params(delta) @ np.diag(diagonal) @ join_params(delta)
    assert evaluator.damping_energy(delta) == pytest.approx(energy)


def test_streamed_solves_are_those_in_memory_and_go_on_from_their_states(tmp_path):
    problem, before, _ = make_problem("rqc", num_buckets=2)
    settings = {"damping": 0.01, "num_steps": 3, "trust_region": False}
    objective, params = ridge_objective(L2), split_params(before)
    in_memory = unlearn(objective, params, problem, config(**settings))
    streamed = config(**settings, stream=True)
    first = unlearn(objective, params, problem, streamed, checkpoint_directory=tmp_path / "solves")
    np.testing.assert_allclose(join_params(first.params), join_params(in_memory.params), rtol=1e-10)
    assert sorted(p.name for p in (tmp_path / "solves").iterdir()) == ["solve_1", "solve_2", "solve_3"]
    again = unlearn(objective, params, problem, streamed, checkpoint_directory=tmp_path / "solves")
    np.testing.assert_array_equal(join_params(again.params), join_params(first.params))
    # A state of other settings is refused rather than gone on with.
    other = dataclasses.replace(streamed, damping=0.02)
    with pytest.raises(ValueError, match="another one"):
        unlearn(objective, params, problem, other, checkpoint_directory=tmp_path / "solves")


def test_kronecker_factors_give_the_step_and_are_kept_for_the_next_request(memorised, tmp_path):
    problem, params, _ = make(memorised, "remove")
    settings = dataclasses.replace(
        CONFIG, method="step", solver="ekfac", curvature_data="all", trust_region=False, draws=2, damping=0.05
    )
    move = partial(unlearn, OBJECTIVE, params, config=settings, factors_directory=tmp_path / "factors")
    first = move(problem=problem)
    everything = Weighted(np.arange(len(memorised[0])), np.full(len(memorised[0]), 1 / len(memorised[0])))
    stack = Evaluator(OBJECTIVE, problem, settings).stack(everything)
    factors = load_ekfac(tmp_path / "factors", params, stack, mu=settings.damping + settings.l2)
    rhs = gradient_sum(OBJECTIVE, params, problem.examples.stack(problem.named, np.full(4, 1 / 48), chunk_size=8))
    # The factors' direction, at the length that minimises the quadratic.
    direction = factors.solve(rhs)
    operator = DatasetCurvature(OBJECTIVE, params, stack, CURVATURES["gauss-newton"])
    product = operator.mv(direction)["w"] + settings.damping * direction["w"]
    length = jnp.vdot(rhs["w"], direction["w"]) / jnp.vdot(direction["w"], product)
    np.testing.assert_allclose(first.params["w"] - params["w"], length * direction["w"], rtol=1e-9)
    residual = jnp.linalg.norm(rhs["w"] - length * product) / jnp.linalg.norm(rhs["w"])
    assert first.steps[0].relative_residual == pytest.approx(float(residual)) and first.steps[0].iterations == 1
    # Two passes with two roots each, a product and one for the residual; later requests pay the products alone.
    assert first.cost.curvature == pytest.approx(48 * (2 * (1 / 3 + 2 * 2 / 3) + 2 * 1.5))
    other, _, _ = make(memorised, "correct")
    assert move(problem=other).cost.curvature == pytest.approx(48 * 2 * 1.5)
    with pytest.raises(ValueError, match="another adapter"):
        unlearn(
            OBJECTIVE,
            {"w": params["w"] + 1},
            problem,
            settings,
            factors_directory=tmp_path / "factors",
        )


def test_a_factored_preconditioner_finds_the_same_step_in_fewer_products_and_is_paid_for(memorised):
    problem, params, _ = make(memorised, "remove")
    plain = dataclasses.replace(
        CONFIG,
        method="step",
        curvature_data="all",
        trust_region=False,
        damping=1e-5,
        cg_rtol=1e-8,
        cg_max_steps=200,
        memory_budget_bytes=0,
    )
    without = unlearn(OBJECTIVE, params, problem, plain)
    settings = dataclasses.replace(plain, preconditioner="factored")
    result = unlearn(OBJECTIVE, params, problem, settings)
    np.testing.assert_allclose(result.params["w"], without.params["w"], rtol=1e-5, atol=1e-7)
    assert all(found.steps[0].status is Status.CONVERGED for found in (without, result))
    fewer, more = result.steps[0].iterations, without.steps[0].iterations
    assert fewer < more
    assert result.cost.curvature == pytest.approx(48 * (1.5 * (fewer + 1) + 1 / 3 + 8 * 2 / 3))


def test_samples_that_favour_similar_rows_stay_unbiased():
    problem, _, _ = make_problem("r")
    similar = np.random.default_rng(1).uniform(size=N) ** 4
    problem = dataclasses.replace(problem, similarities=similar)
    x = problem.examples.inputs
    exact = np.einsum("ni,nj->ij", x[problem.retained], x[problem.retained]) / N
    draws, favoured = [], []
    for seed in range(400):
        found = problem.trained_mean(12, np.random.default_rng(seed), without_named=True, similar_share=0.7)
        assert len(found.indices) == 12  # repeated draws leave places of weight 0
        draws.append(np.einsum("n,ni,nj->ij", found.weights, x[found.indices], x[found.indices]))
        favoured.append(similar[found.indices[found.weights > 0]].mean())
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert np.all(np.abs(np.mean(draws, axis=0) - exact) <= 5 * error)
    assert np.mean(favoured) > 2 * similar[problem.retained].mean()


def test_a_sample_cannot_favour_what_nothing_is_known_of():
    problem, before, _ = make_problem("r")
    with pytest.raises(ValueError, match="no similarities"):
        step(problem, before, curvature_data="sample", sample_size=5, similar_share=0.5)


def test_the_receipt_s_facts_about_the_matrix_are_measured():
    problem, before, _ = make_problem("rqc")
    result = step(problem, before, curvature="auto")
    assert 0 <= result.asymmetry < 1e-12
    assert result.curvature_reason.startswith("hessian: no solve met non-positive curvature")
    record = result.steps[0]
    x = problem.examples.inputs[:N]
    eigenvalues = np.linalg.eigvalsh(x.T @ x / N + L2 * np.eye(D))
    np.testing.assert_allclose(record.ritz_extremes, eigenvalues[[0, -1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "matched", "damping_kind": "per-matrix"}, "damping_kind"),
        ({"similar_share": 1.0}, "similar_share"),
        ({"learning_rate": 2.0}, "learning_rate"),
        ({"memory_budget_bytes": -1}, "memory_budget_bytes"),
        ({"stream": True, "method": "matched"}, "stream"),
        ({"stream": True, "method": "step", "damping_kind": "per-matrix"}, "stream"),
        ({"operands": "bfloat16"}, "operands"),
        ({"operands": "bfloat16", "method": "step", "solver": "lissa"}, "operands"),
        ({"operands": "bfloat16", "method": "step", "stream": True}, "operands"),
        ({"correctors": -1}, "correctors"),
        ({"solver": "ekfac", "method": "path"}, "ekfac"),
        ({"preconditioner": "factored", "solver": "minres"}, "preconditioner"),
        ({"preconditioner": "factored", "curvature": "hessian"}, "preconditioner"),
        ({"solver": "ekfac", "method": "step", "curvature": "hessian"}, "ekfac"),
    ],
)
def test_bad_choices_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        EraseConfig(**changes)
