"""Logits against files that transformers' PyTorch models made, so that parity holds without PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.models import generate, load_model
from tests.golden import files
from tests.golden.cases import CASES, case_tokens, largest_relative_difference, prompts


@pytest.mark.parametrize("name", CASES)
def test_logits_match_the_golden_file(name, tmp_path):
    content = files.load(name)
    model = load_model(files.checkpoint(content, tmp_path / "model"))
    tokens, mask = case_tokens()
    logits = jax.jit(model.apply)(model.base, None, jnp.asarray(tokens), jnp.asarray(mask))
    assert logits.dtype == jnp.float32
    assert largest_relative_difference(logits, content["logits"], mask) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_greedy_continuation_matches_the_golden_file(name, tmp_path):
    content = files.load(name)
    model = load_model(files.checkpoint(content, tmp_path / "model"))
    new = generate(model, None, prompts(), content["greedy"].shape[1], stop_ids=())
    np.testing.assert_array_equal(new, content["greedy"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_base_computes_in_float32(dtype, tmp_path):
    # The weights are exact in bfloat16, and in float16 to 1e-7 absolute, so only the arithmetic could differ.
    content = files.load("qwen3_gqa_head_dim")
    model = load_model(files.checkpoint(content, tmp_path / "model"), dtype=dtype)
    tokens, mask = case_tokens()
    logits = jax.jit(model.apply)(model.base, None, jnp.asarray(tokens), jnp.asarray(mask))
    assert model.base["layers"]["q_proj"]["kernel"].dtype == jnp.dtype(dtype)
    assert logits.dtype == jnp.float32
    assert largest_relative_difference(logits, content["logits"], mask) < 1e-5
