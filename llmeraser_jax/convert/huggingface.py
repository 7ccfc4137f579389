"""Owns the tensor names of Hugging Face checkpoints, one table per architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmeraser_jax.convert.table import TRANSPOSE, Rule, Table

_LAYER = "model.layers.{layer}"
_LINEARS = {
    "qkv_proj": "self_attn",
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_up_proj": "mlp",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
# A family's norms by their names on disk: `post_attention_layernorm` stands at two different places.
_NORMS_BEFORE = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm"}
_NORMS_AFTER = {
    "post_attention_layernorm": "attention_output_norm",
    "post_feedforward_layernorm": "mlp_output_norm",
}
_NORMS_AROUND = {
    "input_layernorm": "input_norm",
    "pre_feedforward_layernorm": "post_attention_norm",
    **_NORMS_AFTER,
}


def _rules(linears: Sequence[str], norms: Mapping[str, str] = _NORMS_BEFORE) -> tuple[Rule, ...]:
    """The rules of every family: embedding, the given linear layers without biases, the given norms, and head."""
    return (
        Rule("model.embed_tokens.weight", "embed_tokens/embedding"),
        *(Rule(f"{_LAYER}.{_LINEARS[name]}.{name}.weight", f"layers/{name}/kernel", TRANSPOSE) for name in linears),
        *(Rule(f"{_LAYER}.{disk}.weight", f"layers/{name}/scale") for disk, name in norms.items()),
        Rule("model.norm.weight", "final_norm/scale"),
        Rule("lm_head.weight", "lm_head/kernel", TRANSPOSE),
    )


def _biases(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{_LAYER}.{_LINEARS[name]}.{name}.bias", f"layers/{name}/bias") for name in names)


def _experts(block: str, names: Sequence[str]) -> tuple[Rule, ...]:
    """Router and experts, one tensor each on disk, by their names for gate, up and down."""
    return (
        Rule(f"{_LAYER}.{block}.gate.weight", "layers/experts/router", TRANSPOSE),
        *(
            Rule(f"{_LAYER}.{block}.experts.{{expert}}.{disk}.weight", f"layers/experts/{name}", TRANSPOSE)
            for disk, name in zip(names, _MLP, strict=True)
        ),
    )


_QK_NORM = tuple(Rule(f"{_LAYER}.self_attn.{name}.weight", f"layers/{name}/scale") for name in ("q_norm", "k_norm"))
_COMMON = _rules((*_ATTENTION, *_MLP))

# Rotary frequencies that transformers once stored; they follow from config.json.
_ROTARY = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

BASE_TABLES: dict[str, Table] = {
    "llama": Table((*_COMMON, *_biases(*_ATTENTION, *_MLP)), _ROTARY),
    "mistral": Table(_COMMON, _ROTARY),
    "qwen2": Table((*_COMMON, *_biases("q_proj", "k_proj", "v_proj")), _ROTARY),
    "qwen3": Table((*_COMMON, *_biases(*_ATTENTION), *_QK_NORM)),
    "gemma2": Table((*_rules((*_ATTENTION, *_MLP), _NORMS_AROUND), *_biases(*_ATTENTION))),
    "gemma3_text": Table((*_rules((*_ATTENTION, *_MLP), _NORMS_AROUND), *_biases(*_ATTENTION), *_QK_NORM)),
    "phi3": Table(_rules(("qkv_proj", "o_proj", "gate_up_proj", "down_proj")), _ROTARY),
    "olmo2": Table((*_rules((*_ATTENTION, *_MLP), _NORMS_AFTER), *_biases(*_ATTENTION), *_QK_NORM)),
    "smollm3": Table((*_COMMON, *_biases(*_ATTENTION, *_MLP))),
    "granite": Table((*_COMMON, *_biases(*_ATTENTION, *_MLP))),
    "mixtral": Table((*_rules(_ATTENTION), *_experts("block_sparse_moe", ("w1", "w3", "w2"))), _ROTARY),
    "qwen3_moe": Table((*_rules(_ATTENTION), *_biases(*_ATTENTION), *_QK_NORM, *_experts("mlp", _MLP))),
}

# PEFT keeps A [rank, in] and B [out, rank] as we do. All families name their linear layers alike.
PEFT_TABLE = Table(
    tuple(
        Rule(f"base_model.model.{_LAYER}.{block}.{name}.lora_{side.upper()}.weight", f"layers/{name}/{side}")
        for name, block in _LINEARS.items()
        for side in ("a", "b")
    )
)
