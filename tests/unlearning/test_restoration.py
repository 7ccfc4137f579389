"""Restoration steps: what retained rows lost comes back, the forget rows stay where they arrived."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.unlearning import Receipt, Result, TargetMatching, Workspace, matching
from llmeraser_jax.unlearning.matching_rows import MatchingStep
from llmeraser_jax.unlearning.targets import Role, RowTargets
from tests.problems import matching_steps_of, receipt_of
from tests.unlearning.test_target_matching import MATCHING, N, draw, erase_head, losses, make, memorise
from tests.unlearning.test_target_matching import memorised as memorised_rows

memorised = memorised_rows  # the fixture, under a name of this module


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def alike():
    """Memorised rows that have much in common: what moves one moves the others."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        inputs, targets = draw(rng, N)
        return memorise(inputs + 1.5, targets)


def set_targets(bare, roles, start, ends):
    """Gives a bare `_Matching` its rows."""
    bare.targets = object.__new__(RowTargets)
    values = {"roles": np.array(roles), "start": np.array(start), "ends": np.array(ends)}
    for name, value in values.items():
        object.__setattr__(bare.targets, name, value)
    bare.way = bare.targets.way
    bare.asked = bare.targets.roles != Role.STAYS


# One row does not stand for the others, and a damping this high leaves the step near the plain gradient.
HARMFUL = TargetMatching(sample_size=1, damping=10.0, num_steps=2)


def restore(problem, params, calibration, restoration_steps: int, **changes) -> tuple[Result, Receipt]:
    """A harmful move with at most so many restoration steps."""
    rows = 24 if restoration_steps else None
    changes = {"restoration_steps": restoration_steps, "restoration_rows": rows, **changes}
    result = erase_head(problem, params, dataclasses.replace(HARMFUL, **changes), calibration)
    return result, receipt_of(result)


@pytest.mark.parametrize("action", ["remove", "correct"])
def test_restoration_brings_retained_rows_back_and_leaves_the_named_ones(alike, action):
    problem, params, calibration = make(alike, action)
    before = losses(params, problem.examples, problem.retained).mean()
    harm, named, steps = {}, {}, {}
    for allowed in (0, 6):
        result, _ = restore(problem, params, calibration, allowed)
        harm[allowed] = losses(result.params, problem.examples, problem.retained).mean() - before
        named[allowed] = losses(result.params, problem.examples, problem.named).mean()
        steps[allowed] = matching_steps_of(result)
        last = steps[allowed][-1]
        assert last.restoration == np.isfinite(last.retained_loss) == (allowed > 0)
    assert len(steps[0]) == 2 < len(steps[6])
    assert harm[0] > 0.05  # well above what is called negligible
    assert harm[6] < 0.5 * harm[0]
    assert named[6] > 0.7 * named[0]


def test_restoration_asks_back_what_steps_took_past_its_end(alike, monkeypatch):
    """A linearisation takes two of the four pairs 0.8 too far, which further steps of it would not see."""
    begun, begin = [], matching._Matching.__init__
    monkeypatch.setattr(
        matching._Matching, "__init__", lambda self, *args: begun.append(self) or begin(self, *args)
    )
    problem, params, calibration = make(alike, "correct")
    past = {}
    for allowed in (0, 6):
        result, _ = restore(problem, params, calibration, allowed)
        point = begun[-1].measure(result.params, gradients=False)
        past[allowed] = (point.here - begun[-1].targets.ends)[begun[-1].targets.roles == Role.GOES]
    assert past[0].max() > 0.5
    assert np.abs(past[6]).max() < 0.1


def test_what_is_past_its_end_is_worth_a_restoration_step_by_itself(alike, monkeypatch):
    monkeypatch.setattr(matching, "_HARM_BELOW", np.inf)  # no harm to others calls for one
    begun, begin = [], matching._Matching.__init__
    monkeypatch.setattr(
        matching._Matching, "__init__", lambda self, *args: begun.append(self) or begin(self, *args)
    )
    problem, params, calibration = make(alike, "correct")

    def run(allowed):
        return restore(problem, params, calibration, allowed, num_steps=3)

    after = run(0)[0].params
    point = begun[-1].measure(after, gradients=False)
    off, left = begun[-1].off(point), begun[-1].left(point)
    assert off > 1.5 * left
    for arrived, num_steps in (((off + left) / 2, 4), (1.1 * off, 3)):
        monkeypatch.setattr(matching, "_CORRECT_ABOVE", arrived)
        assert len(run(1)[1].steps) == num_steps


def test_a_restoration_step_that_takes_rows_away_from_their_ends_is_shortened(monkeypatch):
    bare: Any = object.__new__(matching._Matching)
    set_targets(bare, roles=[Role.GOES], start=[0.0], ends=[1.0])
    bare.task, bare.workspace = SimpleNamespace(objective=None), Workspace()
    monkeypatch.setattr(matching, "per_example", lambda fn, stack, *args: np.zeros(1))
    # A whole step leads 0.5 of the way past the end, half of it 0.25, a quarter 0.125.
    bare.measure = lambda params, *, gradients: matching._Point(np.array([1 + 0.5 * float(params)]), None)
    constraints = object.__new__(matching._RetainConstraints)
    for name, value in {"stack": None, "trained": np.zeros(1), "losses": np.zeros(1)}.items():
        object.__setattr__(constraints, name, value)
    step = MatchingStep(jnp.ones(()), np.ones(1), 1.0, 0.0, 0.0)
    for off, scale in ((0.2, 0.25), (0.3, 0.5), (0.5, 1.0)):
        before = matching._Point(np.array([1 - off]), None)
        found, _ = bare.accepted(jnp.zeros(()), step, before, constraints, gradients=False)
        assert found == scale


def test_what_was_past_its_end_from_the_start_and_what_is_known_too_well_are_left():
    bare = object.__new__(matching._Matching)
    set_targets(bare, roles=[Role.GOES, Role.GOES, Role.WANTED], start=[-1.0, 1.5, 0.0], ends=[1.0, 1.0, -1.0])
    too_far = matching._Point(np.array([1.5, 1.5, -2.0]), None)
    np.testing.assert_allclose(bare.demand(too_far), [-0.5, 0, 0])
    assert bare.off(too_far) == pytest.approx(0.5 / 3) and bare.left(too_far) == 0
    on_the_way = matching._Point(np.array([0.5, 0.5, 0.0]), None)
    np.testing.assert_allclose(bare.demand(on_the_way), [0.5, 0.5, -1])
    assert bare.left(on_the_way) == bare.off(on_the_way) == pytest.approx(2 / 3)


def test_nothing_is_restored_where_a_fresh_sample_lost_nothing(memorised):
    problem, params, calibration = make(memorised, "remove")
    everything = TargetMatching(sample_size=48, num_steps=8, damping=1e-6)
    result = erase_head(problem, params, everything, calibration)
    assert receipt_of(result).complete and sum(step.restoration for step in matching_steps_of(result)) < 5
    # What ended them: the last sample's harm is no more than what is called negligible.
    after = losses(result.params, problem.examples, problem.retained).mean()
    assert after - losses(params, problem.examples, problem.retained).mean() < 0.05


def test_a_budget_takes_fewer_steps_to_leave_room_for_a_restoration_step(memorised):
    problem, params, calibration = make(memorised, "remove")
    method = TargetMatching(sample_size=8, restoration_rows=8, damping=1e-3)
    # Calibration and named rows 44 / 3; a sample 8; the rows before the first step and after each; a restoration
    # step's check and constraints.
    for num_steps, samples in ((4, 2), (3, 2), (2, 1)):
        cost = (40 + 4) / 3 + (num_steps + 1) * 4 + samples * 8 + 4 / 3 + 8 * 5 / 3
        result = erase_head(problem, params, method, calibration, 1.0, retraining_cost=cost + 0.1)
        assert sum(not step.restoration for step in matching_steps_of(result)) == num_steps
        assert result.cost.total <= cost + 0.1


def test_a_restoration_step_takes_the_constraints_that_the_budget_leaves(alike):
    problem, params, calibration = make(alike, "remove")
    method = dataclasses.replace(HARMFUL, restoration_steps=3, restoration_rows=40)
    # Calibration and named rows, rows around two steps, a curvature row of each bucket, and 20 constraints with the
    # last check.
    cost = (40 + 4) / 3 + 3 * 4 + 2 + 4 / 3 + 20 * 5 / 3
    result = erase_head(problem, params, method, calibration, 1.0, retraining_cost=cost + 0.1)
    receipt = receipt_of(result)
    assert len(receipt.steps) == 3 and "no room for another step" in receipt.outcome
    assert result.cost.total == pytest.approx(cost)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"restoration_steps": -1}, "restoration_steps"),
        ({"restoration_rows": 0}, "restoration_rows"),
        ({"restoration_steps": 0, "restoration_rows": 5}, "restoration_rows is 5, and restoration_steps 0"),
    ],
)
def test_bad_restoration_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(MATCHING, **changes)
