"""Training options: what is refused, and by which name."""

import pytest

from llmeraser_jax.training import TrainConfig


def test_steps_count_the_smaller_last_batch_of_every_epoch():
    assert TrainConfig(epochs=3, batch_size=4).num_steps(10) == 9
    assert TrainConfig(epochs=3, batch_size=5).num_steps(10) == 6


def test_a_mapping_comes_back_as_the_same_configuration():
    config = TrainConfig(epochs=7, max_grad_norm=1.0, microbatch_size=2, seed=5)
    assert TrainConfig.from_mapping(config.to_mapping()) == config


def test_unknown_options_are_all_named():
    with pytest.raises(ValueError, match=r"Unknown training options: lr, optimiser\."):
        TrainConfig.from_mapping({"lr": 1, "optimiser": "sgd", "epochs": 2})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("microbatch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_ratio", 1.0),
        ("l2", -1e-3),
        ("weight_decay", -1e-3),
        ("seed", -1),
        ("seed", 2**32),
        ("adam_b1", 1.0),
        ("adam_eps", 0.0),
        ("max_grad_norm", 0.0),
        ("checkpoint_every_steps", 0),
    ],
)
def test_an_invalid_value_is_refused_with_its_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is "):
        TrainConfig(**{field: value})


def test_a_micro_batch_larger_than_the_batch_is_refused():
    with pytest.raises(ValueError, match="microbatch_size is 8 and batch_size 4"):
        TrainConfig(batch_size=4, microbatch_size=8)
