"""Ten fine-tuning steps of a sharded Llama against the same on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import data, parallel
from llmeraser_jax.models import load_model
from llmeraser_jax.training import finetune
from tests.training import tiny


@pytest.mark.parametrize(("data_devices", "model_devices"), [(4, 2)])
def test_ten_steps_on_eight_devices_match_one_device_in_float64(model_path, data_path, data_devices, model_devices):
    config = dataclasses.replace(tiny.CONFIG, epochs=5, batch_size=8, learning_rate=0.02)
    results = []
    with jax.enable_x64(True):
        for mesh in (None, parallel.make_mesh(data=data_devices, model=model_devices)):
            model = load_model(model_path, dtype="float64", mesh=mesh)
            lora = model.init_lora(jax.random.key(0), tiny.LORA)
            lora = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), lora)
            dataset = data.encode_examples(data.load_examples(data_path), tiny.RECIPE, model.tokenizer)
            results.append(finetune(model, dataset, config, lora=lora))
    one, eight = results
    assert one.num_steps == eight.num_steps == 10
    for got, want in zip(jax.tree.leaves(eight.lora), jax.tree.leaves(one.lora), strict=True):
        assert got.dtype == jnp.float64 and len(got.sharding.device_set) == 8
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(eight.loss, one.loss, rtol=1e-9)
    np.testing.assert_allclose(eight.gradient_norm, one.gradient_norm, rtol=1e-7)


def test_a_micro_batch_that_the_data_axis_does_not_divide_is_refused(model_path, data_path):
    model = load_model(model_path, mesh=parallel.make_mesh(data=4, model=2))
    dataset = data.encode_examples(data.load_examples(data_path), tiny.RECIPE, model.tokenizer)
    lora = model.init_lora(jax.random.key(0), tiny.LORA)
    config = dataclasses.replace(tiny.CONFIG, batch_size=8, microbatch_size=2)
    with pytest.raises(ValueError, match="4 ways along 'data'"):
        finetune(model, dataset, config, lora=lora)
