"""The rule that maps the drift of a chain to advice."""

import dataclasses

import pytest

from llmeraser_jax.unlearning.drift import COST, DISTANCE, RETAINED_RISE, Drift, advise, words_of

STILL = Drift(
    erasures=1,
    rows=2,
    product_distance=0.0,
    product_walk=0.0,
    product_norm=4.0,
    retained_rise=0.0,
    calibration_rise=None,
    harm_bound=0.05,
    cost=0.0,
)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "keep on"),
        ({"retained_rise": -1.0}, "keep on"),
        ({"retained_rise": 0.99 * RETAINED_RISE[0] * 0.05}, "keep on"),
        ({"retained_rise": 1.01 * RETAINED_RISE[0] * 0.05}, "retrain soon"),
        ({"retained_rise": 1.01 * RETAINED_RISE[1] * 0.05}, "retrain now"),
        ({"product_distance": 4.04 * DISTANCE[0]}, "retrain soon"),
        ({"product_distance": 4.04 * DISTANCE[1]}, "retrain now"),
        ({"product_walk": 4.04 * DISTANCE[1]}, "keep on"),
        ({"product_walk": 4.04 * DISTANCE[1], "product_distance": None}, "retrain now"),
        ({"cost": 1.01 * COST[0]}, "retrain soon"),
        ({"cost": None}, "keep on"),
        ({"cost": 1.01 * COST[0], "retained_rise": 1.01 * RETAINED_RISE[1] * 0.05}, "retrain now"),
    ],
)
def test_the_worst_of_three_numbers_decides(changes, advice):
    drift = advise(dataclasses.replace(STILL, **changes))
    assert drift.advice == advice and bool(drift.reasons) == (advice != "keep on")
    assert drift.words.startswith(f"{advice}: 1 erasure of 2 rows")


def test_receipts_of_retrainings_and_of_other_programs_have_no_drift():
    assert words_of({"drift": None, "method": "retrained"}).startswith("none")
    assert words_of({"method": "path"}) == "not recorded"
    assert words_of({"method": "path", "drift": advise(STILL).to_mapping()}).startswith("keep on")
