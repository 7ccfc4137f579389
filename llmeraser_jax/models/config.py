"""`ModelConfig`: the description of a model, read from and written to Hugging Face's config.json by `Family`.

Reading is strict. Every field of config.json is honoured, known to change nothing here, or refused by name:
a field that is silently ignored means a model that silently differs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal

from llmeraser_jax.checks import check_at_least
from llmeraser_jax.models.fields import Fields, show
from llmeraser_jax.models.precision import MATMUL_PRECISIONS, MatmulPrecision
from llmeraser_jax.models.rope import RopeConfig
from llmeraser_jax.models.vision import VISION_FIELDS, VisionConfig

_log = logging.getLogger(__name__)

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The features of one `model_type`, as transformers implements it.

    Attributes:
        architecture: transformers' class.
        structure: fields of `ModelConfig` that every model of the family has at this value.
        own_fields: fields of config.json that not every family has and this one honours; see `_OWN_FIELDS`.
        biases: (on q/k/v, on o): which attention biases a model can have.
        scaled_embeddings: embeddings are multiplied by the root of the width.
        window: layers with a sliding window: none, "all", or those that the field "layer_types" names.
        switched_window: the window counts only where use_sliding_window is true.
        unrotated: no_rope_layers names layers without rotary positions.
        local_rope: layers with a window have rotary positions of their own.
        partial_rope: heads can be rotated in part.
        activation_name: the field of config.json that names the activation.
        defaults: transformers' values of fields that config.json leaves out.
        theta: the same for rope_theta.
    """

    architecture: str
    structure: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own_fields: tuple[str, ...] = ()
    biases: frozenset[tuple[bool, bool]] = frozenset({(False, False)})
    scaled_embeddings: bool = False
    window: Literal["all", "layer_types"] | None = None
    switched_window: bool = False
    unrotated: bool = False
    local_rope: bool = False
    partial_rope: bool = False
    activation_name: str = "hidden_act"
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    theta: float = 10000.0


_ANY_BIAS = frozenset({(False, False), (True, True)})
_GEMMA: dict[str, Any] = {
    "biases": _ANY_BIAS,
    "scaled_embeddings": True,
    "window": "layer_types",
    "activation_name": "hidden_activation",
}
_GEMMA_STRUCTURE = {"activation": "gelu_tanh", "norm_offset": True, "output_norms": True}
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

_FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        own_fields=("mlp_bias",),
        biases=_ANY_BIAS,
        defaults={"max_position_embeddings": 2048},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        window="all",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        biases=frozenset({(True, False)}),
        window="layer_types",
        switched_window=True,
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        structure={"qk_norm": True},
        biases=_ANY_BIAS,
        window="layer_types",
        switched_window=True,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
        },
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        structure=_GEMMA_STRUCTURE,
        own_fields=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        defaults={
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        **_GEMMA,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        structure={**_GEMMA_STRUCTURE, "qk_norm": True},
        own_fields=("query_pre_attn_scalar", "final_logit_softcapping"),
        local_rope=True,
        defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 131072},
        theta=1e6,
        **_GEMMA,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        structure={"fused_projections": True},
        window="all",
        partial_rope=True,
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        structure={"input_norms": False, "output_norms": True, "qk_norm": True, "qk_norm_joint": True},
        biases=_ANY_BIAS,
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        own_fields=("mlp_bias",),
        biases=_ANY_BIAS,
        window="layer_types",
        switched_window=True,
        unrotated=True,
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4, "tie_word_embeddings": True},
        theta=2e6,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        own_fields=(
            "mlp_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
        biases=_ANY_BIAS,
        defaults={
            "max_position_embeddings": 2048,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        structure={"normalised_routing": True},
        own_fields=("num_local_experts", "num_experts_per_tok"),
        window="all",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
        },
        theta=1e6,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        structure={"qk_norm": True},
        own_fields=("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"),
        biases=_ANY_BIAS,
        window="all",
        switched_window=True,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "sliding_window": 4096,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)

LLAVA = "llava"
# Families that the text part of a LLaVA model can be of, with transformers' values of what its text_config leaves
# out: published checkpoints state what differs from them.
_VICUNA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAVA_TEXTS = {"llama": _VICUNA_7B, "mistral": {**_VICUNA_7B, "intermediate_size": 14336}}

_ELSEWHERE = {
    "gemma3": "its text part is gemma3_text: save the language model alone with Gemma3ForCausalLM",
    "llama4": "neither it nor its text part llama4_text, with chunked attention and a shared expert, is supported",
}

# Fields of config.json that some families have: the field of `ModelConfig`, and how it is read.
_OWN_FIELDS: dict[str, tuple[str, str]] = {
    "mlp_bias": ("mlp_bias", "boolean"),
    "query_pre_attn_scalar": ("attention_scale", "number"),
    "attention_multiplier": ("attention_scale", "number"),
    "embedding_multiplier": ("embedding_multiplier", "number"),
    "residual_multiplier": ("residual_multiplier", "number"),
    "logits_scaling": ("logit_divisor", "number"),
    "attn_logit_softcapping": ("attention_softcap", "optional_number"),
    "final_logit_softcapping": ("logit_softcap", "optional_number"),
    "num_local_experts": ("num_experts", "integer"),
    "num_experts": ("num_experts", "integer"),
    "num_experts_per_tok": ("experts_per_token", "integer"),
    "norm_topk_prob": ("normalised_routing", "boolean"),
    "moe_intermediate_size": ("mlp_width", "integer"),
}

_HONOURED = frozenset(
    {
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
        "max_position_embeddings", "initializer_range", "rope_parameters", "rope_theta", "rope_scaling",
        "bos_token_id", "eos_token_id", "pad_token_id",
    }
)  # fmt: skip

# Bookkeeping, training-only and text-generation settings: none changes the logits of a forward pass.
_INERT = frozenset(
    {
        "transformers_version", "dtype", "torch_dtype", "use_cache", "id2label", "label2id", "return_dict",
        "return_dict_in_generate", "output_hidden_states", "output_attentions", "output_scores",
        "output_router_logits", "problem_type", "chunk_size_feed_forward", "pretraining_tp",
        "max_window_layers", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
        "sep_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
        "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams",
        "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
        "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
        "bad_words_ids", "num_return_sequences", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "remove_invalid_values", "tf_legacy_loss", "torchscript",
        "use_bfloat16", "is_decoder", "unsloth_version", "unsloth_fixed", "auto_map",
        "is_llama_config", "transformers.js_config", "max_sequence_length", "cache_implementation",
        "router_aux_loss_coef", "router_jitter_noise",
    }
)  # fmt: skip

# Fields whose other values would change the model; only these values are supported, in every family.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "use_mrope": (False, None),
    "rope_interleaved": (False, None),
    "use_bidirectional_attention": (False, None),
    "lm_head_bias": (False, None),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
}
_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}
_PLAIN_ROPE = RopeConfig()
_WINDOWED = {"full_attention": False, "sliding_attention": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: RMS norms, rotary positions, gated feed-forward, and the features of families.

    Attributes:
        model_type: family, one of `FAMILIES`; decides the tensor names on disk.
        vocab_size: rows of the embedding.
        width: numbers per token between layers.
        mlp_width: numbers per token inside the feed-forward block, or inside one expert.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads`.
        head_dim: numbers per head, even; need not be `width / num_heads`.
        norm_eps: added to the mean square in RMS norms.
        rope: rotary position embedding.
        tied_embeddings: the head is the transposed embedding and has no parameters.
        qkv_bias: q_proj, k_proj and v_proj have biases.
        o_bias: o_proj has one.
        mlp_bias: gate_proj, up_proj and down_proj have biases.
        qk_norm: queries and keys are RMS-normalised before rotation, per head.
        qk_norm_joint: over all heads instead.
        sliding_window: a token sees itself and this many minus one tokens before it; None sees all.
        windowed_layers: which layers have the window; None is all.
        local_rope: rotary position embedding of the layers with a window; None is `rope`.
        unrotated_layers: which layers have no rotary positions; None is none.
        activation: of the feed-forward gate: SiLU, or GELU in its tanh form.
        norm_offset: norms multiply by one plus their scale.
        input_norms: attention and feed-forward read the normalised residual stream.
        output_norms: the outputs of attention and feed-forward are normalised.
        fused_projections: q, k and v are one linear layer, `qkv_proj`, and gate and up another, `gate_up_proj`.
        attention_scale: factor of the attention scores; None is `head_dim ** -0.5`.
        attention_softcap: scores become `cap * tanh(score / cap)`; None leaves them.
        logit_softcap: the same for logits.
        embedding_multiplier: factor of the embeddings.
        residual_multiplier: factor of the outputs of attention and feed-forward.
        logit_divisor: divisor of the logits.
        num_experts: feed-forward blocks that a router chooses from; 0 is a single block without a router.
        experts_per_token: how many it chooses.
        normalised_routing: the weights of those chosen sum to one.
        max_position: the context length that the model was made for; recorded, not enforced.
        initializer_range: standard deviation of a fresh base's matrices.
        bos_token_id: first token of a text, or None.
        eos_token_ids: any of these ends a generation.
        pad_token_id: padding token, or None.
        vision: how it sees pictures; None is a text model. All other fields describe the text part.
        matmul_precision: of products with the base's matrices, see `models.precision`; not in config.json.
    """

    model_type: str = "llama"
    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope: RopeConfig = _PLAIN_ROPE
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_joint: bool = False
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] | None = None
    local_rope: RopeConfig | None = None
    unrotated_layers: tuple[bool, ...] | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: bool = False
    input_norms: bool = True
    output_norms: bool = False
    fused_projections: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    normalised_routing: bool = False
    max_position: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    vision: VisionConfig | None = None
    matmul_precision: MatmulPrecision = "auto"

    def __post_init__(self) -> None:
        if self.matmul_precision not in MATMUL_PRECISIONS:
            msg = f"matmul_precision is {self.matmul_precision!r}; choose one of {', '.join(MATMUL_PRECISIONS)}."
            raise ValueError(msg)
        if self.model_type not in FAMILIES:
            msg = f"model_type is {self.model_type!r}; supported are {', '.join(FAMILIES)}."
            raise ValueError(msg)
        check_at_least(self, vocab_size=1, width=1, mlp_width=1, num_layers=1)
        check_at_least(self, num_heads=1, num_kv_heads=1, head_dim=1, max_position=1)
        if self.num_heads % self.num_kv_heads:
            msg = f"num_kv_heads is {self.num_kv_heads}, which does not divide num_heads = {self.num_heads}."
            raise ValueError(msg)
        if self.head_dim % 2:
            msg = f"head_dim is {self.head_dim}; rotary positions need an even number."
            raise ValueError(msg)
        if self.sliding_window is not None and self.sliding_window < 1:
            msg = f"sliding_window is {self.sliding_window}; it must be at least 1, or None."
            raise ValueError(msg)
        if self.windowed_layers is not None and self.sliding_window is None:
            msg = "windowed_layers says which layers have a sliding window, but sliding_window is None."
            raise ValueError(msg)
        for name in ("windowed_layers", "unrotated_layers"):
            layers = getattr(self, name)
            if layers is not None and len(layers) != self.num_layers:
                msg = f"{name} has {len(layers)} entries; there are {self.num_layers} layers."
                raise ValueError(msg)
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            msg = (
                f"experts_per_token is {self.experts_per_token} and num_experts {self.num_experts}; not 1 to that."
            )
            raise ValueError(msg)
        for rope in (self.rope, self.local_rope):
            problem = None if rope is None else rope.problem(self.head_dim)
            if problem:
                msg = f"Rotary positions: {problem}."
                raise ValueError(msg)
        if self.vision is not None and self.model_type not in _LLAVA_TEXTS:
            msg = f"The text part of a {LLAVA} model is a {self.model_type}; supported: {', '.join(_LLAVA_TEXTS)}."
            raise ValueError(msg)
        if self.vision is not None and self.vision.image_token >= self.vocab_size:
            msg = f"image_token is {self.vision.image_token}, outside the vocabulary of {self.vocab_size} tokens."
            raise ValueError(msg)
        problems = self._beyond_the_family()
        if problems:
            msg = f"A {self.model_type} model does not have {' or '.join(problems)}."
            raise ValueError(msg)

    def _beyond_the_family(self) -> list[str]:
        """Fields with values that the family's config.json cannot state; such a model could not be saved."""
        family = self.family
        problems = []
        if (self.qkv_bias, self.o_bias) not in family.biases:
            problems.append(f"qkv_bias = {self.qkv_bias} with o_bias = {self.o_bias}")
        free = {_OWN_FIELDS[name][0] for name in family.own_fields}
        free |= {"sliding_window"} if family.window else set()
        free |= {"windowed_layers"} if family.window == "layer_types" else set()
        free |= {"local_rope"} if family.local_rope else set()
        free |= {"unrotated_layers"} if family.unrotated else set()
        expected = {name: _DEFAULTS[name] for name in _FEATURES} | dict(family.structure)
        if family.scaled_embeddings:
            expected["embedding_multiplier"] = self.width**0.5
        problems += [
            f"{name} = {getattr(self, name)}"
            for name, value in expected.items()
            if name not in free and getattr(self, name) != value
        ]
        ropes = [rope for rope in (self.rope, self.local_rope) if rope is not None]
        if any(rope.rotated_share != 1 for rope in ropes) and not family.partial_rope:
            problems.append("a partial rotary_factor")
        if any(rope.scaling == "dynamic" and rope.original_max_position != self.max_position for rope in ropes):
            problems.append("an original_max_position of dynamic rotary positions apart from max_position")
        if bool(self.num_experts) != ("num_experts" in free):
            problems.append(f"num_experts = {self.num_experts}")
        return problems

    @property
    def family(self) -> Family:
        """The features of its `model_type`."""
        return _FAMILIES[self.model_type]

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer."""
        windowed = self.windowed_layers or (True,) * self.num_layers
        return tuple(self.sliding_window if here else None for here in windowed)

    @property
    def ropes(self) -> tuple[RopeConfig | None, ...]:
        """Rotary positions that layers choose from; None is no rotation."""
        others = [self.local_rope] if self.local_rope is not None else []
        return (self.rope, *others, *([None] if any(self.unrotated_layers or ()) else []))

    @property
    def layer_ropes(self) -> tuple[int, ...]:
        """Index into `ropes` for each layer."""
        unrotated = self.unrotated_layers or (False,) * self.num_layers
        local = (window is not None and self.local_rope is not None for window in self.layer_windows)
        last = len(self.ropes) - 1
        return tuple(last if plain else int(own) for plain, own in zip(unrotated, local, strict=True))

    @property
    def module_names(self) -> tuple[str, ...]:
        """Names of all modules as PyTorch's `named_modules` of the causal LM, or of LLaVA's model, gives them."""
        attention = [
            name for name in self.linear_shapes if name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
        ]
        mlp = [name for name in self.linear_shapes if name not in attention]
        inside = ["self_attn", *(f"self_attn.{name}" for name in attention)]
        inside += [f"self_attn.{name}" for name in ("q_norm", "k_norm") if self.qk_norm]
        inside += ["mlp", *(f"mlp.{name}" for name in mlp)]
        if self.num_experts:
            inside += ["mlp.gate", "mlp.experts", "mlp.experts.act_fn"]
        elif self.fused_projections:
            inside += ["mlp.activation_fn", "resid_attn_dropout", "resid_mlp_dropout"]
        else:
            inside.append("mlp.act_fn")
        norms = ["post_attention_layernorm"]
        norms += ["input_layernorm"] if self.input_norms else []
        norms += ["post_feedforward_layernorm"] if self.output_norms else []
        norms += ["pre_feedforward_layernorm"] if self.input_norms and self.output_norms else []
        root, names = "model", ["model"]
        if self.vision is not None:
            root = "model.language_model"
            names += [f"model.vision_tower{name}" for name in self.vision.module_names]
            names += [f"model.multi_modal_projector{name}" for name in ("", ".linear_1", ".act", ".linear_2")]
            names.append(root)
        names += [f"{root}.embed_tokens", f"{root}.layers"]
        for layer in range(self.num_layers):
            names += [f"{root}.layers.{layer}", *(f"{root}.layers.{layer}.{name}" for name in (*inside, *norms))]
        return (*names, f"{root}.norm", f"{root}.rotary_emb", "lm_head")

    @property
    def projector_shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the projector's linear layers, which can carry an adapter; empty without vision."""
        if self.vision is None:
            return {}
        return {"linear_1": (self.vision.feature_width, self.width), "linear_2": (self.width, self.width)}

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of a decoder layer, in its order: those an adapter can target."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.fused_projections:
            return {
                "qkv_proj": (self.width, query + 2 * key_value),
                "o_proj": (query, self.width),
                "gate_up_proj": (self.width, 2 * self.mlp_width),
                "down_proj": (self.mlp_width, self.width),
            }
        attention = {
            "q_proj": (self.width, query),
            "k_proj": (self.width, key_value),
            "v_proj": (self.width, key_value),
            "o_proj": (query, self.width),
        }
        if self.num_experts:
            return attention
        return attention | {
            "gate_proj": (self.width, self.mlp_width),
            "up_proj": (self.width, self.mlp_width),
            "down_proj": (self.mlp_width, self.width),
        }

    @classmethod
    def from_hf(cls, hf: Any, generation: Any = None) -> ModelConfig:
        """Reads a Hugging Face config.json, of transformers 4 or 5.

        Args:
            hf: its content.
            generation: the content of generation_config.json, whose end-of-sequence tokens are added.

        Raises:
            ValueError: a field that is missing, that is unknown, or whose value is not honoured; all of
                them are listed by name.
        """
        generation = {} if generation is None else generation
        for content, file in ((hf, "config.json"), (generation, "generation_config.json")):
            if not isinstance(content, Mapping):
                msg = f"{file} holds {show(content)}; expected an object of fields."
                raise ValueError(msg)
        name = hf.get("model_type")
        if name == LLAVA:
            return _read_llava(hf, generation)
        if not isinstance(name, str) or name not in _FAMILIES:
            hint = f" ({_ELSEWHERE[name]})" if isinstance(name, str) and name in _ELSEWHERE else ""
            msg = f"config.json: model_type is {show(name)}{hint}; supported are {', '.join((*FAMILIES, LLAVA))}."
            raise ValueError(msg)
        family = _FAMILIES[name]
        hf = dict(hf)
        if "num_experts" in family.own_fields and "num_local_experts" in hf:
            hf["num_experts"] = hf.pop("num_local_experts")  # transformers 5 writes one name for every family
        fields = Fields({**family.defaults, **hf})
        values: dict[str, Any] = {**family.structure, "model_type": name}
        fields.problems += _unhonoured(hf, name)
        values |= {
            "vocab_size": fields.integer("vocab_size"),
            "width": fields.integer("hidden_size"),
            "mlp_width": fields.integer("intermediate_size"),
            "num_layers": fields.integer("num_hidden_layers", most=_MOST_LAYERS),
            "num_heads": fields.integer("num_attention_heads"),
            "norm_eps": fields.number("rms_norm_eps", 1e-6),
            "max_position": fields.integer("max_position_embeddings", 2048),
            "initializer_range": fields.number("initializer_range", 0.02),
            "tied_embeddings": fields.boolean("tie_word_embeddings"),
        }
        values["num_kv_heads"] = fields.optional_integer("num_key_value_heads") or values["num_heads"]
        head_dim = fields.optional_integer("head_dim")
        if head_dim is None and values["width"] % values["num_heads"]:
            fields.problems.append(
                f"head_dim is missing and hidden_size {values['width']} is no multiple of num_attention_heads "
                f"{values['num_heads']}"
            )
        values["head_dim"] = head_dim or max(values["width"] // values["num_heads"], 1)
        bias = fields.boolean("attention_bias") if len(family.biases) > 1 else next(iter(family.biases))
        values["qkv_bias"], values["o_bias"] = (bias, bias) if isinstance(bias, bool) else bias
        for own in family.own_fields:
            attribute, kind = _OWN_FIELDS[own]
            default = None if kind.startswith("optional") else family.defaults.get(own)
            values[attribute] = getattr(fields, kind)(own, *(() if default is None else (default,)))
        if "query_pre_attn_scalar" in family.own_fields:
            values["attention_scale"] = values["attention_scale"] ** -0.5
        if family.scaled_embeddings:
            values["embedding_multiplier"] = values["width"] ** 0.5
        if family.unrotated:
            values["unrotated_layers"] = _unrotated_layers(fields, values["num_layers"])
        if family.window:
            values |= _windows(fields, family, values)
        values |= _ropes(fields, family, values["max_position"])
        eos = fields.token_ids("eos_token_id")
        values |= {key: next(iter(fields.token_ids(key)), None) for key in ("bos_token_id", "pad_token_id")}
        more = Fields(generation, "generation_config.json: ")
        values["eos_token_ids"] = tuple(dict.fromkeys(eos + more.token_ids("eos_token_id")))
        problems = fields.problems + more.problems
        if not problems:
            try:
                return cls(**values)
            except ValueError as error:
                problems = [str(error).rstrip(".")]
        msg = f"config.json of a {name} model cannot be honoured: {'; '.join(problems)}."
        raise ValueError(msg)

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 5 and `from_hf` read back as this model."""
        family = self.family
        eos = list(self.eos_token_ids)
        out: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            family.activation_name: _ACTIVATIONS[self.activation][0],
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": self.rope.to_hf(),
            "max_position_embeddings": self.max_position,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tied_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
            "pad_token_id": self.pad_token_id,
        }
        if len(family.biases) > 1:
            out["attention_bias"] = self.qkv_bias
        for own in family.own_fields:
            out[own] = getattr(self, _OWN_FIELDS[own][0])
        if "query_pre_attn_scalar" in out:
            # transformers reads a whole number; use it where it gives the same scale.
            scalar = out["query_pre_attn_scalar"] ** -2
            out["query_pre_attn_scalar"] = (
                round(scalar) if round(scalar) ** -0.5 == self.attention_scale else scalar
            )
        if self.local_rope is not None:
            parts = {"full_attention": self.rope, "sliding_attention": self.local_rope}
            out["rope_parameters"] = {key: rope.to_hf() for key, rope in parts.items()}
        if self.rope.scaling == "longrope" and family.partial_rope:
            out["original_max_position_embeddings"] = self.rope.original_max_position
        if family.window:
            out["sliding_window"] = self.sliding_window
        if family.switched_window:
            out["use_sliding_window"] = self.sliding_window is not None
        if family.window == "layer_types":
            names = {windowed: key for key, windowed in _WINDOWED.items()}
            out["layer_types"] = [names[window is not None] for window in self.layer_windows]
        if family.unrotated:
            out["no_rope_layers"] = [
                int(not plain) for plain in self.unrotated_layers or (False,) * self.num_layers
            ]
        return out if self.vision is None else _write_llava(out, self.vision)


def _read_llava(hf: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig.from_hf` of a LLaVA model.

    Tokens of the text's beginning and end stand in the text part or at the top, where the text part goes first.
    """
    vision, problems = VisionConfig.from_hf(hf)
    given = hf.get("text_config")
    text: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    name = text.setdefault("model_type", "llama")
    if not isinstance(given, Mapping):
        problems.append(f"text_config = {show(given)} (expected an object of fields)")
    elif name not in _LLAVA_TEXTS:
        problems.append(f"text_config.model_type = {show(name)} (supported: {' or '.join(_LLAVA_TEXTS)})")
    known = {
        *VISION_FIELDS,
        *_LLAVA_FIELDS,
        *_INERT,
        *(k for k, values in _REQUIRED_VALUES.items() if hf.get(k) in values),
    }
    for key, value in hf.items():
        if not (key in known or key.startswith("_") or value is None):
            problems.append(f"{show(key)[1:-1]} = {show(value)} is unknown")
    if hf.get("architectures") not in (None, [_LLAVA_CLASS]):
        problems.append(f"architectures = {show(hf['architectures'])} (supported: {_LLAVA_CLASS})")
    config = None
    if isinstance(given, Mapping) and name in _LLAVA_TEXTS:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if text.get(key) is None and hf.get(key) is not None:
                text[key] = hf[key]
        text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or hf.get("tie_word_embeddings"))
        text.pop("architectures", None)  # of the model that the text part was trained as
        stated = {key: value for key, value in text.items() if value is not None or key not in _LLAVA_TEXTS[name]}
        try:
            config = ModelConfig.from_hf({**_LLAVA_TEXTS[name], **stated}, generation)
            if vision is not None:
                config = dataclasses.replace(config, vision=vision)
        except ValueError as error:
            problems.append(f"text_config: {str(error).rstrip('.')}")
    if problems or config is None:
        msg = f"config.json of a {LLAVA} model cannot be honoured: {'; '.join(problems)}."
        raise ValueError(msg)
    return config


def _write_llava(text: Mapping[str, Any], vision: VisionConfig) -> dict[str, Any]:
    """`ModelConfig.to_hf` of a LLaVA model, from that of its text part."""
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    return {
        "architectures": [_LLAVA_CLASS],
        "model_type": LLAVA,
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        **vision.to_hf(),
        **{key: text[key] for key in shared},
    }


_LLAVA_CLASS = "LlavaForConditionalGeneration"
_LLAVA_FIELDS = frozenset(
    {
        "model_type", "architectures", "text_config", "tie_word_embeddings", "bos_token_id", "eos_token_id",
        "pad_token_id", "vocab_size", "ignore_index",
    }
)  # fmt: skip

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
# Fields that families differ in. Their values are the family's, or stated in config.json where it has the field.
_FEATURES = (
    "mlp_bias", "qk_norm", "qk_norm_joint", "sliding_window", "windowed_layers", "local_rope", "unrotated_layers",
    "activation", "norm_offset", "input_norms", "output_norms", "fused_projections", "attention_scale",
    "attention_softcap", "logit_softcap", "embedding_multiplier", "residual_multiplier", "logit_divisor",
    "experts_per_token", "normalised_routing",
)  # fmt: skip


def _unrotated_layers(fields: Fields, num_layers: int) -> tuple[bool, ...] | None:
    """Layers without rotary positions; None where there are none."""
    given = fields.content.get("no_rope_layers")
    if given is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        rotated = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    elif isinstance(given, list | tuple) and len(given) >= num_layers and all(v in (0, 1) for v in given):
        rotated = [bool(v) for v in given[:num_layers]]
    else:
        fields.refuse("no_rope_layers", f"a list of at least {num_layers} zeros and ones")
        return None
    return None if all(rotated) else tuple(not v for v in rotated)


def _windows(fields: Fields, family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` and `windowed_layers`."""
    window = fields.optional_integer("sliding_window")
    if family.switched_window and not fields.boolean("use_sliding_window"):
        window = None
    if fields.content.get("sliding_window_size") not in (None, window):
        fields.refuse("sliding_window_size", f"the sliding_window, {window}")
    if family.window == "all":
        return {"sliding_window": window}
    given, num_layers = fields.content.get("layer_types"), values["num_layers"]
    if given is not None:
        good = isinstance(given, list | tuple) and len(given) == num_layers
        if not good or not all(isinstance(kind, str) and kind in _WINDOWED for kind in given):
            fields.refuse("layer_types", f"a list of {num_layers} of {' or '.join(map(repr, _WINDOWED))}")
            return {}
        windowed = [_WINDOWED[kind] for kind in given]
    elif family.unrotated:
        windowed = [window is not None and plain for plain in values["unrotated_layers"] or (False,) * num_layers]
    elif family.switched_window:
        full = fields.integer("max_window_layers", 28, least=0)
        windowed = [window is not None and layer >= full for layer in range(num_layers)]
    else:
        # Every second layer sees all in Gemma 2, every sixth in Gemma 3 unless it says otherwise.
        pattern = fields.integer("sliding_window_pattern", 6) if family.local_rope else 2
        windowed = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    if any(windowed) and window is None:
        fields.refuse("sliding_window", "a window, for the layers that layer_types says have one")
    if window is None:
        return {"sliding_window": None}
    return {"sliding_window": window, "windowed_layers": None if all(windowed) else tuple(windowed)}


def _ropes(fields: Fields, family: Family, max_position: int) -> dict[str, RopeConfig]:
    """`rope`, and `local_rope` where the family has one.

    Read from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4). Where both are
    there, `rope_scaling` takes the place of `rope_parameters`, its base frequency included, as in transformers.
    """
    hf = fields.content
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(name) or {}, Mapping):
            fields.refuse(name, "an object of rope parameters, or null")
            return {}
    scaling, parameters = dict(hf.get("rope_scaling") or {}), dict(hf.get("rope_parameters") or {})
    if scaling and parameters and scaling != parameters:
        _log.warning("config.json has rope_parameters and rope_scaling; rope_scaling is used, as in transformers.")
    theta = fields.number("rope_theta", family.theta) if hf.get("rope_theta") is not None else family.theta
    common: dict[str, Any] = {"max_position": max_position, "partial": family.partial_rope}
    if family.local_rope:
        parts = {key: parameters.get(key) or {} for key in ("full_attention", "sliding_attention")}
        if set(parameters) - set(parts) or not all(isinstance(part, Mapping) for part in parts.values()):
            fields.refuse("rope_parameters", "an object of the objects full_attention and sliding_attention")
            return {}
        local = fields.number("rope_local_base_freq", 10000.0) if "rope_local_base_freq" in hf else 10000.0
        rope, problems = RopeConfig.from_hf(
            {**parts["full_attention"], **scaling}, "rope_parameters.full_attention", theta=theta, **common
        )
        local_rope, more = RopeConfig.from_hf(
            parts["sliding_attention"], "rope_parameters.sliding_attention", theta=local, **common
        )
        fields.problems += problems + more
        return {"rope": rope, "local_rope": local_rope}
    where, given = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    stated = given.get("rope_theta")
    if stated is not None and hf.get("rope_theta") not in (None, stated):
        fields.problems.append(
            f"rope_theta is {show(hf['rope_theta'])} and {where}.rope_theta {show(stated)} (expected one of them)"
        )
    if family.partial_rope:
        common["original_max_position"] = fields.integer("original_max_position_embeddings")
        common["rotated_share"] = (
            fields.number("partial_rotary_factor", 1.0) if hf.get("partial_rotary_factor") else 1.0
        )
        common["other_names"] = {"su": "longrope", "yarn": "longrope"}
    rope, problems = RopeConfig.from_hf(given, where, theta=theta, **common)
    fields.problems += problems
    return {"rope": rope}


def _unhonoured(hf: Mapping[str, Any], name: str) -> list[str]:
    """Fields of a config.json that would change the model in a way the decoder does not know."""
    family = _FAMILIES[name]
    honoured = {*_HONOURED, *family.own_fields}
    activations = _ACTIVATIONS[family.structure.get("activation", "silu")]
    required = dict(_REQUIRED_VALUES) | {family.activation_name: (*activations, None)}
    required["architectures"] = (None, [family.architecture])
    if family.activation_name != "hidden_act":
        honoured.add("hidden_act")  # transformers reads the other
    if len(family.biases) > 1:
        honoured.add("attention_bias")
    else:
        required["attention_bias"] = (False, None)
    if "mlp_bias" not in family.own_fields:
        required["mlp_bias"] = (False, None)
    if family.window == "layer_types":
        honoured |= {"layer_types", "sliding_window_pattern"} if family.local_rope else {"layer_types"}
    else:
        layers = hf.get("num_hidden_layers")
        count = layers if isinstance(layers, int) and layers <= _MOST_LAYERS else 0
        required["layer_types"] = (None, ["full_attention"] * count)
    if family.window:
        honoured |= {"sliding_window", "sliding_window_size"}
    if family.switched_window:
        honoured.add("use_sliding_window")
    else:
        required["use_sliding_window"] = (False, None)
    if family.unrotated:
        honoured |= {"no_rope_layers", "no_rope_layer_interval"}
    if family.local_rope:
        honoured.add("rope_local_base_freq")
    if family.partial_rope:
        honoured |= {"partial_rotary_factor", "original_max_position_embeddings"}
    else:
        required["partial_rotary_factor"] = (1, None)
    problems = []
    for key, value in hf.items():
        if key in required:
            if value not in required[key]:
                choices = " or ".join(repr(v) for v in required[key] if v is not None)
                problems.append(f"{show(key)[1:-1]} = {show(value)} (supported: {choices or None})")
        elif not (key in honoured or key in _INERT or key.startswith("_") or value is None):
            problems.append(f"{show(key)[1:-1]} = {show(value)} is unknown")
    return problems
