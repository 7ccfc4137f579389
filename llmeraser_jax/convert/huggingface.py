"""Owns the tensor names of Hugging Face checkpoints, one table per architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from llmeraser_jax.convert.table import KEEP, TRANSPOSE, Rule, Table
from llmeraser_jax.types import AdaptableConfig

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

_TOWER = (
    Rule("embeddings.class_embedding", "class_embedding"),
    Rule("embeddings.patch_embedding.weight", "patch_embedding"),
    Rule("embeddings.position_embedding.weight", "position_embedding"),
    *(
        Rule(f"{disk}.{end}", f"{name}/{leaf}")
        for disk, name in (
            ("pre_layrnorm", "pre_norm"),
            ("encoder.layers.{layer}.layer_norm1", "layers/attention_norm"),
            ("encoder.layers.{layer}.layer_norm2", "layers/mlp_norm"),
            ("post_layernorm", "post_norm"),
        )
        for end, leaf in (("weight", "scale"), ("bias", "bias"))
    ),
    *(
        Rule(f"encoder.layers.{{layer}}.{disk}.{end}", f"layers/{disk.split('.')[-1]}/{leaf}", transform)
        for disk in (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
        for end, leaf, transform in (("weight", "kernel", TRANSPOSE), ("bias", "bias", KEEP))
    ),
)
_PROJECTOR = tuple(
    Rule(f"multi_modal_projector.{name}.{end}", f"projector/{name}/{leaf}", transform)
    for name in ("linear_1", "linear_2")
    for end, leaf, transform in (("weight", "kernel", TRANSPOSE), ("bias", "bias", KEEP))
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaLayout:
    """How a LLaVA checkpoint names its parts. The defaults are those of published checkpoints.

    Attributes:
        text: the text model without its head.
        head: the head.
        outer: what stands before tower and projector.
        tower: the tower inside its own model.
    """

    text: str = "language_model.model"
    head: str = "language_model.lm_head"
    outer: str = ""
    tower: str = "vision_model."

    @classmethod
    def of(cls, names: Collection[str]) -> LlavaLayout:
        """The layout of a checkpoint with tensors of these names; versions of transformers have different ones."""
        default = cls()
        modern = any(name.startswith("model.language_model.") for name in names)
        nested = any(f"vision_tower.{default.tower}" in name for name in names)
        return cls(
            text="model.language_model" if modern else default.text,
            head=default.head if f"{default.head}.weight" in names else "lm_head",
            outer="model." if any(name.startswith("model.vision_tower.") for name in names) else "",
            tower=default.tower if nested else "",
        )

    def table(self, text: Table) -> Table:
        """The table of a LLaVA checkpoint: the text model's under its names here, projector, and tower."""

        def name(rule):
            return rule.name.replace("model.", f"{self.text}.", 1).replace("lm_head.", f"{self.head}.", 1)

        tower = f"{self.outer}vision_tower.{self.tower}"
        return Table(
            (
                *(dataclasses.replace(rule, name=name(rule)) for rule in text.rules),
                *(dataclasses.replace(rule, name=self.outer + rule.name) for rule in _PROJECTOR),
                *(Rule(tower + rule.name, f"vision/{rule.path}", rule.transform) for rule in _TOWER),
            ),
            (r".*\.rotary_emb\.inv_freq", r".*\.embeddings\.position_ids"),
        )


def base_table(config: AdaptableConfig, layout: LlavaLayout | None = None) -> Table:
    """Names and layouts of a model's tensors on disk; where it sees pictures, in a layout or as published."""
    table = BASE_TABLES[config.model_type]
    return (layout or LlavaLayout()).table(table) if config.projector_shapes else table


# PEFT keeps A [rank, in] and B [out, rank] as we do. All families name their linear layers alike.
PEFT_TABLE = Table(
    tuple(
        Rule(f"base_model.model.{_LAYER}.{block}.{name}.lora_{side.upper()}.weight", f"layers/{name}/{side}")
        for name, block in _LINEARS.items()
        for side in ("a", "b")
    )
)


def peft_table(config: AdaptableConfig, names: Collection[str] = ()) -> Table:
    """The names of an adapter's tensors in PEFT's file.

    Args:
        config: the base.
        names: of the file that is read: versions of transformers name the parts of LLaVA in different ways.
    """
    if not config.projector_shapes:
        return PEFT_TABLE
    root = "base_model.model."
    inner = {name.removeprefix(root) for name in names}
    old = any(name.startswith(("language_model.", "multi_modal_projector.")) for name in inner)
    layers, outer = ("language_model.model", "") if old else ("model.language_model", "model.")
    projector = (
        Rule(f"{root}{outer}multi_modal_projector.{name}.lora_{side.upper()}.weight", f"projector/{name}/{side}")
        for name in ("linear_1", "linear_2")
        for side in ("a", "b")
    )
    moved = (
        dataclasses.replace(rule, name=rule.name.replace("model.layers", f"{layers}.layers"))
        for rule in PEFT_TABLE.rules
    )
    return Table((*moved, *projector))
