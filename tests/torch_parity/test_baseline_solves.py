"""Solves in float64: conjugate gradients, the path and the released script, JAX against the PyTorch baseline.

Both sides see all the data. Damping makes condition numbers of at most 1e3, which dense matrices show.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.solvers import ConjugateGradients, ReferenceCompat, Status, describe
from llmeraser_jax.unlearning import CurvatureSpec, Path, UnlearningTask, Workspace, log_odds_weights
from llmeraser_jax.unlearning import path as path_module
from llmeraser_jax.unlearning.targets import find_targets
from tests.dense import DenseOperator, materialise
from tests.solvers.systems import DenseSum, as_tree, as_vector, rhs, symmetric

pytestmark = pytest.mark.torch

ADAPTER = {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}
# What the script's Adam is given, by model: its own constants, and larger ones that curvature shows in.
CONSTANTS = {
    "llama_gqa_tied_llama3_rope": {},
    "qwen2_gqa_tied": {"learning_rate": 0.02, "weight_decay": 0.3, "start": 0.05},
}
CG = {"cg_rtol": 1e-11, "cg_max_steps": 250}
CHUNK = 9  # all examples of a step in one micro-batch
MAX_CONDITION = 1e3


@pytest.fixture(scope="module", params=CONSTANTS)
def problem(request, tmp_path_factory):
    import torch

    from tests.torch_parity import baseline_problem

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with jax.enable_x64(True):
        yield (
            baseline_problem.load_problem(
                tmp_path_factory.mktemp("problem"), request.param, ADAPTER, wide=True, reduction="example"
            ),
            CONSTANTS[request.param],
        )
    torch.set_num_threads(threads)


dense = jax.jit(materialise)
solve = jax.jit(lambda solver, operator, b: solver.solve(operator, b), static_argnums=0)


def right_hand_side(problem):
    weighted = problem.edits()[1].influence_rhs()
    stack = problem.dataset.stack(weighted.indices, weighted.weights, chunk_size=CHUNK)
    return gradient_sum(problem.objective(), problem.lora, stack)


def dense_path_matrix(problem, lora, weight):
    """`C` of a path step that ends at `weight`, in float64; weight 1 is the data as trained."""
    weighted = problem.edits()[1].path_mean(weight, None, np.random.default_rng(0))
    stack = problem.dataset.stack(weighted.indices, weighted.weights, chunk_size=CHUNK)
    operator = DatasetCurvature(problem.objective(), lora, stack, CURVATURES["gauss-newton"])
    return np.asarray(dense(operator, problem.lora))


def condition(matrix):
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] > 0
    return eigenvalues[-1] / eigenvalues[0]


def damping_for(matrix):
    """The damping that makes the condition number 150, whatever the signs of the eigenvalues."""
    eigenvalues = np.linalg.eigvalsh(matrix)
    return float((eigenvalues[-1] - 150 * eigenvalues[0]) / 149)


@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
def test_the_single_step_agrees_and_is_that_of_a_dense_solve(problem, kind, monkeypatch):
    from experiments.torch_baseline import curvature as module
    from experiments.torch_baseline.erase import erase
    from tests.torch_parity.baseline_problem import relative_difference

    problem, _ = problem
    _, edits = problem.edits()
    weighted = edits.trained_mean(None, np.random.default_rng(0))
    stack = problem.dataset.stack(weighted.indices, weighted.weights, chunk_size=CHUNK)
    matrix = np.asarray(
        dense(DatasetCurvature(problem.objective(), problem.lora, stack, CURVATURES[kind]), problem.lora)
    )
    rho = damping_for(matrix)
    damped = matrix + rho * np.eye(len(matrix))
    assert 100 < condition(damped) <= MAX_CONDITION
    assert (np.linalg.eigvalsh(matrix)[0] < 0) == (kind == "hessian")

    b = right_hand_side(problem)
    operator = Damped(DatasetCurvature(problem.objective(), problem.lora, stack, CURVATURES[kind]), rho)
    ours = solve(ConjugateGradients(rtol=CG["cg_rtol"], max_steps=CG["cg_max_steps"]), operator, b)
    eraser = problem.eraser(chunk_size=CHUNK, mode="cg", curvature=kind, curvature_data="all", damping=rho, **CG)
    theirs = erase(eraser, problem.params)

    expected = DenseOperator(jnp.linalg.inv(jnp.asarray(damped))).mv(b)
    delta = trees.tree_sub(problem.as_lora(theirs.params), problem.lora)
    assert relative_difference(delta, expected) < 1e-8
    assert relative_difference(delta, ours.value) < 1e-8
    (step,) = theirs.steps
    assert step["status"] == describe(Status(int(ours.status))) == describe(Status.CONVERGED)
    # Once a Ritz value has converged, rounding takes two recurrences apart (Paige 1980); the solutions agree still.
    shared = 5
    assert step["iterations"] > shared
    np.testing.assert_allclose(
        step["residual_history"][:shared], np.asarray(ours.history)[:shared], rtol=1e-7, atol=1e-10
    )
    eigenvalues = np.linalg.eigvalsh(damped)
    assert (
        eigenvalues[0] * (1 - 1e-8)
        <= step["ritz_extremes"][0]
        <= step["ritz_extremes"][1]
        <= eigenvalues[-1] * (1 + 1e-8)
    )
    # The least one is still on its way when the solve stops; dense systems below compare both.
    assert step["ritz_extremes"][1] == pytest.approx(float(ours.ritz_extremes[1]), rel=1e-8)
    assert step["rhs_norm"] == pytest.approx(float(trees.tree_norm(b)), rel=1e-10)
    assert theirs.cost["rhs"] == 5
    assert theirs.cost["curvature"] == {"hessian": 2, "gauss-newton": 1.5}[kind] * 7 * (step["iterations"] + 1)
    # The same with graphs that are kept, for a pass to make them and one for each product; none is made anew.
    monkeypatch.setattr(module, "PRODUCTS", {})
    kept = erase(
        problem.eraser(
            chunk_size=CHUNK, mode="cg", curvature=kind, curvature_data="all", damping=rho, keep_graphs=True, **CG
        ),
        problem.params,
    )
    assert relative_difference(trees.tree_sub(problem.as_lora(kept.params), problem.lora), expected) < 1e-8
    # The first iterations are the same; rounding grows in those that follow, as in every solve to 1e-11.
    np.testing.assert_allclose(kept.steps[0]["residual_history"][:8], step["residual_history"][:8], rtol=1e-8)
    assert kept.cost["curvature"] == 7 * (1 + kept.steps[0]["iterations"] + 1)


def test_the_path_agrees_step_by_step(problem, monkeypatch):
    from experiments.torch_baseline.erase import erase
    from tests.torch_parity.baseline_problem import relative_difference

    problem, _ = problem
    num_steps = 3
    # Room for the curvature to grow along the path.
    rho = float(np.linalg.eigvalsh(dense_path_matrix(problem, problem.lora, 1.0))[-1] / 25)
    adapters, take = [], path_module.take

    def noted(*arguments):
        moved, record = take(*arguments)
        adapters.append(moved)
        return moved, record

    monkeypatch.setattr(path_module, "take", noted)
    task = UnlearningTask(model=problem.objective(), adapter=problem.lora, requests=problem.edits()[1])
    workspace = Workspace(chunk_size=CHUNK)
    path = Path(
        num_steps=num_steps,
        curvature=CurvatureSpec(data="all", damping=rho, memory_budget_bytes=0),
        solver=ConjugateGradients(rtol=CG["cg_rtol"], max_steps=CG["cg_max_steps"]),
        trust_region=None,
    )
    end = path.move(task, workspace, find_targets(task, workspace, diagnostic=True))
    ours = SimpleNamespace(params=end.params, steps=end.steps, cost=workspace.budget.cost)

    eraser = problem.eraser(
        chunk_size=CHUNK,
        curvature_data="all",
        damping=rho,
        path_weights=tuple(log_odds_weights(num_steps, 4.0)),
        **CG,
    )
    theirs = []
    result = erase(eraser, problem.params, on_step=lambda record, params: theirs.append((record, params)))

    assert len(theirs) == len(adapters) == num_steps
    start = problem.lora
    for (record, params), adapter, our_record in zip(theirs, adapters, ours.steps, strict=True):
        matrix = dense_path_matrix(problem, start, record["weight_after"])
        assert condition(matrix + rho * np.eye(len(matrix))) <= MAX_CONDITION
        moved = trees.tree_sub(problem.as_lora(params), start)
        assert relative_difference(moved, trees.tree_sub(adapter, start)) < 1e-7
        assert record["weight_after"] == pytest.approx(our_record.weight_after, abs=1e-12)
        assert record["rhs_norm"] == pytest.approx(our_record.rhs_norm, rel=1e-8)
        assert record["status"] == describe(our_record.status) == describe(Status.CONVERGED)
        start = adapter
    assert relative_difference(problem.as_lora(result.params), ours.params) < 1e-9
    assert trees.tree_norm(trees.tree_sub(ours.params, problem.lora)) > 1e-3 * trees.tree_norm(problem.lora)
    assert result.cost["rhs"] + result.cost["curvature"] == pytest.approx(
        ours.cost.total, rel=0.05
    )  # the last iteration may differ by one


def test_explicit_weights_are_the_path_and_end_of_step_weights_are_in_its_curvature(problem):
    from experiments.torch_baseline.model import vdot
    from tests.torch_parity.baseline_problem import random_direction

    problem, _ = problem
    eraser = problem.eraser(chunk_size=CHUNK, curvature_data="all", damping=0.0, path_weights=(1.0, 0.25, 0.0))
    v = random_direction(problem.params)
    flat = ravel_pytree(problem.as_lora(v))[0]
    for weight in (0.25, 0.0):
        quadratic = float(vdot(v, eraser.product(problem.params, eraser.curvature_batches(weight), v)))
        matrix = dense_path_matrix(problem, problem.lora, weight)
        assert quadratic == pytest.approx(float(flat @ matrix @ flat), rel=1e-9)


def test_the_released_script_agrees_step_by_step(problem):
    """With dropout off, and terms in order, which here is the order of the examples on both sides."""
    import torch

    from tests.torch_parity.baseline_problem import relative_difference

    problem, constants = problem
    _, edits = problem.edits()
    n = edits.num_trained
    assert len({problem.dataset.bucket_of(i) for i in range(n)}) == 1
    stack = problem.dataset.stack(np.arange(n), np.full(n, 1 / n), chunk_size=1)
    operator = Damped(DatasetCurvature(problem.objective(), problem.lora, stack, CURVATURES["hessian"]), 0.01)
    solver = ReferenceCompat(**constants)
    ours = solve(solver, operator, right_hand_side(problem))

    eraser = problem.eraser(
        chunk_size=CHUNK, mode="published", damping=0.01, dropout=False, curvature_data="all", **constants
    )
    iterates = []
    solution = eraser.solve_adam(
        problem.params, eraser.rhs(problem.params), lambda step, iterate: iterates.append(iterate)
    )
    assert solution.num_steps == int(ours.num_steps) == 20
    # Every step's gradient norm, which all iterates before it are in.
    np.testing.assert_allclose(solution.history, np.asarray(ours.history), rtol=1e-9)
    assert relative_difference(problem.as_lora(solution.value), ours.value) < 1e-9
    assert solution.relative_residual == pytest.approx(float(ours.relative_residual), rel=1e-9)
    assert np.ptp(solution.history) > 1e-4, "the products must show in the gradients"

    # The same loop written as the script's loss, with the product held constant by detaching it.
    gradient = eraser.rhs(problem.params)
    d = {name: torch.full_like(t, solver.start).requires_grad_() for name, t in gradient.items()}
    adam = torch.optim.Adam(d.values(), lr=solver.learning_rate, weight_decay=solver.weight_decay)
    for step in range(3):
        at = {name: t.detach() for name, t in d.items()}
        product = eraser.product(problem.params, eraser.batches(np.array([step % n]), 1.0), at)
        terms = [(d[k] * product[k]).sum() / 2 - (gradient[k] * d[k]).sum() for k in d]
        loss = torch.stack(terms).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        expected = {name: t.detach() for name, t in d.items()}
        assert relative_difference(problem.as_lora(iterates[step]), problem.as_lora(expected)) < 1e-12


def as_params(vector):
    import torch

    return {"x": torch.tensor(np.asarray(vector, np.float64))}


@pytest.mark.parametrize(
    ("eigenvalues", "max_steps", "status"),
    [
        (np.linspace(1, 50, 12), 30, Status.CONVERGED),
        (np.linspace(1, 50, 12), 3, Status.MAX_STEPS),
        (np.concatenate([[-0.5], np.linspace(1, 50, 11)]), 30, Status.NEGATIVE_CURVATURE),
        (np.linspace(-50, -1, 12), 30, Status.NEGATIVE_CURVATURE_AT_START),
    ],
)
def test_conjugate_gradients_end_as_ours_do_on_dense_systems(eigenvalues, max_steps, status):
    import torch

    from experiments.torch_baseline.solvers import conjugate_gradients

    matrix, b = symmetric(eigenvalues), rhs()
    theirs = conjugate_gradients(
        lambda v: {"x": torch.tensor(matrix) @ v["x"]}, as_params(b), rtol=1e-10, max_steps=max_steps
    )
    with jax.enable_x64(True):
        operator = DenseSum(jnp.asarray(matrix)[None])
        solver = ConjugateGradients(rtol=1e-10, max_steps=max_steps)
        ours = solve(solver, operator, as_tree(b))
    assert theirs.status is status and Status(int(ours.status)) is status
    assert theirs.num_steps == int(ours.num_steps)
    assert theirs.negative_curvature == bool(ours.negative_curvature)
    np.testing.assert_allclose(theirs.value["x"].numpy(), as_vector(ours.value), rtol=1e-8, atol=1e-12)
    residual = np.linalg.norm(b - matrix @ theirs.value["x"].numpy()) / np.linalg.norm(b)
    assert theirs.relative_residual == pytest.approx(residual, rel=1e-6, abs=1e-13)
    np.testing.assert_allclose(theirs.ritz_extremes, np.asarray(ours.ritz_extremes), rtol=1e-6)


def test_adam_with_the_right_gradient_converges_to_the_solution_and_the_scripts_to_twice_it():
    import torch

    from experiments.torch_baseline.solvers import adam_on_quadratic

    matrix, b = symmetric(np.linspace(1, 4, 12)), rhs()
    exact = np.linalg.solve(matrix, b)
    for constant, factor in ((False, 1.0), (True, 2.0)):
        solution = adam_on_quadratic(
            lambda step, v: {"x": torch.tensor(matrix) @ v["x"]},
            as_params(b),
            product_is_constant=constant,
            learning_rate=0.003,
            num_steps=3000,
            weight_decay=0.0,
        )
        np.testing.assert_allclose(solution.value["x"].numpy(), factor * exact, rtol=1e-9)
        assert solution.status is Status.MAX_STEPS, "a loop without a criterion never calls itself converged"


def test_a_zero_right_hand_side_and_a_broken_product_are_failures():
    from experiments.torch_baseline.solvers import adam_on_quadratic, conjugate_gradients

    zero, b = as_params(np.zeros(12)), as_params(rhs())
    broken = as_params(np.full(12, np.nan))
    assert conjugate_gradients(lambda v: v, zero, rtol=0.1, max_steps=3).status is Status.ZERO_RHS
    assert conjugate_gradients(lambda v: broken, b, rtol=0.1, max_steps=3).status is Status.NON_FINITE
    for constant in (True, False):
        assert adam_on_quadratic(lambda k, v: v, zero, product_is_constant=constant).status is Status.ZERO_RHS
        assert adam_on_quadratic(lambda k, v: broken, b, product_is_constant=constant).status is Status.NON_FINITE
