"""Repairs after matched steps: what retained rows lost comes back, the named rows stay where they arrived."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.unlearning import matched
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.dispatch import unlearn
from llmeraser_jax.unlearning.targets import Role, RowTargets
from tests.unlearning.test_matched import CONFIG, OBJECTIVE, N, draw, losses, make, memorise
from tests.unlearning.test_matched import memorised as memorised_rows

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


def set_targets(matching, roles, start, ends):
    """Gives a bare `_Matching` its rows."""
    matching.targets = object.__new__(RowTargets)
    values = {"roles": np.array(roles), "start": np.array(start), "ends": np.array(ends)}
    for name, value in values.items():
        object.__setattr__(matching.targets, name, value)
    matching.way = matching.targets.way
    matching.asked = matching.targets.roles != Role.STAYS


# One row does not stand for the others, and a damping this high leaves the step near the plain gradient.
HARMFUL = dataclasses.replace(CONFIG, sample_size=1, damping=10.0, repair_size=24, num_steps=2)


@pytest.mark.parametrize("action", ["remove", "correct"])
def test_repairs_bring_retained_rows_back_and_leave_the_named_ones(alike, action):
    problem, params, heldout = make(alike, action)
    before = losses(params, problem.examples, problem.retained).mean()
    harm, named, steps = {}, {}, {}
    for repairs in (0, 6):
        config = dataclasses.replace(HARMFUL, method="matched", repairs=repairs)
        result = unlearn(OBJECTIVE, params, problem, config, heldout=heldout)
        harm[repairs] = losses(result.params, problem.examples, problem.retained).mean() - before
        named[repairs] = losses(result.params, problem.examples, problem.named).mean()
        steps[repairs] = result.steps
        assert np.isfinite(result.steps[-1].probe_loss) == (repairs > 0)
    assert len(steps[0]) == 2 < len(steps[6])
    assert harm[0] > 0.05  # well above what is called negligible
    assert harm[6] < 0.5 * harm[0]
    assert named[6] > 0.7 * named[0]


def test_repairs_ask_back_what_steps_took_past_its_end(alike, monkeypatch):
    """A linearisation takes two of the four pairs 0.8 too far, which further steps of it would not see."""
    begun, begin = [], matched._Matching.__init__
    monkeypatch.setattr(matched._Matching, "__init__", lambda self, *args: begun.append(self) or begin(self, *args))
    problem, params, heldout = make(alike, "correct")
    past = {}
    for repairs in (0, 6):
        config = dataclasses.replace(HARMFUL, method="matched", repairs=repairs)
        result = unlearn(OBJECTIVE, params, problem, config, heldout=heldout)
        point = begun[-1].measure(result.params, gradients=False)
        past[repairs] = (point.here - begun[-1].targets.ends)[begun[-1].targets.roles == Role.GOES]
    assert past[0].max() > 0.5
    assert np.abs(past[6]).max() < 0.1


def test_what_is_past_its_end_is_worth_a_repair_by_itself(alike, monkeypatch):
    monkeypatch.setattr(matched, "_HARM_BELOW", np.inf)  # no harm to others calls for one
    begun, begin = [], matched._Matching.__init__
    monkeypatch.setattr(matched._Matching, "__init__", lambda self, *args: begun.append(self) or begin(self, *args))
    problem, params, heldout = make(alike, "correct")

    def run(repairs):
        config = dataclasses.replace(HARMFUL, method="matched", num_steps=3, repairs=repairs)
        return unlearn(OBJECTIVE, params, problem, config, heldout=heldout)

    after = run(0).params
    point = begun[-1].measure(after, gradients=False)
    off, left = begun[-1].off(point), begun[-1].left(point)
    assert off > 1.5 * left
    for arrived, num_steps in (((off + left) / 2, 4), (1.1 * off, 3)):
        monkeypatch.setattr(matched, "_CORRECT_ABOVE", arrived)
        assert len(run(1).steps) == num_steps


def test_a_repair_that_takes_rows_away_from_their_ends_is_shortened():
    matching: Any = object.__new__(matched._Matching)
    set_targets(matching, roles=[Role.GOES], start=[0.0], ends=[1.0])
    matching.evaluator = SimpleNamespace(example_losses=lambda params, stack: np.zeros(1))
    # A whole step leads 0.5 of the way past the end, half of it 0.25, a quarter 0.125.
    matching.measure = lambda params, *, gradients: matched._Point(np.array([1 + 0.5 * float(params)]), None)
    guards = object.__new__(matched._Guards)
    for name, value in {"stack": None, "trained": np.zeros(1), "losses": np.zeros(1)}.items():
        object.__setattr__(guards, name, value)
    step = matched._Step(jnp.ones(()), jnp.ones(()), np.ones(1))
    for off, scale in ((0.2, 0.25), (0.3, 0.5), (0.5, 1.0)):
        before = matched._Point(np.array([1 - off]), None)
        found, _ = matched._accepted(matching, jnp.zeros(()), step, before, guards, gradients=False)
        assert found == scale


def test_what_was_past_its_end_from_the_start_and_what_is_known_too_well_are_left():
    matching = object.__new__(matched._Matching)
    set_targets(matching, roles=[Role.GOES, Role.GOES, Role.WANTED], start=[-1.0, 1.5, 0.0], ends=[1.0, 1.0, -1.0])
    too_far = matched._Point(np.array([1.5, 1.5, -2.0]), None)
    np.testing.assert_allclose(matching.demand(too_far), [-0.5, 0, 0])
    assert matching.off(too_far) == pytest.approx(0.5 / 3) and matching.left(too_far) == 0
    on_the_way = matched._Point(np.array([0.5, 0.5, 0.0]), None)
    np.testing.assert_allclose(matching.demand(on_the_way), [0.5, 0.5, -1])
    assert matching.left(on_the_way) == matching.off(on_the_way) == pytest.approx(2 / 3)


def test_nothing_is_repaired_where_a_fresh_sample_lost_nothing(memorised):
    problem, params, heldout = make(memorised, "remove")
    everything = dataclasses.replace(CONFIG, sample_size=48, num_steps=8, repairs=5, damping=1e-6)
    result = unlearn(OBJECTIVE, params, problem, everything, heldout=heldout)
    repaired = [step for step in result.steps if np.isfinite(step.probe_loss)]
    assert result.complete and len(repaired) < 5
    # What ended them: the last sample's harm is no more than what is called negligible.
    after = losses(result.params, problem.examples, problem.retained).mean()
    assert after - losses(params, problem.examples, problem.retained).mean() < 0.05


def test_a_budget_takes_fewer_steps_to_leave_room_for_a_repair(memorised):
    problem, params, heldout = make(memorised, "remove")
    config = dataclasses.replace(CONFIG, sample_size=8, repair_size=8, damping=1e-3)
    # Held-out and named rows 44 / 3; a sample 8; the rows before the first step and after each; a repair's check
    # and guards.
    for num_steps, samples in ((4, 2), (3, 2), (2, 1)):
        cost = (40 + 4) / 3 + (num_steps + 1) * 4 + samples * 8 + 4 / 3 + 8 * 5 / 3
        budget = dataclasses.replace(config, budget=1.0)
        result = unlearn(OBJECTIVE, params, problem, budget, heldout=heldout, retrain_cost=cost + 0.1)
        assert sum(np.isnan(step.probe_loss) for step in result.steps) == num_steps
        assert result.cost.total <= cost + 0.1


def test_a_repair_takes_the_guards_that_the_budget_leaves(alike):
    problem, params, heldout = make(alike, "remove")
    config = dataclasses.replace(HARMFUL, repairs=3, repair_size=40, budget=1.0)
    # Held-out and named rows, rows around two steps, a curvature row of each bucket, and 20 guards with the last
    # check.
    cost = (40 + 4) / 3 + 3 * 4 + 2 + 4 / 3 + 20 * 5 / 3
    result = unlearn(OBJECTIVE, params, problem, config, heldout=heldout, retrain_cost=cost + 0.1)
    assert len(result.steps) == 3 and "no room for another step" in result.stopped
    assert result.cost.total == pytest.approx(cost)


@pytest.mark.parametrize(("changes", "named"), [({"repairs": -1}, "repairs"), ({"repair_size": 0}, "repair_size")])
def test_bad_repairs_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        EraseConfig(**changes)
