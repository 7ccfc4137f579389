"""Owns pictures: what stands for one in a batch, and the frozen CLIP vision tower that reads it.

How a picture enters a forward pass of a LLaVA model (`ModelConfig.vision` is not None):

    pixels       [channels, image_size, image_size], float32, resized and normalised as the checkpoint's image
                 processor does. Only `features` reads them.
    features     [num_features, feature_width]: hidden states of the layers `feature_layers`, side by side, their
                 class token left out with select "default". They depend on tower and picture alone: computed once
                 (`models.features`), they are data to everything that trains or differentiates.
    tokens       the picture's place in a text is `num_features` times the token `image_token`, as the model's
                 processor writes it. Texts that are cut have to keep all of them, or none.
    batch        `TokenBatch.images` [batch, images, num_features, feature_width]: of each row its pictures in the
                 order of their places, then zeros up to the row with the most pictures. None for rows of text.
    embeddings   at the k-th `image_token` of a row stands the projection of the k-th vector of its pictures,
                 counted over all of them; everywhere else the token's own embedding.

The projector (linear, GELU, linear) belongs to the base, at `projector/linear_{1,2}/{kernel,bias}`, and can carry
an adapter. The tower does not: its parameters are `Model.vision`, apart from the base, so that no program that
trains, differentiates or generates takes them. Their paths (kernels are [in, out]):

    class_embedding                                      [width]
    patch_embedding                                      [width, channels, patch_size, patch_size]
    position_embedding                                   [1 + patches, width]
    {pre_norm,post_norm}/{scale,bias}                    [width]; post_norm is stored and not used
    layers/{attention_norm,mlp_norm}/{scale,bias}        [layers, width]
    layers/{q,k,v,out}_proj/{kernel,bias}                [layers, width, width], [layers, width]
    layers/{fc1,fc2}/{kernel,bias}                       [layers, in, out], [layers, out]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from llmeraser_jax.checks import check_at_least, check_positive
from llmeraser_jax.models.fields import Fields, show
from llmeraser_jax.models.layers import PRECISION
from llmeraser_jax.types import BaseParams, Key

Activation = Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
Select = Literal["default", "full"]
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "gelu": partial(nn.gelu, approximate=False),
        "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    }
)

# transformers' values of what the vision_config of config.json leaves out.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP vision tower, what of it is shown to the text model, and how it is projected.

    Attributes:
        image_token: the token that stands for one vector of a picture.
        image_size: pixels of a picture's sides.
        patch_size: pixels of a patch's sides; divides `image_size`.
        num_channels: numbers per pixel.
        width: numbers per patch between layers.
        mlp_width: numbers per patch inside the feed-forward block.
        num_layers: encoder layers.
        num_heads: attention heads; divides `width`.
        norm_eps: added to the variance in layer norms.
        activation: of the feed-forward block.
        feature_layers: the hidden states that are the features: 0 is the input of the first layer, k the output of
            the k-th; negative numbers count from the last output, -1.
        select: "default" leaves the class token out, "full" keeps it.
        projector_activation: between the projector's linear layers.
        projector_bias: the projector's linear layers have biases.
    """

    image_token: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    feature_layers: tuple[int, ...] = (-2,)
    select: Select = "default"
    projector_activation: Activation = "gelu"
    projector_bias: bool = True

    def __post_init__(self) -> None:
        check_at_least(self, image_token=0, image_size=1, patch_size=1, num_channels=1, width=1, mlp_width=1)
        check_at_least(self, num_layers=1, num_heads=1)
        check_positive(self, "norm_eps")
        if self.image_size % self.patch_size or self.width % self.num_heads:
            msg = (
                f"patch_size {self.patch_size} has to divide image_size {self.image_size}, and num_heads "
                f"{self.num_heads} width {self.width}."
            )
            raise ValueError(msg)
        outside = [k for k in self.feature_layers if not -self.num_layers - 1 <= k <= self.num_layers]
        if outside or not self.feature_layers:
            msg = (
                f"feature_layers is {self.feature_layers}; expected numbers from {-self.num_layers - 1} to "
                f"{self.num_layers}, of the hidden states of {self.num_layers} layers."
            )
            raise ValueError(msg)
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("projector_activation", ACTIVATIONS),
            ("select", get_args(Select)),
        ):
            if getattr(self, name) not in choices:
                msg = f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}."
                raise ValueError(msg)

    @property
    def num_patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_features(self) -> int:
        """Vectors that stand for a picture: one for each of its image tokens."""
        return self.num_patches + (self.select == "full")

    @property
    def feature_width(self) -> int:
        """Numbers of each."""
        return self.width * len(self.feature_layers)

    @property
    def module_names(self) -> tuple[str, ...]:
        """Names of the tower's modules as PyTorch's `named_modules` gives them, from the tower on."""
        inside = ["self_attn", *(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out"))]
        inside += ["layer_norm1", "mlp", "mlp.activation_fn", "mlp.fc1", "mlp.fc2", "layer_norm2"]
        names = ["embeddings", "embeddings.patch_embedding", "embeddings.position_embedding", "pre_layrnorm"]
        names += ["encoder", "encoder.layers", "post_layernorm"]
        for layer in range(self.num_layers):
            names += [f"encoder.layers.{layer}", *(f"encoder.layers.{layer}.{name}" for name in inside)]
        return ("", *(f".{name}" for name in names))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> tuple[VisionConfig | None, list[str]]:
        """Reads the fields of a LLaVA config.json that describe its vision.

        Returns:
            The configuration, or None where it cannot be honoured; and every problem, in words.
        """
        given = hf.get("vision_config")
        if not isinstance(given, Mapping):
            return None, [f"vision_config = {show(given)} (expected an object of fields)"]
        top, tower = Fields(hf), Fields({**_DEFAULTS, **given}, "vision_config.")
        token = (
            "image_token_id" if "image_token_index" not in hf and "image_token_id" in hf else "image_token_index"
        )
        layers = hf.get("vision_feature_layer", -2)
        layers = list(layers) if isinstance(layers, list | tuple) else [layers]
        if not layers or not all(type(k) is int for k in layers):
            top.refuse("vision_feature_layer", "a whole number or a list of them")
            layers = [-1]
        select = _choice(top, "vision_feature_select_strategy", get_args(Select), "default")
        values: dict[str, Any] = {
            "image_token": top.integer(token, 32000, least=0),
            "image_size": _side(tower, "image_size"),
            "patch_size": _side(tower, "patch_size"),
            "num_channels": tower.integer("num_channels"),
            "width": tower.integer("hidden_size"),
            "mlp_width": tower.integer("intermediate_size"),
            "num_layers": tower.integer("num_hidden_layers", most=_MOST_LAYERS),
            "num_heads": tower.integer("num_attention_heads"),
            "norm_eps": tower.number("layer_norm_eps"),
            "activation": _choice(tower, "hidden_act", tuple(ACTIVATIONS), "quick_gelu"),
            "feature_layers": tuple(layers),
            "select": select,
            "projector_activation": _choice(top, "projector_hidden_act", tuple(ACTIVATIONS), "gelu"),
            "projector_bias": top.boolean("multimodal_projector_bias", True),
        }
        problems = top.problems + tower.problems
        for name, value in given.items():
            if name in _REQUIRED and value not in _REQUIRED[name]:
                choices = " or ".join(repr(v) for v in _REQUIRED[name] if v is not None)
                problems.append(f"vision_config.{name} = {show(value)} (supported: {choices or None})")
            elif value is not None and name not in _KNOWN and not name.startswith("_"):
                problems.append(f"vision_config.{name} = {show(value)} is unknown")
        if not problems:
            try:
                return cls(**values), []
            except ValueError as error:
                problems = [str(error).rstrip(".")]
        return None, problems

    def to_hf(self) -> dict[str, Any]:
        """The fields that `from_hf` and transformers read back as this configuration."""
        layers = list(self.feature_layers)
        return {
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": self.width,
                "intermediate_size": self.mlp_width,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.num_heads,
                "num_channels": self.num_channels,
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "hidden_act": self.activation,
                "layer_norm_eps": self.norm_eps,
            },
            "image_token_index": self.image_token,
            "image_seq_length": self.num_features,
            "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
            "vision_feature_select_strategy": self.select,
            "projector_hidden_act": self.projector_activation,
            "multimodal_projector_bias": self.projector_bias,
        }


# Fields of a LLaVA config.json that `VisionConfig.from_hf` reads, `image_seq_length` following from the others.
VISION_FIELDS = frozenset(
    {
        "vision_config", "image_token_index", "image_token_id", "image_seq_length", "vision_feature_layer",
        "vision_feature_select_strategy", "projector_hidden_act", "multimodal_projector_bias",
    }
)  # fmt: skip
_REQUIRED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "model_type": ("clip_vision_model", None),
        "attention_dropout": (0, None),
        "dropout": (0, None),
        "pruned_heads": ({}, None),
        "add_cross_attention": (False, None),
        "is_encoder_decoder": (False, None),
    }
)
# Of text generation, training and bookkeeping, which every configuration of transformers 4 repeats.
_INERT = frozenset(
    {
        "projection_dim", "vocab_size", "initializer_range", "initializer_factor", "transformers_version",
        "dtype", "torch_dtype", "architectures", "return_dict", "output_hidden_states", "output_attentions",
        "output_scores", "return_dict_in_generate", "use_bfloat16", "tf_legacy_loss", "torchscript",
        "tie_word_embeddings", "tie_encoder_decoder", "cross_attention_hidden_size", "chunk_size_feed_forward",
        "is_decoder", "id2label", "label2id", "finetuning_task", "task_specific_params", "problem_type",
        "tokenizer_class", "prefix", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
        "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "max_length", "min_length",
        "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
        "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values",
    }
)  # fmt: skip


_KNOWN = frozenset({*_DEFAULTS, *_REQUIRED, *_INERT})


def _choice(fields: Fields, name: str, choices: tuple[str, ...], default: str) -> str:
    value = fields.content.get(name, default)
    if value not in choices:
        fields.refuse(name, " or ".join(map(repr, choices)))
        return default
    return value


def _side(fields: Fields, name: str) -> int:
    """A size in pixels, which transformers also writes as two equal ones."""
    value = fields.content.get(name)
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        return Fields({name: value[0]}, fields.prefix).integer(name)
    return fields.integer(name)


class _Norm(nn.Module):
    """A layer norm."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale.astype(x.dtype) + bias.astype(x.dtype)


class _Dense(nn.Module):
    """A linear layer with a bias."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(x.shape[-1] ** -0.5), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.einsum("...n,nm->...m", x, kernel.astype(x.dtype), precision=PRECISION) + bias.astype(x.dtype)


class _Layer(nn.Module):
    """Attention of all patches to all, and feed-forward; the carry keeps the hidden states that are wanted."""

    config: VisionConfig

    @nn.compact
    def __call__(self, carry, index):
        config, (x, kept) = self.config, carry
        heads = (*x.shape[:-1], config.num_heads, config.width // config.num_heads)
        h = _Norm(config.norm_eps, name="attention_norm")(x)
        q, k, v = (_Dense(config.width, name=f"{name}_proj")(h).reshape(heads) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * heads[-1] ** -0.5, k, precision=PRECISION)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v, precision=PRECISION)
        x = x + _Dense(config.width, name="out_proj")(out.reshape(x.shape))
        h = _Norm(config.norm_eps, name="mlp_norm")(x)
        h = ACTIVATIONS[config.activation](_Dense(config.mlp_width, name="fc1")(h))
        x = x + _Dense(config.width, name="fc2")(h)
        return (x, jnp.where(_wanted(config) == index, x, kept)), None


def _wanted(config: VisionConfig) -> Array:
    """The hidden states that are features, counted from 0, one for each leading entry of what is kept."""
    numbers = [k % (config.num_layers + 1) for k in config.feature_layers]
    return jnp.asarray(numbers, jnp.int32)[:, None, None, None]


class VisionTower(nn.Module):
    """CLIP's vision transformer up to the hidden states that a LLaVA model reads."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels):
        """Features [batch, num_features, feature_width] of pixels [batch, channels, image_size, image_size]."""
        config, width = self.config, self.config.width
        patch, init = (config.patch_size, config.patch_size), nn.initializers.normal(width**-0.5)
        first = self.param("class_embedding", init, (width,)).astype(pixels.dtype)
        kernel = self.param("patch_embedding", init, (width, config.num_channels, *patch)).astype(pixels.dtype)
        places = self.param("position_embedding", init, (1 + config.num_patches, width)).astype(pixels.dtype)
        layout = ("NCHW", "OIHW", "NHWC")
        patches = jax.lax.conv_general_dilated(
            pixels, kernel, patch, "VALID", dimension_numbers=layout, precision=PRECISION
        )
        patches = patches.reshape(len(pixels), config.num_patches, width)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(pixels), 1, width)), patches], axis=1) + places
        x = _Norm(config.norm_eps, name="pre_norm")(x)
        kept = jnp.where(_wanted(config) == 0, x, jnp.zeros((len(config.feature_layers), 1, 1, 1), x.dtype))
        scanned = nn.scan(
            _Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.num_layers
        )
        (last, kept), _ = scanned(config, name="layers")((x, kept), jnp.arange(1, config.num_layers + 1))
        if self.is_initializing():
            _Norm(config.norm_eps, name="post_norm")(last)
        features = jnp.moveaxis(kept, 0, 2).reshape(len(pixels), 1 + config.num_patches, config.feature_width)
        return features[:, 1:] if config.select == "default" else features


def _pixels(config: VisionConfig, count: int = 1) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, config.num_channels, config.image_size, config.image_size), jnp.float32)


def vision_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the tower, by path."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables: Any = jax.eval_shape(VisionTower(config).init, key, _pixels(config))
    leaves: dict[str, Any] = flatten_dict(variables["params"], sep="/")
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def init_vision(config: VisionConfig, key: Key, dtype: str = "float32") -> BaseParams:
    """A fresh random tower: matrices normal with one over the root of their inputs, norms the identity.

    Args:
        config: the tower.
        key: random key.
        dtype: storage dtype.
    """
    pixels = _pixels(config)
    params = jax.jit(VisionTower(config).init)(key, jnp.zeros(pixels.shape, pixels.dtype))["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@partial(jax.jit, static_argnames="config")
def vision_features(
    config: VisionConfig, vision: BaseParams, pixels: Float[Array, "batch channels height columns"]
) -> Float[Array, "batch features size"]:
    """The features of pictures, computed in float32 or wider and rounded once, to the tower's storage dtype.

    Args:
        config: the tower.
        vision: its parameters, see the module's docstring.
        pixels: as the checkpoint's image processor makes them.
    """
    stored = vision["class_embedding"].dtype
    dtype = jnp.promote_types(jnp.float32, stored)
    features: Any = VisionTower(config).apply({"params": vision}, pixels.astype(dtype))
    return features.astype(stored)
