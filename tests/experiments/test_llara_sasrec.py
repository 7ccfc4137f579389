"""SASRec: causality, padding, overfitting, and its embeddings as hybrid prompts read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.llara import sasrec
from experiments.llara.sasrec import Sasrec, SasrecConfig

CONFIG = SasrecConfig(
    num_items=9, width=16, num_layers=2, num_heads=2, max_length=5, dropout=0.0, epochs=150, batch_size=4,
    learning_rate=1e-2,
)  # fmt: skip
CYCLES = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [5, 6, 7, 8], [8, 7, 6, 5]]


@pytest.fixture(scope="module")
def fresh():
    module = Sasrec(CONFIG)
    params = module.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))["params"]
    return jax.jit(lambda items: module.apply({"params": params}, items))


@pytest.fixture(scope="module")
def trained():
    return sasrec.train_sasrec(CYCLES, CONFIG)


def test_a_later_item_changes_no_earlier_state(fresh):
    items = np.array([[0, 1, 2, 3, 4]], np.int32)
    for place in range(5):
        changed = items.copy()
        changed[0, place] = 7
        difference = np.abs(np.asarray(fresh(changed)) - np.asarray(fresh(items)))[0].max(-1)
        np.testing.assert_array_equal(difference[:place], 0)
        assert np.all(difference[place:] > 1e-4)


def test_padding_changes_no_state_of_a_real_item(fresh):
    padded = np.array([[3, 1, 9, 9, 9]], np.int32)
    np.testing.assert_allclose(fresh(padded)[:, :2], fresh(np.array([[3, 1, 2, 5, 6]], np.int32))[:, :2], atol=1e-6)
    assert not np.any(np.isnan(np.asarray(fresh(padded))))


def test_the_loss_is_binary_cross_entropy_over_real_targets():
    module = Sasrec(CONFIG)
    inputs = np.array([[0, 1, 9, 9, 9]], np.int32)
    targets = np.array([[1, 2, 9, 9, 9]], np.int32)
    negatives = np.array([[5, 6, 7, 7, 7]], np.int32)
    params = module.init(jax.random.key(0), jnp.asarray(inputs))["params"]
    states = np.asarray(module.apply({"params": params}, jnp.asarray(inputs)))[0]
    table = np.asarray(params["items"]["embedding"])
    expected = 0.0
    for k in range(2):
        positive, negative = states[k] @ table[targets[0, k]], states[k] @ table[negatives[0, k]]
        expected += np.log1p(np.exp(-positive)) + np.log1p(np.exp(negative))
    got = sasrec.bce_loss(module, params, *map(jnp.asarray, (inputs, targets, negatives)))
    assert float(got) == pytest.approx(expected / 2, rel=1e-5)


def test_it_overfits_a_few_sequences(trained):
    params, losses = trained
    assert losses[-1] < 0.1 < losses[0]
    # A sequence's own items are no negatives, so the target is told from all the others.
    for cycle in CYCLES:
        for k in range(2, len(cycle)):
            (scores,) = sasrec.rank_next(params, CONFIG, [cycle[:k]])
            others = [item for item in range(CONFIG.num_items) if item not in cycle]
            assert scores[cycle[k]] > scores[others].max() + 1


def test_training_is_the_same_every_time(trained):
    again, losses = sasrec.train_sasrec(CYCLES, CONFIG)
    assert losses == trained[1]
    jax.tree.map(np.testing.assert_array_equal, again, trained[0])


def test_negatives_are_never_of_the_sequence():
    inputs = np.array([[0, 1, 2, 3, 9]], np.int32)
    targets = np.array([[1, 2, 3, 4, 9]], np.int32)
    rng = np.random.default_rng(0)
    for _ in range(30):
        drawn = sasrec._negatives(rng, inputs, targets, CONFIG)
        assert not set(drawn.ravel().tolist()) & {0, 1, 2, 3, 4, 9}


def test_items_outside_the_range_and_empty_data_are_refused():
    with pytest.raises(ValueError, match="Item 9 is outside"):
        sasrec.train_sasrec([[0, 9]], CONFIG)
    with pytest.raises(ValueError, match="nothing to train"):
        sasrec.train_sasrec([[0]], CONFIG)
