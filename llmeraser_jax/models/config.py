"""Owns what a model is: `ModelConfig`, read from and written to Hugging Face's config.json.

Reading is strict. Every field of config.json is honoured, known to change nothing here, or refused by name:
a field that is silently ignored means a model that silently differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from llmeraser_jax.models.precision import MATMUL_PRECISIONS, MatmulPrecision

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# (on q/k/v, on o): which attention biases a family can have.
_ATTENTION_BIASES = {
    "llama": {(False, False), (True, True)},
    "mistral": {(False, False)},
    "qwen2": {(True, False)},
    "qwen3": {(False, False), (True, True)},
}

# What transformers assumes where config.json is silent.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
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
    }
)  # fmt: skip

# Fields whose other values would change the model; only these values are supported, in every family.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched for long contexts.

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: "default" (none), "linear" (positions divided by `factor`) or "llama3" (long wavelengths are
            stretched by `factor`, short ones kept, those between blended).
        factor: the stretch.
        low_freq_factor: llama3: wavelengths above `original_max_position / low_freq_factor` are stretched.
        high_freq_factor: llama3: wavelengths below `original_max_position / high_freq_factor` are kept.
        original_max_position: llama3: context length of the first pretraining.
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if not self.theta > 0 or not self.factor >= 1:
            msg = f"rope_theta is {self.theta} and factor {self.factor}; they must be above 0 and at least 1."
            raise ValueError(msg)
        if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            msg = (
                f"rope high_freq_factor is {self.high_freq_factor} and low_freq_factor {self.low_freq_factor}; "
                "the first must be the larger and both above 0."
            )
            raise ValueError(msg)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> RopeConfig:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

        Raises:
            ValueError: a kind of scaling or a parameter that is not honoured, one that is missing, or the two
                spellings contradict each other. The message names the field.
        """
        where = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
        given = dict(hf.get(where) or {})
        kind = given.pop("rope_type", given.pop("type", "default")) or "default"
        given.pop("type", None)
        kinds: dict[str, tuple[str, ...]] = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        if kind not in kinds:
            msg = f"{where}.rope_type is {kind!r}; only {', '.join(kinds)} are supported."
            raise ValueError(msg)
        theta = given.pop("rope_theta", hf.get("rope_theta"))
        if hf.get("rope_theta") not in (None, theta):
            msg = f"config.json states rope_theta {hf['rope_theta']} and {where}.rope_theta {theta}; keep one."
            raise ValueError(msg)
        if given.pop("partial_rotary_factor", None) not in (None, 1):
            msg = f"{where}.partial_rotary_factor is not honoured; only 1 is supported."
            raise ValueError(msg)
        missing = [key for key in kinds[kind] if given.get(key) is None]
        unknown = [key for key, value in given.items() if key not in kinds[kind] and value is not None]
        if missing or unknown:
            msg = (
                f"{where} of rope_type {kind!r}: "
                + "; ".join(
                    [f"{key} is missing" for key in missing]
                    + [f"{key} = {given[key]!r} is not honoured" for key in unknown]
                )
                + "."
            )
            raise ValueError(msg)
        renamed = {"original_max_position_embeddings": "original_max_position"}
        values: dict[str, Any] = {renamed.get(key, key): float(given[key]) for key in kinds[kind]}
        if "original_max_position" in values:
            values["original_max_position"] = int(values["original_max_position"])
        return cls(theta=float(10000.0 if theta is None else theta), scaling=kind, **values)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of a config.json; `from_hf` reads it back."""
        out: dict[str, Any] = {"rope_type": self.scaling, "rope_theta": self.theta}
        if self.scaling != "default":
            out["factor"] = self.factor
        if self.scaling == "llama3":
            out["low_freq_factor"] = self.low_freq_factor
            out["high_freq_factor"] = self.high_freq_factor
            out["original_max_position_embeddings"] = self.original_max_position
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Llama kind: RMS norms, rotary positions, gated SiLU feed-forward.

    Attributes:
        model_type: family, one of `FAMILIES`; decides the tensor names on disk.
        vocab_size: rows of the embedding.
        width: numbers per token between layers.
        mlp_width: numbers per token inside the feed-forward block.
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
        qk_norm: queries and keys are RMS-normalised per head before rotation.
        sliding_window: a token sees itself and this many minus one tokens before it; None sees all.
        max_position: the context length that the model was made for; recorded, not enforced.
        initializer_range: standard deviation of a fresh base's matrices.
        bos_token_id: first token of a text, or None.
        eos_token_ids: any of these ends a generation.
        pad_token_id: padding token, or None.
        matmul_precision: how products with the base's matrices are computed, see `models.precision`; a choice of
            whoever computes, so that config.json has no field for it.
    """

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_position: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    matmul_precision: MatmulPrecision = "auto"

    def __post_init__(self) -> None:
        if self.matmul_precision not in MATMUL_PRECISIONS:
            msg = f"matmul_precision is {self.matmul_precision!r}; choose one of {', '.join(MATMUL_PRECISIONS)}."
            raise ValueError(msg)
        sizes = ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "max_position"):
            if getattr(self, name) < 1:
                msg = f"{name} is {getattr(self, name)}; it must be at least 1."
                raise ValueError(msg)
        if self.num_heads % self.num_kv_heads:
            msg = f"num_kv_heads is {self.num_kv_heads}, which does not divide num_heads = {self.num_heads}."
            raise ValueError(msg)
        if self.head_dim % 2:
            msg = f"head_dim is {self.head_dim}; rotary positions need an even number."
            raise ValueError(msg)
        if self.sliding_window is not None and self.sliding_window < 1:
            msg = f"sliding_window is {self.sliding_window}; it must be at least 1, or None."
            raise ValueError(msg)
        if self.model_type not in FAMILIES:
            msg = f"model_type is {self.model_type!r}; supported are {', '.join(FAMILIES)}."
            raise ValueError(msg)
        # A family's config.json has no field for these elsewhere, so such a model could not be saved.
        problems = []
        if (self.qkv_bias, self.o_bias) not in _ATTENTION_BIASES[self.model_type]:
            problems.append(f"qkv_bias = {self.qkv_bias} with o_bias = {self.o_bias}")
        if self.mlp_bias and self.model_type != "llama":
            problems.append("mlp_bias = True")
        if self.qk_norm != (self.model_type == "qwen3"):
            problems.append(f"qk_norm = {self.qk_norm}")
        if self.sliding_window is not None and self.model_type != "mistral":
            problems.append(f"sliding_window = {self.sliding_window}")
        if problems:
            msg = f"A {self.model_type} model does not have {' or '.join(problems)}."
            raise ValueError(msg)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Reads a Hugging Face config.json, of transformers 4 or 5.

        Args:
            hf: its content.
            generation: the content of generation_config.json, whose end-of-sequence tokens are added.

        Raises:
            ValueError: a field that is missing, that is unknown, or whose value is not honoured; all of
                them are listed by name.
        """
        family = hf.get("model_type")
        if family not in FAMILIES:
            msg = f"model_type is {family!r}; supported are {', '.join(FAMILIES)}."
            raise ValueError(msg)
        problems = _unhonoured(hf, family)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        problems += [f"{name} is missing" for name in required if hf.get(name) is None]
        if problems:
            msg = f"config.json of a {family} model cannot be honoured: {'; '.join(problems)}."
            raise ValueError(msg)
        given = {**_FAMILY_DEFAULTS[family], **hf}
        heads = int(given["num_attention_heads"])
        width = int(given["hidden_size"])
        if given.get("head_dim") is None and width % heads:
            msg = f"head_dim is missing and hidden_size {width} is no multiple of num_attention_heads {heads}."
            raise ValueError(msg)
        attention_bias = bool(given.get("attention_bias", False))
        window = given.get("sliding_window") if family == "mistral" else None
        eos = _token_ids(hf.get("eos_token_id")) + _token_ids((generation or {}).get("eos_token_id"))
        return cls(
            model_type=family,
            vocab_size=int(given["vocab_size"]),
            width=width,
            mlp_width=int(given["intermediate_size"]),
            num_layers=int(given["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(given.get("num_key_value_heads") or heads),
            head_dim=int(given.get("head_dim") or width // heads),
            norm_eps=float(given.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(given),
            tied_embeddings=bool(given.get("tie_word_embeddings", False)),
            qkv_bias=True if family == "qwen2" else attention_bias,
            o_bias=False if family == "qwen2" else attention_bias,
            mlp_bias=bool(given.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            sliding_window=None if window is None else int(window),
            max_position=int(given["max_position_embeddings"]),
            initializer_range=float(given.get("initializer_range", 0.02)),
            bos_token_id=next(iter(_token_ids(given.get("bos_token_id"))), None),
            eos_token_ids=tuple(dict.fromkeys(eos)),
            pad_token_id=next(iter(_token_ids(given.get("pad_token_id"))), None),
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 5 and `from_hf` read back as this model."""
        eos = list(self.eos_token_ids)
        out: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": self.rope.to_hf(),
            "max_position_embeddings": self.max_position,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tied_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
            "pad_token_id": self.pad_token_id,
        }
        if self.model_type in ("llama", "qwen3"):
            out["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        if self.model_type == "mistral":
            out["sliding_window"] = self.sliding_window
        return out


def _token_ids(value: Any) -> list[int]:
    ids = value if isinstance(value, list | tuple) else [value]
    # Old checkpoints write -1 for "none".
    return [int(v) for v in ids if v is not None and int(v) >= 0]


def _unhonoured(hf: Mapping[str, Any], family: str) -> list[str]:
    """Fields of a config.json that would change the model in a way the decoder does not know."""
    required = dict(_REQUIRED_VALUES)
    required["architectures"] = (None, [_ARCHITECTURES[family]])
    required["layer_types"] = (None, ["full_attention"] * int(hf.get("num_hidden_layers") or 0))
    boolean = (True, False, None)
    required["attention_bias"] = boolean if family in ("llama", "qwen3") else (False, None)
    required["mlp_bias"] = boolean if family == "llama" else (False, None)
    problems = []
    for name, value in hf.items():
        if name in required:
            if value not in required[name]:
                choices = " or ".join(repr(v) for v in required[name] if v is not None)
                problems.append(f"{name} = {value!r} (supported: {choices})")
        elif name == "sliding_window":
            # The Qwen families carry a window that use_sliding_window switches on; Mistral's is honoured.
            if value is not None and family == "llama":
                problems.append(f"{name} = {value!r} (a {family} model has none)")
        elif not (name in _HONOURED or name in _INERT or name.startswith("_") or value is None):
            problems.append(f"{name} = {value!r} is unknown")
    return problems


def hf_module_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of all modules as PyTorch's `named_modules` of the causal LM gives them, in its order."""
    names = ["model", "model.embed_tokens", "model.layers"]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        attention = [f"{prefix}.self_attn.{name}" for name in LINEAR_NAMES[:4]]
        norms = [f"{prefix}.self_attn.{name}" for name in ("q_norm", "k_norm")] if config.qk_norm else []
        mlp = [f"{prefix}.mlp.{name}" for name in (*LINEAR_NAMES[4:], "act_fn")]
        names += [prefix, f"{prefix}.self_attn", *attention, *norms, f"{prefix}.mlp", *mlp]
        names += [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
    return (*names, "model.norm", "model.rotary_emb", "lm_head")
