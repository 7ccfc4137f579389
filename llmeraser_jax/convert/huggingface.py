"""Owns the tensor names of Hugging Face checkpoints, one table per architecture."""

from __future__ import annotations

from llmeraser_jax.convert.table import TRANSPOSE, Rule, Table

_LAYER = "model.layers.{layer}"
_LINEARS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}

_COMMON = (
    Rule("model.embed_tokens.weight", "embed_tokens/embedding"),
    Rule(f"{_LAYER}.input_layernorm.weight", "layers/input_norm/scale"),
    *(
        Rule(f"{_LAYER}.{block}.{name}.weight", f"layers/{name}/kernel", TRANSPOSE)
        for name, block in _LINEARS.items()
    ),
    Rule(f"{_LAYER}.post_attention_layernorm.weight", "layers/post_attention_norm/scale"),
    Rule("model.norm.weight", "final_norm/scale"),
    Rule("lm_head.weight", "lm_head/kernel", TRANSPOSE),
)


def _biases(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{_LAYER}.{_LINEARS[name]}.{name}.bias", f"layers/{name}/bias") for name in names)


_QK_NORM = tuple(Rule(f"{_LAYER}.self_attn.{name}.weight", f"layers/{name}/scale") for name in ("q_norm", "k_norm"))
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# Rotary frequencies that transformers once stored; they follow from config.json.
_ROTARY = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

BASE_TABLES: dict[str, Table] = {
    "llama": Table((*_COMMON, *_biases(*_LINEARS)), _ROTARY),
    "mistral": Table(_COMMON, _ROTARY),
    "qwen2": Table((*_COMMON, *_biases("q_proj", "k_proj", "v_proj")), _ROTARY),
    "qwen3": Table((*_COMMON, *_biases(*_ATTENTION), *_QK_NORM)),
}

# PEFT keeps A [rank, in] and B [out, rank] as we do. All families name their linear layers alike.
PEFT_TABLE = Table(
    tuple(
        Rule(f"base_model.model.{_LAYER}.{block}.{name}.lora_{side.upper()}.weight", f"layers/{name}/{side}")
        for name, block in _LINEARS.items()
        for side in ("a", "b")
    )
)
