"""Random models of the families that need more of the decoder, against transformers and PEFT, both directions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.lora import load_adapter, save_adapter
from llmeraser_jax.models import generate, load_model, save_model
from tests.golden.cases import NUM_NEW_TOKENS, case_tokens, largest_relative_difference, prompts
from tests.models.tiny import random_lora

pytestmark = pytest.mark.torch


def random_case(family, seed):
    """Arguments of the family's configuration; windows are shorter than the longest rows."""
    rng = np.random.default_rng([seed, len(family)])

    def pick(*values):
        return values[rng.integers(len(values))]

    def flag():
        return bool(rng.integers(2))

    heads, layers = pick(2, 4), pick(2, 4)
    case = {
        "model_type": family,
        "vocab_size": 40,
        "hidden_size": 8 * heads,
        "intermediate_size": 20,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pick(1, 2, heads),
        "max_position_embeddings": 64,
        "tie_word_embeddings": flag(),
        "rms_norm_eps": pick(1e-6, 1e-3),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kinds = ["sliding_attention" if flag() else "full_attention" for _ in range(layers)]
    kinds[rng.integers(layers)] = "sliding_attention"
    window = int(rng.integers(2, 7))
    if family not in ("phi3", "mixtral"):
        case["attention_bias"] = flag()
    if family in ("gemma2", "gemma3_text"):
        case |= {"head_dim": pick(4, 6, 12), "sliding_window": window, "query_pre_attn_scalar": pick(3, 9, 40)}
        case |= {"final_logit_softcapping": pick(None, 2.0)} | ({"layer_types": kinds} if flag() else {})
    if family == "gemma2":
        case["attn_logit_softcapping"] = pick(None, 1.5)
    if family == "gemma3_text" and flag():
        case["rope_parameters"] = {
            "full_attention": {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    if family == "phi3":
        case["sliding_window"] = pick(None, window)
        case["rope_parameters"] = {"rope_theta": 100.0, "partial_rotary_factor": pick(0.5, 0.75, 1.0)}
    if family == "smollm3":
        case |= {"no_rope_layers": [int(flag()) for _ in range(layers)], "mlp_bias": flag()}
        case |= {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds} if flag() else {}
    if family == "granite":
        case |= {"mlp_bias": flag(), "logits_scaling": pick(1.0, 3.0), "attention_multiplier": pick(0.1, 1.0)}
        case |= {"embedding_multiplier": pick(1.0, 5.0), "residual_multiplier": pick(1.0, 0.3)}
    if family == "mixtral":
        case |= {
            "num_local_experts": pick(2, 4),
            "num_experts_per_tok": pick(1, 2),
            "sliding_window": pick(None, 3),
        }
    if family == "qwen3_moe":
        case |= {"num_experts": 6, "num_experts_per_tok": pick(2, 3), "norm_topk_prob": flag(), "head_dim": 6}
        case |= {"moe_intermediate_size": 12, "use_sliding_window": flag(), "sliding_window": window}
    if family in ("qwen2", "qwen3"):
        case.pop("attention_bias")
        case |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    return case


CASES = {
    f"{family}-{seed}": random_case(family, seed)
    for family in (
        "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite", "mixtral", "qwen3_moe", "qwen2", "qwen3",
    )
    for seed in ((0, 1, 2) if family not in ("qwen2", "qwen3") else (0,))
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_continuations_and_adapters_are_those_of_pytorch(case, tmp_path):
    import peft
    import torch
    import transformers

    from tests.torch_parity import reference

    theirs = reference.build(case, seed=3)
    theirs.save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    tokens, mask = case_tokens()
    apply = jax.jit(model.apply)
    plain = reference.logits(theirs)
    assert largest_relative_difference(apply(model.base, None, tokens, mask), plain, mask) < 1e-5
    new = generate(model, None, prompts(), NUM_NEW_TOKENS, stop_ids=())
    np.testing.assert_array_equal(new, [reference.greedy(theirs, prompt) for prompt in prompts()])

    save_model(tmp_path / "ours", model)

    def reloaded():
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
        ).eval()

    assert largest_relative_difference(reference.logits(reloaded()), plain, mask) < 1e-6

    targets = list(model.config.linear_shapes)
    if not model.config.num_experts:  # PEFT has ways of its own to target experts
        adapted = reference.adapt(reloaded(), {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"})
        assert {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith("lora_A")} == set(
            targets
        )
    else:
        adapted = reference.adapt(reloaded(), {"r": 2, "lora_alpha": 3, "target_modules": targets})
    adapted.save_pretrained(tmp_path / "adapter")
    expected = reference.logits(adapted)
    lora = load_adapter(tmp_path / "adapter", model)
    assert largest_relative_difference(apply(model.base, lora, tokens, mask), expected, mask) < 1e-5
    assert largest_relative_difference(plain, expected, mask) > 1e-2

    lora = random_lora(model, rank=2, scale=0.1, target_modules=tuple(targets[:3]))
    save_adapter(tmp_path / "back", lora, model)
    adapted = peft.PeftModel.from_pretrained(reloaded(), tmp_path / "back").eval()
    ours = apply(model.base, lora, tokens, mask)
    assert largest_relative_difference(ours, reference.logits(adapted), mask) < 1e-5
    assert largest_relative_difference(ours, plain, mask) > 1e-2


LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_STRETCHED = {"factor": 3.0, "rope_theta": 100.0}
_LISTS = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 3.0, 9.0], "rope_theta": 100.0}
ROPES = {
    "linear": {"rope_type": "linear", **_STRETCHED},
    "dynamic": {"rope_type": "dynamic", **_STRETCHED},
    "yarn": {"rope_type": "yarn", **_STRETCHED, "original_max_position_embeddings": 64},
    "yarn of the model's length": {"rope_type": "yarn", **_STRETCHED},
    "yarn, not truncated": {
        "rope_type": "yarn",
        **_STRETCHED,
        "original_max_position_embeddings": 40,
        "truncate": False,
        "beta_fast": 3.0,
        "beta_slow": 0.5,
    },
    "yarn, magnitudes": {"rope_type": "yarn", **_STRETCHED, "mscale": 2.0, "mscale_all_dim": 0.5},
    "yarn, attention factor": {"rope_type": "yarn", **_STRETCHED, "attention_factor": 1.7},
    "longrope": {"rope_type": "longrope", **_LISTS, "original_max_position_embeddings": 9},
    "longrope, factor": {"rope_type": "longrope", **_LISTS, "factor": 4.0, "original_max_position_embeddings": 9},
    "llama3": {"rope_type": "llama3", **_STRETCHED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def _ragged():
    """Rows [3, 20] of 5, 9 and 20 tokens, on either side of a context of 8 and one of 9, and their mask."""
    tokens = np.random.default_rng(2).integers(3, 40, (3, 20))
    mask = np.arange(20) < np.array([[5], [9], [20]])
    return np.where(mask, tokens, 0), mask


def _each_row(model, tokens, mask):
    """Logits of every row without its padding; transformers has one set of frequencies for a padded batch."""
    import torch

    out = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for row in range(len(tokens)):  # from short to long: some rotations remember the longest text
            length = int(mask[row].sum())
            out[row, :length] = model(input_ids=torch.tensor(tokens[row : row + 1, :length])).logits[0].numpy()
    return out


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_scaled_rotary_positions_are_those_of_pytorch(rope, tmp_path):
    import torch

    from tests.torch_parity import reference

    case = {**LLAMA, "rope_parameters": rope}
    theirs = reference.build(case)
    theirs.save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    tokens, mask = _ragged()
    logits = jax.jit(model.apply)(model.base, None, tokens, jnp.asarray(mask))
    assert largest_relative_difference(logits, _each_row(theirs, tokens, mask), mask) < 1e-5
    save_model(tmp_path / "ours", model)
    assert load_model(tmp_path / "ours").config == model.config

    # Without a cache: transformers' holds keys under the rotations of a shorter text.
    rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    rows.append(rows[2][:7])  # crosses both contexts
    expected = []
    for row in rows:
        with torch.no_grad():
            out = reference.build(case).generate(
                torch.tensor([row]), max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False
            )
        expected.append(out[0, len(row) :].tolist())
    assert generate(model, None, rows, 5, stop_ids=()) == expected


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3"])
def test_rope_scaling_beside_rope_parameters_is_read_as_transformers_reads_it(scaling, tmp_path):
    import torch
    import transformers

    from tests.torch_parity import reference

    reference.build(LLAMA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e5}
    config["rope_scaling"] = {name: value for name, value in ROPES[scaling].items() if name != "rope_theta"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    model = load_model(tmp_path)
    tokens, mask = _ragged()
    logits = jax.jit(model.apply)(model.base, None, tokens, jnp.asarray(mask))
    assert largest_relative_difference(logits, _each_row(theirs, tokens, mask), mask) < 1e-5
