"""The constrained solve with stored rows and with rows that are not stored, on a softmax head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.losses import Objective, example_places, forward_values
from llmeraser_jax.unlearning import matching_rows
from llmeraser_jax.unlearning.budget import Budget, BudgetSpent
from llmeraser_jax.unlearning.matching_rows import SketchedRows, StoredRows
from tests.problems import ArrayExamples
from tests.unlearning.judgement import log_odds as head_log_odds
from tests.unlearning.test_path_on_softmax import cross_entropy, logits
from tests.unlearning.test_target_matching import root

D, CLASSES = 40, 4
OPTIONS = {"damping": 1e-2, "shrinkage": 0.5, "row_ridge": 0.01, "num_roots": 2}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def objective():
    return Objective((), None, logits, cross_entropy, 1e-3, root, head_log_odds)


@pytest.fixture
def head():
    """Parameters, rows to constrain, rows to protect, and rows behind the curvature."""
    rng = np.random.default_rng(0)
    examples = ArrayExamples(rng.normal(size=(40, D)), rng.integers(0, CLASSES, 40), 2)
    params = {"w": jnp.asarray(0.3 * rng.normal(size=(D, CLASSES)))}

    def stack(indices, weight=1.0):
        return examples.stack(np.asarray(indices), np.full(len(indices), weight), chunk_size=4)

    return params, stack([3, 10, 11, 30, 5]), stack([1, 2, 20]), stack(np.arange(12, 30), 1 / 40)


def solve(rows, head, constraints=True):
    params, targets, protected, sample = head
    rows.add_curvature(params, sample, jax.random.key(2))
    _, normals = rows.measure(params, targets, "log-odds")
    _, others = rows.measure(params, protected, "loss")
    demand = np.array([1.0, -0.5, 2.0, 0.3, 0.7])
    return rows.solve(normals, demand, (others, np.array([-0.1, 0.0, -0.2])) if constraints else None)


def sketched(**options):
    return SketchedRows(objective(), Budget(), seed=0, **{**OPTIONS, **options})


@pytest.mark.parametrize("constraints", [False, True])
def test_sketches_that_lose_nothing_give_the_step_of_stored_rows(head, monkeypatch, constraints):
    monkeypatch.setattr(matching_rows, "SKETCH_WIDTH", D)
    expected = solve(StoredRows(objective(), None, **OPTIONS), head, constraints)
    step = solve(sketched(), head, constraints)
    np.testing.assert_allclose(step.delta["w"], expected.delta["w"], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(step.predicted, expected.predicted, rtol=1e-6)
    assert step.relative_residual < 1e-8


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_the_step_is_that_of_the_sample_shrunk_towards_its_diagonal(head, shrinkage):
    params, targets, _, sample = head
    options = {**OPTIONS, "shrinkage": shrinkage}
    step = solve(StoredRows(objective(), None, **options), head, constraints=False)
    _, blocks = matching_rows.stored_rows(objective(), params, sample, "roots", jax.random.key(2), num_roots=2)
    _, normals = matching_rows.stored_rows(objective(), params, targets, "log-odds", jax.random.key(0))
    u, h = (
        np.concatenate([np.asarray(block["w"]).reshape(len(block["w"]), -1) for block in rows.blocks])[rows.places]
        for rows in (blocks, normals)
    )
    sampled = u.T @ u / 80  # weights of 1/40, two roots each
    matrix = (1 - shrinkage) * sampled + shrinkage * np.diag(np.diag(sampled))
    matrix += (OPTIONS["damping"] + 1e-3 * 18 / 40) * np.eye(len(matrix))
    influence = h @ np.linalg.solve(matrix, h.T)
    ridge = OPTIONS["row_ridge"] * np.trace(influence) / len(h) * np.eye(len(h))
    a = np.linalg.solve(influence + ridge, [1.0, -0.5, 2.0, 0.3, 0.7])
    expected = np.linalg.solve(matrix, h.T @ a).reshape(D, CLASSES)
    np.testing.assert_allclose(step.delta["w"], expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(step.predicted, influence @ a, rtol=1e-7)


def test_joined_samples_weigh_as_with_stored_rows(head, monkeypatch):
    monkeypatch.setattr(matching_rows, "SKETCH_WIDTH", D)
    steps = []
    for rows in (StoredRows(objective(), None, **OPTIONS), sketched()):
        elsewhere = jax.tree.map(lambda x: 0.5 * x, head[0])
        rows.add_curvature(elsewhere, head[2], jax.random.key(9))
        steps.append(solve(rows, head))
    np.testing.assert_allclose(steps[1].delta["w"], steps[0].delta["w"], rtol=1e-6, atol=1e-8)


def test_rows_that_are_joined_are_not_copied(head):
    rows = StoredRows(objective(), None, **OPTIONS)
    rows.add_curvature(head[0], head[3], jax.random.key(2))
    assert rows.inverse is not None
    first = rows.inverse.curvature.rows.blocks
    rows.add_curvature(head[0], head[3], jax.random.key(3))
    joined = rows.inverse.curvature.rows
    assert all(a is b for a, b in zip(joined.blocks, first, strict=False))
    assert len(joined.blocks) == 2 * len(first)


def test_narrow_sketches_meet_the_constraints_all_the_same(head, monkeypatch):
    monkeypatch.setattr(matching_rows, "SKETCH_WIDTH", 24)
    rows = sketched()
    step = solve(rows, head, constraints=False)
    params, targets, *_ = head

    def log_odds(p):
        flat = [
            jax.lax.map(lambda batch: forward_values(objective(), p, batch)[1], batches).reshape(-1)
            for batches in targets.batches
        ]
        return jnp.concatenate(flat)[example_places(targets)]

    predicted = jax.jvp(log_odds, (params,), (step.delta,))[1]
    np.testing.assert_allclose(step.predicted, predicted, rtol=1e-8)
    assert step.relative_residual <= 0.1
    exact = solve(StoredRows(objective(), None, **OPTIONS), head, constraints=False)
    assert float(trees.tree_norm(step.delta)) < 1.5 * float(trees.tree_norm(exact.delta))


def test_directions_are_paid_before_they_are_computed(head):
    params, targets, _, sample = head
    rows = SketchedRows(objective(), Budget(10.0), seed=0, **OPTIONS)
    with pytest.raises(BudgetSpent, match="no room"):
        rows.add_curvature(params, sample, jax.random.key(2))
    rows = SketchedRows(objective(), Budget(40.0), seed=0, **OPTIONS)
    rows.add_curvature(params, sample, jax.random.key(2))
    diagonal = rows.budget.cost.total
    assert diagonal == pytest.approx(18 * (1 + 2 * 2) / 3)
    _, normals = rows.measure(params, targets, "log-odds")
    with pytest.raises(BudgetSpent, match="no room"):
        rows.solve(normals, np.ones(5), None)
    assert rows.budget.cost.total == diagonal
    assert rows.solve_cost(5, 7) == pytest.approx(3 * (5 * 5 / 3 + 18))
