"""The registry, tasks from a run directory, and the package's own methods behind the same interface."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from llmeraser_jax import data, trees
from llmeraser_jax.losses import lm_objective
from llmeraser_jax.rivals import RIVALS, FinetuneEdited, get_method
from llmeraser_jax.runs import RunError
from llmeraser_jax.solvers import ConjugateGradients, QuadraticDescent
from llmeraser_jax.training import finetune
from llmeraser_jax.unlearning import (
    METHODS,
    PUBLIC_SCRIPT,
    CurvatureSpec,
    Method,
    Step,
    UnlearningTask,
    erase,
    task_of_run,
)
from tests.problems import receipt_of
from tests.rivals.conftest import MIXED


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_method_is_there_and_has_the_interface():
    assert set(RIVALS) >= {
        "retrain",
        "sisa",
        "receraser",
        "gradient-ascent",
        "gradient-difference",
        "kl-anchored-ascent",
        "npo",
        "simnpo",
        "e2urec",
        "finetune-edited",
    }
    assert set(METHODS) >= {
        "auto",
        "target-matching",
        "path",
        "step",
        "paper-step",
        "paper-descent",
        "public-script",
    }
    assert not set(RIVALS) & set(METHODS)
    for name, method in {**METHODS, **RIVALS}.items():
        assert isinstance(method, Method)
        assert hash(method) == hash(dataclasses.replace(method))  # pyright: ignore[reportArgumentType]
        room = "rivals" if name in RIVALS else "unlearning"
        assert type(method).__module__.startswith(f"llmeraser_jax.{room}.")
        assert get_method(name) is method
    with pytest.raises(ValueError, match="There is no method 'magic'; there are auto, target-matching"):
        get_method("magic")


def test_a_run_and_its_requests_are_a_task(finished_run, model):
    requests = data.parse_requests(MIXED, finished_run.load_examples())
    task = task_of_run(finished_run, requests, model=model)
    result = erase(task, FinetuneEdited(epochs=1))
    edited = data.apply_requests(finished_run.load_examples(), requests)
    dataset = finished_run.encode(edited, model.tokenizer)
    training = dataclasses.replace(finished_run.train_config, epochs=1)
    expected = finetune(model, dataset, training, lora=finished_run.load_adapter(model))
    assert_same(result.params, expected.lora)
    assert result.cost.training == result.cost.total == 9.0
    assert result.cost.share_of_retraining == pytest.approx(0.1)
    assert result.model is model and result.receipt is None
    with pytest.raises(ValueError, match="9 examples have no user, the first is 'r1'"):
        task_of_run(finished_run, requests, model=model, users={"r0": "a"})


def test_unknown_hyper_parameters_are_refused_where_they_are_repeated(task):
    with pytest.raises(RunError, match="did not state learning_rate, which this method repeats"):
        erase(dataclasses.replace(task, unstated=("learning_rate",)), FinetuneEdited())


def test_no_requests_are_refused(task):
    with pytest.raises(ValueError, match="There are no requests"):
        dataclasses.replace(task, requests=())


def test_a_task_is_all_of_a_language_model_or_all_of_another_objective(task):
    with pytest.raises(ValueError, match="A task is a Model with data and requests, or an Objective"):
        dataclasses.replace(task, model=task.objective)
    with pytest.raises(ValueError, match="needs its data and its training"):
        dataclasses.replace(task, training=None)


def test_a_rival_that_needs_texts_refuses_another_objective(task):
    bare = UnlearningTask(model=task.objective, adapter=task.adapter, requests=task.problem)
    with pytest.raises(TypeError, match="needs a language model"):
        erase(bare, RIVALS["npo"])


def test_a_task_of_a_run_is_the_problem_of_its_objective_with_the_runs_l2(task):
    step = Step(
        curvature=CurvatureSpec(sample_size=4),
        solver=ConjugateGradients(rtol=0.05, max_steps=3),
        trust_region=None,
    )
    result = erase(task, step, chunk_size=4)
    model = task.language_model
    bare = UnlearningTask(
        model=lm_objective(model.apply, model.base, l2=1e-3),
        adapter=task.adapter,
        requests=task.problem,
        modified=np.array([False, False, True]),
    )
    expected = erase(bare, step, chunk_size=4)
    assert_same(result.params, expected.params)
    assert float(trees.tree_norm(result.delta)) > 0
    receipt = receipt_of(result)
    assert receipt.gradient_equivalents == result.cost
    assert dataclasses.replace(result.cost, retraining=None) == expected.cost
    assert receipt.outcome == receipt_of(expected).outcome
    assert receipt.counts == receipt_of(expected).counts == {"remove": 1, "correct_response": 1, "modify_query": 1}
    told = json.loads(json.dumps(receipt.to_mapping()))["config"]
    assert told["method"]["type"] == "Step" and told["chunk_size"] == 4
    assert told["method"]["solver"]["max_steps"] == 3 and told["method"]["curvature"]["sample_size"] == 4


def test_the_papers_step_has_a_method_for_each_way_to_solve_for_it(task):
    """Damped until it has a minimum. The public script's constants move every number by about 2e-4 in any case."""
    solvers = {
        "paper-step": ConjugateGradients(rtol=1e-4, max_steps=20),
        # Of mini-batches of one: the last iterate's noise is in proportion to the rate.
        "paper-descent": QuadraticDescent(learning_rate=2e-3, num_steps=400, batch_size=1),
        "public-script": PUBLIC_SCRIPT.solver,
    }
    moved = {}
    for name, solver in solvers.items():
        method = METHODS[name]
        assert isinstance(method, Step) and type(method.solver) is type(solver)
        assert (method.curvature.kind, method.curvature.data) == ("hessian", "all")
        assert method.rhs == "influence" and method.trust_region is None
        damped = dataclasses.replace(method.curvature, damping=30.0)
        changed = dataclasses.replace(method, curvature=damped, solver=solver)
        moved[name] = erase(task, changed, math.inf, chunk_size=1).delta
    exact = moved["paper-step"]
    descended = trees.tree_norm(trees.tree_sub(moved["paper-descent"], exact)) / trees.tree_norm(exact)
    assert float(descended) < 0.1
    assert 1e-4 < float(trees.tree_max_abs(moved["public-script"])) < 4e-4
