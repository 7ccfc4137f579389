"""Logits and generations against transformers' PyTorch models, both directions of the checkpoint format."""

from typing import Any

import jax
import numpy as np
import pytest

from llmeraser_jax.models import generate, load_model, save_model
from tests.golden import files
from tests.golden.cases import CASES, NUM_NEW_TOKENS, case_tokens, largest_relative_difference, prompts

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", CASES)
def test_logits_match_pytorch(name, tmp_path):
    from tests.torch_parity import reference

    theirs = reference.build(CASES[name], seed=11)
    theirs.save_pretrained(tmp_path / "hf", safe_serialization=True)
    model = load_model(tmp_path / "hf")
    tokens, mask = case_tokens()
    logits = jax.jit(model.apply)(model.base, None, tokens, mask)
    assert largest_relative_difference(logits, reference.logits(theirs), mask) < 1e-5
    new = generate(model, None, prompts(), NUM_NEW_TOKENS, stop_ids=())
    np.testing.assert_array_equal(new, [reference.greedy(theirs, prompt) for prompt in prompts()])


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_we_save(name, tmp_path):
    import torch
    import transformers

    from tests.torch_parity import reference

    model = load_model(files.checkpoint(files.load(name), tmp_path / "golden"))
    save_model(tmp_path / "ours", model)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    theirs, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.eos_token_id == 2
    tokens, mask = case_tokens()
    logits = jax.jit(model.apply)(model.base, None, tokens, mask)
    assert largest_relative_difference(logits, reference.logits(theirs.eval()), mask) < 1e-5


def test_the_sharded_checkpoint_that_transformers_writes_loads(tmp_path):
    from tests.torch_parity import reference

    theirs = reference.build(CASES["llama_mha_untied"])
    theirs.save_pretrained(tmp_path / "many", max_shard_size="6KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    theirs.save_pretrained(tmp_path / "one")
    jax.tree.map(
        np.testing.assert_array_equal, load_model(tmp_path / "many").base, load_model(tmp_path / "one").base
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_load_without_loss(dtype, tmp_path):
    import torch
    import transformers

    from tests.torch_parity import reference

    reference.build(CASES["qwen2_gqa_tied"]).to(getattr(torch, dtype)).save_pretrained(tmp_path / "half")
    # Read back in float32: a model cast in place would have rounded its rotary frequencies too.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "half", dtype=torch.float32, attn_implementation="eager"
    )
    model = load_model(tmp_path / "half")
    tokens, mask = case_tokens()
    logits = jax.jit(model.apply)(model.base, None, tokens, mask)
    assert largest_relative_difference(logits, reference.logits(theirs.eval()), mask) < 1e-5


def test_module_names_are_those_of_pytorch():
    from llmeraser_jax.models import ModelConfig
    from tests.torch_parity import reference

    for case in CASES.values():
        theirs = {name for name, _ in reference.build(case).named_modules() if name}
        assert set(ModelConfig.from_hf(case).module_names) == theirs
