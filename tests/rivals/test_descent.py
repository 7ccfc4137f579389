"""Descents on a tiny run: where they move, what they raise and lower, what they count, how often they trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import data, trees
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.losses import gradient_sum, lm_objective
from llmeraser_jax.rivals import (
    MSA,
    NPO,
    PDU,
    RMU,
    UNDIAL,
    WGA,
    E2URec,
    EqualLengthAscent,
    GradientAscent,
    GradientDifference,
    KFade,
    KLAnchoredAscent,
    SimNPO,
    WinU,
    descent,
)
from llmeraser_jax.rivals.terms import CrossEntropy, terms_gradient
from llmeraser_jax.unlearning import Workspace
from tests.rivals.conftest import MIXED

WORKSPACE = Workspace()
QUICK = {"epochs": 6, "batch_size": 2, "learning_rate": 0.03, "seed": 5}
METHODS = {
    "gradient-ascent": GradientAscent(**QUICK),
    "gradient-difference": GradientDifference(**QUICK),
    "kl-anchored-ascent": KLAnchoredAscent(**QUICK, retain_weight=3.0),
    "npo": NPO(**QUICK, beta=0.2),
    "simnpo": SimNPO(**QUICK, beta=1.0),
    "wga": WGA(**QUICK),
    "undial": UNDIAL(**QUICK, strength=5.0),
    "pdu": PDU(**QUICK, retain_weight=0.5, dual_rate=2.0),
    "e2urec": E2URec(**QUICK, augment_learning_rate=0.05, augment_epochs=3),
}
# named as trained: r1 removed, r4 corrected, r6 with another query
NAMED, WANTED = np.array([1, 4, 6]), np.array([10, 11])


def num_traces() -> int:
    """How often the compiled function was traced so far."""
    return terms_gradient._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def counted():
    """Gradient equivalents that went through the compiled function, counted from its arguments."""
    total = {"now": 0.0}

    def counting(apply, base, params, teachers, stacks, *, terms):
        for term, stack in zip(terms, stacks, strict=True):
            rows = sum(int(np.count_nonzero(np.asarray(w))) for w in stack.weights)
            total["now"] += rows * (1 + term.num_teachers / 3)
        return terms_gradient(apply, base, params, teachers, stacks, terms=terms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "terms_gradient", counting)
        yield total


@pytest.fixture(scope="module")
def fitted(task, counted):
    results, traces = {}, {}
    for name, rival in METHODS.items():
        counted["now"] = 0.0
        before = num_traces()
        results[name] = (rival.run(task, WORKSPACE), counted["now"])
        traces[name] = num_traces() - before
    return results, traces


def losses(task, params, rows):
    return score_examples(task.model, params, task.problem.examples, np.asarray(rows)).losses


def test_the_request_is_what_the_tests_take_it_for(task):
    assert task.problem.named.tolist() == NAMED.tolist()
    assert task.problem.replacements.tolist() == [-1, 10, 11]
    assert task.current.tolist() == [0, -1, 2, 3, 10, 5, 11, 7, 8, 9]
    assert task.edited.ids == ("r0", "r2", "r3", "r4", "r5", "r6", "r7", "r8", "r9")
    assert [e.response for e in task.edited.examples][3] == "grey"


@pytest.mark.parametrize("name", METHODS)
def test_what_is_to_go_becomes_less_probable(task, fitted, name):
    before, after = (losses(task, params, NAMED) for params in (task.adapter, fitted[0][name][0].params))
    assert after.mean() > before.mean() + 0.05


# PDU flattens all that is predicted at the queries of S, which the wanted pair of a correction shares.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "pdu"])
def test_what_was_trained_on_becomes_less_probable_against_what_is_wanted(task, fitted, name):
    margins = [
        np.mean(losses(task, params, WANTED) - losses(task, params, NAMED)[1:])
        for params in (task.adapter, fitted[0][name][0].params)
    ]
    assert margins[1] < margins[0] - 0.1


def test_retained_rows_hold_the_ascent_back(task, fitted):
    retained = task.problem.retained
    after = {name: losses(task, result.params, retained).mean() for name, (result, _) in fitted[0].items()}
    assert after["gradient-difference"] < after["gradient-ascent"] - 0.1
    assert after["kl-anchored-ascent"] < after["gradient-ascent"] - 0.1


@pytest.mark.parametrize("name", METHODS)
def test_the_cost_is_that_of_the_passes_made(fitted, name):
    result, counted = fitted[0][name]
    augmenting = 3 * 3 if name == "e2urec" else 0  # epochs and named rows of the augmented adapter
    assert result.cost.training == pytest.approx(counted + augmenting, rel=1e-12)
    assert result.cost.preparation == 0


def test_the_costs_by_hand(fitted):
    # 3 named rows in batches of 2 are 2 steps an epoch, 6 epochs; 2 of the rows are edits; 2 retained rows a step
    # of the 7 there are: the last of every 4 steps has but 1.
    steps, retained = 12, 3 * 7
    cost = {name: result.cost.training for name, (result, _) in fitted[0].items()}
    assert cost["gradient-ascent"] == 6 * (3 + 2)
    assert cost["gradient-difference"] == 6 * (3 + 2) + retained
    assert cost["kl-anchored-ascent"] == pytest.approx(6 * (3 + 2) + retained * 4 / 3)
    assert cost["npo"] == pytest.approx(6 * (3 * 4 / 3 + 2) + retained)
    assert cost["simnpo"] == cost["wga"] == cost["pdu"] == 6 * (3 + 2) + retained
    assert cost["undial"] == pytest.approx(6 * (3 * 4 / 3 + 2))
    # The first epoch looks at S alone; steps 2 to 11 then take 2, 1, 2, 2, 2, 1, 2, 2, 2, 1 retained rows.
    assert cost["e2urec"] == pytest.approx(9 + 6 * (3 * 5 / 3 + 2) + 17 * 4 / 3)
    assert all(result.details["num_steps"] == steps for result, _ in fitted[0].values())


@pytest.mark.parametrize("name", METHODS)
def test_one_trace_serves_all_steps_of_a_phase(fitted, name):
    assert fitted[1][name] <= (2 if name == "e2urec" else 1)


def test_fitting_again_gives_the_same_adapter_and_another_seed_another(task, fitted):
    again = METHODS["gradient-difference"].run(task, WORKSPACE).params
    other = dataclasses.replace(METHODS["gradient-difference"], seed=6).run(task, WORKSPACE).params
    leaves = [jax.tree.leaves(p) for p in (fitted[0]["gradient-difference"][0].params, again, other)]
    assert all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))


def stack(task, rows, weights):
    """At most two rows, in the shapes of the fitted methods' batches, so that nothing is compiled anew."""
    weights = np.broadcast_to(np.asarray(weights, float), len(rows))
    return task.problem.examples.stack_uniform(np.asarray(rows), weights, chunk_size=2)


def gradient(task, name, weights, params=None):
    """Gradient of a method's terms on two named rows, both replacements and two retained rows, each weighted."""
    (*_, phase) = METHODS[name].phases()
    terms = (phase.forget, CrossEntropy(), *((phase.retain,) if phase.retain else ()))
    rows = (NAMED[:2], WANTED, [0, 2])[: len(terms)]
    return terms_gradient(
        task.model.apply,
        task.model.base,
        task.adapter if params is None else params,
        METHODS[name].teachers(task)[0],
        tuple(stack(task, r, w) for r, w in zip(rows, weights, strict=True)),
        terms=terms,
    )[1]


def plain_gradient(task, rows, weights):
    """Of the weighted sum of cross entropies."""
    objective = lm_objective(task.model.apply, task.model.base, l2=0.0)
    return gradient_sum(objective, task.adapter, stack(task, rows, weights))


def assert_close(got, want, tolerance=1e-5):
    scale = float(trees.tree_norm(want))
    assert float(trees.tree_norm(trees.tree_sub(got, want))) <= tolerance * scale


def test_gradient_difference_is_ascent_minus_the_retained_rows_gradient(task, fitted):
    ascent = gradient(task, "gradient-ascent", (0.5, 0.5))
    difference = gradient(task, "gradient-difference", (0.5, 0.5, 0.25))
    assert_close(trees.tree_sub(difference, ascent), plain_gradient(task, [0, 2], 0.25))
    up, down = plain_gradient(task, NAMED[:2], 0.5), plain_gradient(task, WANTED, 0.5)
    assert_close(ascent, trees.tree_sub(down, up))


def test_npo_at_the_reference_moves_like_ascent_on_whole_responses(task, fitted):
    # There the two probabilities are equal and the weight 2 / (1 + 1) is 1, whatever beta is.
    lengths = task.problem.examples.num_targets[NAMED[:2]].astype(float)
    assert_close(gradient(task, "npo", (1.0, 0.0, 0.0)), plain_gradient(task, NAMED[:2], -lengths))


def test_the_anchor_has_no_gradient_at_the_trained_adapter_and_one_elsewhere(task, fitted):
    moved = jax.tree.map(lambda x: 1.1 * x, task.adapter)
    here = gradient(task, "kl-anchored-ascent", (0.0, 0.0, 1.0))
    there = gradient(task, "kl-anchored-ascent", (0.0, 0.0, 1.0), params=moved)
    assert float(trees.tree_norm(here)) < 1e-4 * float(trees.tree_norm(there))


def test_the_first_step_of_ascent_is_adams_along_the_right_hand_side(task, fitted, finished_run):
    requests = data.parse_requests(MIXED[:2], finished_run.load_examples())
    two = dataclasses.replace(task, requests=requests)
    rival = GradientAscent(epochs=1, batch_size=2, learning_rate=0.01, warmup_ratio=0.0)
    got = rival.run(two, WORKSPACE).delta
    # r1 is removed and r4 corrected: up on both as trained, down on the replacement, the row after the ten.
    along = trees.tree_sub(plain_gradient(two, [1, 4], 0.5), plain_gradient(two, [10], 0.5))
    # Adam's first direction is g / (|g| + eps): only entries well above rounding tell its sign.
    for step, g in zip(jax.tree.leaves(got), jax.tree.leaves(along), strict=True):
        clear = np.abs(g) > 1e-4
        assert clear.sum() > 5
        np.testing.assert_allclose(step[clear], 0.01 * np.sign(g)[clear], rtol=1e-3)


def test_wanted_pairs_weigh_as_much_as_retained_rows():
    (phase,) = SimNPO().phases()
    assert phase.wanted_weight == phase.retain_weight == 1 / 0.1375 and phase.forget_weight == 1
    (alone,) = NPO(retain_weight=0.0).phases()
    assert alone.wanted_weight == 1 and alone.retain is None


def test_the_multiplier_rises_by_the_excess_of_the_retained_loss_and_never_below_zero(task):
    method = PDU(epochs=6, batch_size=2, learning_rate=0.03, seed=5, retain_weight=0.5, dual_rate=2.0)
    history = method.run(task, WORKSPACE).details["loss_terms"]
    weight, bound = 0.5, history[0]["retain"] / 0.5 + 0.1
    for terms in history:
        assert terms["multiplier"] == pytest.approx(weight, rel=1e-5)
        weight = max(weight + 2.0 * (terms["retain"] / weight - bound), 1e-6)
    assert history[-1]["multiplier"] > 0.6
    # With slack that is never used up the multiplier falls to (nearly) nothing.
    loose = dataclasses.replace(method, retain_slack=50.0).run(task, WORKSPACE).details["loss_terms"]
    assert loose[-1]["multiplier"] == 1e-6


def test_a_diverging_descent_is_an_error(task):
    broken = dataclasses.replace(task, adapter=jax.tree.map(lambda x: x * jnp.nan, task.adapter))
    with pytest.raises(FloatingPointError, match="at step 1 of 12 a loss is nan or infinite"):
        METHODS["gradient-ascent"].run(broken, WORKSPACE)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: NPO(beta=0.0), "beta is 0.0; it must be a number above 0"),
        (lambda: SimNPO(gamma=-1.0), "gamma is -1.0"),
        (lambda: GradientDifference(retain_weight=0.0), "retain_weight is 0.0"),
        (lambda: GradientAscent(epochs=0), "epochs is 0"),
        (lambda: KLAnchoredAscent(retain_batch_size=0), "retain_batch_size is 0"),
        (lambda: E2URec(forget_share=1.0), "forget_share is 1.0"),
        (lambda: E2URec(epochs=2, forget_only_epochs=2), "forget_only_epochs is 2 of 2 epochs"),
        (lambda: EqualLengthAscent(length=0.0), "length is 0.0"),
        (lambda: WGA(beta=-1.0), "beta is -1.0"),
        (lambda: PDU(dual_rate=0.0), "dual_rate is 0.0"),
        (lambda: RMU(depth=1.5), "depth is 1.5; it is a share"),
        (lambda: KFade(kl=0.0), "kl is 0.0"),
        (lambda: WinU(max_leverage=1.0), "max_leverage is 1.0; it must lie between"),
        (lambda: MSA(scale=0.0), "scale is 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
