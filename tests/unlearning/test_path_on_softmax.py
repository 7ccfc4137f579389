"""On a convex softmax head the path converges to retraining as O(1/K), in all three categories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from llmeraser_jax.losses import Objective
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.unlearning import CurvatureSpec, EditProblem, Path, TrustRegion, UnlearningTask, erase
from tests.problems import ArrayExamples, receipt_of

N, D, CLASSES, L2 = 60, 4, 3, 1e-2


def logits(frozen, params, batch):
    return batch.inputs @ params["w"]


def cross_entropy(z, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), batch.targets[:, None], axis=-1)[:, 0]


def fit(inputs, targets) -> np.ndarray:
    """Minimiser of the mean objective, by SciPy's BFGS to rounding."""

    def value_and_gradient(flat):
        w = flat.reshape(D, CLASSES)
        z = inputs @ w
        log_probs = z - np.log(np.exp(z).sum(1, keepdims=True))
        loss = -log_probs[np.arange(len(z)), targets].mean() + L2 / 2 * (w**2).sum()
        error = np.exp(log_probs)
        error[np.arange(len(z)), targets] -= 1
        return loss, (inputs.T @ error / len(z) + L2 * w).ravel()

    found = minimize(value_and_gradient, np.zeros(D * CLASSES), jac=True, method="BFGS", options={"gtol": 1e-11})
    return found.x.reshape(D, CLASSES)


def make_problem(action: str):
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(N, D))
    targets = (inputs @ rng.normal(size=(D, CLASSES)) + rng.normal(size=(N, CLASSES))).argmax(1)
    named = np.arange(0, 18, 2)
    new_inputs, new_targets = inputs[named].copy(), targets[named].copy()
    if action == "correct":
        new_targets = (new_targets + 1) % CLASSES
    if action == "modify":
        new_inputs += rng.normal(size=new_inputs.shape)
    examples = ArrayExamples(np.concatenate([inputs, new_inputs]), np.concatenate([targets, new_targets]))
    replacements = np.full(len(named), -1) if action == "remove" else N + np.arange(len(named))
    problem = EditProblem(examples, N, named, replacements)
    after = np.concatenate([problem.retained, problem.wanted])
    return problem, fit(inputs, targets), fit(examples.inputs[after], examples.targets[after])


@pytest.mark.parametrize("action", ["remove", "modify", "correct"])
def test_path_error_falls_at_least_as_one_over_the_number_of_steps(action):
    with jax.enable_x64(True):
        problem, before, retrained = make_problem(action)
        objective = Objective((), None, logits, cross_entropy, L2)
        task = UnlearningTask(model=objective, adapter={"w": jnp.asarray(before)}, requests=problem)
        errors = []
        for num_steps in (4, 8, 16, 32):
            path = Path(
                num_steps=num_steps,
                curvature=CurvatureSpec(data="all", damping=0.0),
                solver=ConjugateGradients(rtol=1e-12, max_steps=60),
                trust_region=TrustRegion(max_step_ratio=0.0),
            )
            result = erase(task, path, chunk_size=80)
            receipt = receipt_of(result)
            assert receipt.left == 0
            assert [step.scale for step in receipt.steps] == [1.0] * num_steps
            errors.append(np.linalg.norm(np.asarray(result.params["w"]) - retrained))
        gap = np.linalg.norm(before - retrained)
        rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
        assert errors[-1] < 0.05 * gap, (errors, gap)
        assert np.all(rates > 0.7), (errors, rates)
