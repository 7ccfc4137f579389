"""K-FADE against dense Kronecker algebra, WIN-U against dense Newton steps and retrained ridge regressions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.lora import add_delta
from llmeraser_jax.losses import Objective, half_squared_error, half_squared_error_root
from llmeraser_jax.rivals import KFade, WinU
from llmeraser_jax.training import finetune
from llmeraser_jax.unlearning import EditProblem, UnlearningTask, Workspace
from tests.problems import ArrayExamples, ridge_solution

L2 = 0.05


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def bilinear(frozen, params, batch):
    """`a'U b + c'V c`: two matrices, each example's gradient of which is an outer product."""
    a, b, c = batch.inputs[:, :3], batch.inputs[:, 3:5], batch.inputs[:, 5:]
    return jnp.einsum("zi,ij,zj->z", a, params["u"], b) + jnp.einsum("zi,ij,zj->z", c, params["v"], c)


def matrix_task(outputs, params, problem):
    objective = Objective((), None, outputs, half_squared_error, L2, output_root_fn=half_squared_error_root)
    return UnlearningTask(model=objective, adapter=params, requests=problem)


def dense_ekfac(rows, weights):
    """EK-FAC of `sum_i w_i vec(G_i) vec(G_i)'` of one matrix, rows G [n, m, k], as a dense matrix."""
    left = np.einsum("z,zij,zkj->ik", weights, rows, rows)
    right = np.einsum("z,zij,zik->jk", weights, rows, rows)
    basis = np.kron(np.linalg.eigh(left)[1], np.linalg.eigh(right)[1])
    return basis * (weights @ (rows.reshape(len(rows), -1) @ basis) ** 2) @ basis.T


def block_diagonal(blocks):
    size = sum(map(len, blocks))
    whole, at = np.zeros((size, size)), 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


@dataclasses.dataclass
class Bilinear:
    """Nine examples and two replacements: of 1, 4 and 7 the first is removed, the others edited."""

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.inputs, self.targets = rng.normal(size=(11, 8)), rng.normal(size=11)
        self.theta = rng.normal(size=15)
        named, replacements = np.array([1, 4, 7]), np.array([-1, 9, 10])
        self.problem = EditProblem(ArrayExamples(self.inputs, self.targets, 2), 9, named, replacements)
        a, b, c = self.inputs[:, :3], self.inputs[:, 3:5], self.inputs[:, 5:]
        self.parts = np.einsum("zi,zj->zij", a, b), np.einsum("zi,zj->zij", c, c)
        self.jacobian = np.concatenate([part.reshape(11, -1) for part in self.parts], axis=1)

    def task(self):
        params = {"u": jnp.asarray(self.theta[:6].reshape(3, 2)), "v": jnp.asarray(self.theta[6:].reshape(3, 3))}
        return matrix_task(bilinear, params, self.problem)

    def ekfac(self, weights):
        return block_diagonal([dense_ekfac(part, weights) for part in self.parts])

    def right_hand_side(self, theta):
        signs = np.zeros(11)
        signs[[1, 4, 7]], signs[[9, 10]] = 1 / 9, -1 / 9
        residuals = self.jacobian @ theta - self.targets
        return self.jacobian.T @ (signs * residuals) + L2 * signs.sum() * theta


def joined(params):
    return np.concatenate([np.asarray(params["u"]).ravel(), np.asarray(params["v"]).ravel()])


@pytest.mark.usefixtures("float64")
def test_k_fade_is_the_constrained_step_in_dense_kronecker_algebra():
    example = Bilinear()
    result = KFade(num_steps=2, kl=0.03, damping=0.02, sample_size=None).run(example.task(), Workspace())
    weights = np.full(11, 1 / 6)
    weights[[1, 4, 7, 9, 10]] = 0
    curvature = example.ekfac(weights) + (0.02 + L2) * np.eye(15)
    theta = example.theta
    for scale in result.details["scales"]:
        b = example.right_hand_side(theta)
        direction = np.linalg.solve(curvature, b)
        step = math.sqrt(2 * 0.03 / (b @ direction)) * direction
        assert 0.5 * step @ curvature @ step == pytest.approx(0.03, rel=1e-10)
        np.testing.assert_allclose(scale * direction, step, rtol=1e-8)
        theta = theta + step
    np.testing.assert_allclose(joined(result.params), theta, rtol=1e-8)
    # Two passes over six retained rows for the factors, five gradients a step.
    assert (result.cost.curvature, result.cost.rhs) == (pytest.approx(2 * 6), 2 * 5)


@pytest.mark.usefixtures("float64")
def test_win_u_is_the_dense_newton_step_on_the_stored_curvature_less_the_forget_sets():
    example = Bilinear()
    method = WinU(damping=3.0, num_roots=1)
    result = method.run(example.task(), Workspace())
    assert result.details["damping"] == 3.0 and 0.05 < result.details["leverage"] < 0.9
    weights = np.full(11, 1 / 9)
    weights[9:] = 0
    named, wanted = example.jacobian[[1, 4, 7]], example.jacobian[[9, 10]]
    left = example.ekfac(weights) - named.T @ named / 9 + wanted.T @ wanted / 9 + (3.0 + L2 * 8 / 9) * np.eye(15)
    step = np.linalg.solve(left, example.right_hand_side(example.theta))
    np.testing.assert_allclose(joined(result.params), example.theta + step, rtol=1e-8)
    assert (result.cost.preparation, result.cost.rhs, result.cost.curvature) == pytest.approx((2 * 9, 5, 5))


def linear(frozen, params, batch):
    """`w x` with w a matrix of one row, whose EK-FAC is exact."""
    return batch.inputs @ params["w"][0]


@pytest.mark.usefixtures("float64")
def test_win_u_lands_on_the_retrained_ridge_regression_for_every_category():
    rng = np.random.default_rng(1)
    inputs, targets = rng.normal(size=(14, 4)), rng.normal(size=14)
    # 2 is removed, 5 has another query and 9 another response.
    inputs[13], replacements = inputs[9], np.array([-1, 12, 13])
    targets[12] = targets[5]
    problem = EditProblem(ArrayExamples(inputs, targets), 12, np.array([2, 5, 9]), replacements)
    trained = ridge_solution(inputs[:12], targets[:12], L2)
    task = matrix_task(linear, {"w": jnp.asarray(trained[None])}, problem)
    result = WinU(damping=1e-12, num_roots=1, max_leverage=0.99).run(task, Workspace())
    after = [0, 1, 3, 4, 12, 6, 7, 8, 13, 10, 11]
    expected = ridge_solution(inputs[after], targets[after], L2)
    np.testing.assert_allclose(result.params["w"][0], expected, rtol=1e-9)
    assert np.abs(expected - trained).max() > 0.01


@pytest.mark.usefixtures("float64")
def test_win_u_raises_the_damping_until_what_is_left_is_positive_definite():
    example = Bilinear()
    result = WinU(damping=1e-3, num_roots=1, max_leverage=0.5).run(example.task(), Workspace())
    assert result.details["damping"] > 1e-3 and result.details["leverage"] <= 0.5
    doublings = math.log2(result.details["damping"] / 1e-3)
    assert doublings == pytest.approx(round(doublings))


def test_where_every_row_is_named_k_fade_has_no_curvature():
    examples = ArrayExamples(np.ones((2, 8)), np.arange(2.0))
    params = {"u": jnp.ones((3, 2)), "v": jnp.ones((3, 3))}
    task = matrix_task(bilinear, params, EditProblem(examples, 1, np.array([0]), np.array([1])))
    with pytest.raises(ValueError, match="no retained row whose curvature"):
        KFade().run(task, Workspace())


@pytest.fixture(scope="module")
def faded(task):
    return KFade(kl=3e-3).run(task, Workspace(chunk_size=4))


def mean_loss(task, params, rows):
    return score_examples(task.model, params, task.problem.examples, np.asarray(rows)).losses.mean()


def test_k_fade_forgets_on_a_language_model_and_holds_the_rest(task, faded):
    named, kept = [1, 4, 6], task.problem.retained
    gone, rest = (mean_loss(task, faded.params, r) - mean_loss(task, task.adapter, r) for r in (named, kept))
    assert gone > 0.5 and rest < 0.3 * gone


def test_an_update_can_be_applied_again_after_further_training(task, faded):
    training = dataclasses.replace(task.training, epochs=2)
    further = finetune(task.model, task.edited, training, lora=task.adapter).lora
    again = add_delta(further, faded.delta)
    assert mean_loss(task, again, [1, 4, 6]) > mean_loss(task, further, [1, 4, 6]) + 0.3


def test_win_u_moves_a_language_models_forget_rows_away(task):
    result = WinU(damping=1e-3).run(task, Workspace(chunk_size=4))
    assert result.cost.total == pytest.approx(5 + 5 * (1 / 3 + 4 * 2 / 3))
    assert mean_loss(task, result.params, [1, 4, 6]) > mean_loss(task, task.adapter, [1, 4, 6])
