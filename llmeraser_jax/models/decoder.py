"""Owns the one network of the package: a decoder as a pure function of base and adapter, for every family.

The base is the linen collection "params", the adapter the collection "lora"; both are arguments. Layers are
scanned, each under `jax.checkpoint`, so their parameters are stacked on a leading axis `layers`; what sets a layer
apart from the others (a window, its rotary positions) is a number per layer that is scanned along. Paths of the
base, on which sharding rules and conversion tables rely (kernels are [in, out], the transpose of PyTorch's):

    embed_tokens/embedding                      [vocab, width]
    layers/input_norm/scale                     [layers, width], with input_norms
    layers/{q,k,v}_proj/kernel                  [layers, width, heads * head_dim], kv_heads for k and v
    layers/qkv_proj/kernel                      [layers, width, outputs of all three] with fused_projections
    layers/o_proj/kernel                        [layers, heads * head_dim, width]
    layers/{q,k}_norm/scale                     [layers, head_dim], with qk_norm; all heads' where it is joint
    layers/attention_output_norm/scale          [layers, width], with output_norms
    layers/post_attention_norm/scale            [layers, width], with input_norms
    layers/{gate,up}_proj/kernel                [layers, width, mlp_width]
    layers/gate_up_proj/kernel                  [layers, width, 2 * mlp_width], with fused_projections
    layers/down_proj/kernel                     [layers, mlp_width, width]
    layers/{any of them}/bias                   [layers, out], where the family has biases
    layers/experts/router                       [layers, width, experts], with num_experts in place of those
    layers/experts/{gate,up}_proj               [layers, experts, width, mlp_width]
    layers/experts/down_proj                    [layers, experts, mlp_width, width]
    layers/mlp_output_norm/scale                [layers, width], with output_norms
    final_norm/scale                            [width]
    lm_head/kernel                              [width, vocab], unless tied to the embedding
    projector/linear_1/{kernel,bias}            [feature_width, width] and [width], of a model that sees pictures
    projector/linear_2/{kernel,bias}            [width, width] and [width]

and of the adapter, for each targeted linear layer:

    layers/{name}/a                             [layers, rank, in], rows beyond a layer's own rank unread
    layers/{name}/b                             [layers, out, rank]; the collection holds it transposed, as `b_t`
    projector/{name}/{a,b}                      the same, of one layer

An adapter's trained copies of modules take the place of the base's leaves. A tied base that holds a head, as one
with a copied embedding does, is read as untied; there are as many tokens as the embedding has rows.

A kernel of the seven layers may be quantised, see `convert.quantization`. The effective weight is
`kernel + scaling * (B A)'`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax.convert import dequantized
from llmeraser_jax.lora import COPIES, check_lora, with_copies
from llmeraser_jax.models import layers
from llmeraser_jax.models.config import ModelConfig
from llmeraser_jax.models.precision import frozen_product
from llmeraser_jax.models.vision import ACTIVATIONS
from llmeraser_jax.parallel import gathered, gathered_shapes, held_whole, looked_up, shares_base
from llmeraser_jax.types import BaseParams, Key, LoraParams


@flax.struct.dataclass
class Context:
    """Inputs of every layer besides the activations: positions, and which keys are real.

    Cosines and sines have a leading axis of rotations where layers differ in theirs.
    """

    cos: Float[Array, "batch time half"] | Float[Array, "ropes batch time half"]
    sin: Float[Array, "batch time half"] | Float[Array, "ropes batch time half"]
    query_positions: Int[Array, "batch time"]
    key_positions: Int[Array, "batch keys"]
    key_valid: Bool[Array, "batch keys"] | Bool[Array, "batch time keys"]
    write_at: Int[Array, ""] | None  # slot of the cache that the first token of this call goes to


@flax.struct.dataclass
class Variation:
    """Settings that differ between layers: one layer's, or all with a leading axis; None where they are equal."""

    window: Int[Array, "*layers"] | None = None
    rope: Int[Array, "*layers"] | None = None  # index into the rotations of the context


@flax.struct.dataclass
class KVCache:
    """Rotated keys, and values, of all layers."""

    keys: Float[Array, "layers batch slots kv_heads head_dim"]
    values: Float[Array, "layers batch slots kv_heads head_dim"]


class Scale(nn.Module):
    """An RMS norm with its learned scale, which is one plus the parameter if that is an `offset`."""

    eps: float
    offset: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],))
        return layers.rms_norm(x, 1 + scale.astype(x.dtype) if self.offset else scale, self.eps)


class Linear(nn.Module):
    """A linear layer and, where the collection "lora" has one for it, its low-rank update."""

    features: int
    use_bias: bool
    init_range: float
    lora_scaling: float
    lora_dropout: float
    matmul_precision: str

    @nn.compact
    def __call__(self, x):
        out = product(x, self._kernel(x.shape[-1]), "/".join((*self.path, "kernel")), self.matmul_precision)
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        if self.has_variable("lora", "a"):
            a, b_t = self.get_variable("lora", "a"), self.get_variable("lora", "b_t")
            if self.lora_dropout > 0 and self.has_rng("dropout"):
                keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.lora_dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.lora_dropout), 0)
            out = out + layers.low_rank(x, a, b_t, self.lora_scaling)
        return out

    def _kernel(self, inputs):
        return parameter(self, "kernel", self.init_range, (inputs, self.features))


def parameter(module: nn.Module, name: str, init_range: float, shape: tuple[int, ...]) -> Any:
    """A frozen matrix as it is there: whole, a device's share of it, or quantised; normal numbers at the start."""
    if module.is_initializing():
        return module.param(name, nn.initializers.normal(init_range), shape)
    return module.get_variable("params", name)  # linen's `param` would refuse all but an array of this shape


def product(x: Array, kernel: Any, path: str, setting: str, *, transposed: bool = False) -> Array:
    """`x` times a frozen matrix, which is gathered and dequantised here if need be.

    Args:
        x: activations.
        kernel: see `parameter`.
        path: of the kernel in the base.
        setting: see `frozen_product`, as is `transposed`.
        transposed: the kernel is [outer, inner].
    """

    def with_share(x, kernel):
        return frozen_product(x, dequantized(gathered(path, kernel)), setting, transposed=transposed)

    if shares_base() and not path.startswith("layers/"):  # layers are rematerialised whole
        # Gathered for each micro-batch: without the barrier XLA gathers once, and keeps the whole matrix.
        kernel, _ = jax.lax.optimization_barrier((kernel, jax.lax.stop_gradient(x)))
        return jax.checkpoint(with_share)(x, kernel)
    return with_share(x, kernel)


class Experts(nn.Module):
    """Feed-forward blocks of which a router weighs a few for each token; all are computed, one after the other."""

    config: ModelConfig
    activation: Any

    @nn.compact
    def __call__(self, x):
        config = self.config
        matrix = functools.partial(parameter, self, init_range=config.initializer_range)
        router = matrix(name="router", shape=(config.width, config.num_experts))
        inward, outward = (config.width, config.mlp_width), (config.mlp_width, config.width)
        gates, ups, downs = (
            matrix(name=f"{name}_proj", shape=(config.num_experts, *shape))
            for name, shape in (("gate", inward), ("up", inward), ("down", outward))
        )
        routing = frozen_product(x, router, config.matmul_precision)
        weights = layers.routing_weights(routing, config.experts_per_token, config.normalised_routing)

        def project(x, kernel, name):
            whole = gathered(f"layers/experts/{name}_proj", kernel, axes_before=2)
            return frozen_product(x, whole, config.matmul_precision)

        @jax.checkpoint
        def add(total, expert):
            gate, up, down, weight = expert
            inside = self.activation(project(x, gate, "gate")) * project(x, up, "up")
            return total + weight[..., None] * project(inside, down, "down"), None

        return jax.lax.scan(add, jnp.zeros_like(x), (gates, ups, downs, jnp.moveaxis(weights, -1, 0)))[0]


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with its norms and added to the residual stream."""

    config: ModelConfig
    lora_scaling: float = 1.0
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x, cache, context, variation=None):
        """One layer.

        Args:
            x: [batch, time, width].
            cache: None, or keys and values of this layer, each [batch, slots, kv_heads, head_dim].
            context: see `Context`.
            variation: of this layer, see `Variation`; None where all layers are alike.

        Returns:
            The new residual stream, and the cache with this call's tokens written (None without one).
        """
        config = self.config
        batch, time, _ = x.shape
        variation = Variation() if variation is None else variation
        window = config.layer_windows[0] if variation.window is None else variation.window
        activation = nn.silu if config.activation == "silu" else functools.partial(nn.gelu, approximate=True)

        def linear(name, features, use_bias):
            scales = config.initializer_range, self.lora_scaling, self.lora_dropout
            return Linear(features, use_bias, *scales, config.matmul_precision, name=name)

        def norm(name, x, wanted=True):
            return Scale(config.norm_eps, config.norm_offset, name=name)(x) if wanted else x

        def heads(out, count):
            return out.reshape(batch, time, count, config.head_dim)

        h = norm("input_norm", x, config.input_norms)
        query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if config.fused_projections:
            qkv = linear("qkv_proj", query + 2 * key_value, config.qkv_bias)(h)
            q, k, v = jnp.split(qkv, (query, query + key_value), axis=-1)
        else:
            q, k, v = (
                linear(f"{name}_proj", features, config.qkv_bias)(h)
                for name, features in (("q", query), ("k", key_value), ("v", key_value))
            )
        if config.qk_norm_joint:
            q, k = norm("q_norm", q), norm("k_norm", k)
        q, k, v = heads(q, config.num_heads), heads(k, config.num_kv_heads), heads(v, config.num_kv_heads)
        if config.qk_norm and not config.qk_norm_joint:
            q, k = norm("q_norm", q), norm("k_norm", k)
        cos, sin = context.cos, context.sin
        if variation.rope is not None:
            cos, sin = cos[variation.rope], sin[variation.rope]
        q = layers.rotate(q, cos, sin)
        k = layers.rotate(k, cos, sin)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, context.write_at, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, context.write_at, axis=1)
            cache = (k, v)
        attended = layers.attention(
            q,
            k,
            v,
            context.query_positions,
            context.key_positions,
            context.key_valid,
            window=window,
            chunk=layers.QUERY_CHUNK if time > layers.CHUNK_QUERIES_ABOVE else None,
            aligned=cache is None,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        )
        out = linear("o_proj", config.width, config.o_bias)(attended.reshape(batch, time, -1))
        out = norm("attention_output_norm", out, config.output_norms)
        x = x + _times(out, config.residual_multiplier)

        h = norm("post_attention_norm", x, config.input_norms)
        if config.num_experts:
            out = Experts(config, activation, name="experts")(h)
        else:
            if config.fused_projections:
                gate, up = jnp.split(linear("gate_up_proj", 2 * config.mlp_width, config.mlp_bias)(h), 2, axis=-1)
            else:
                gate = linear("gate_proj", config.mlp_width, config.mlp_bias)(h)
                up = linear("up_proj", config.mlp_width, config.mlp_bias)(h)
            out = linear("down_proj", config.width, config.mlp_bias)(activation(gate) * up)
        out = norm("mlp_output_norm", out, config.output_norms)
        return x + _times(out, config.residual_multiplier), cache


def _times(x, multiplier):
    """The product, and no operation where it is `x`."""
    return x if multiplier == 1 else x * multiplier


class Embedding(nn.Module):
    """The token embedding, which a tied head reads too."""

    config: ModelConfig

    def setup(self):
        shape = (self.config.vocab_size, self.config.width)
        self.embedding = parameter(self, "embedding", self.config.initializer_range, shape)

    def __call__(self, tokens, dtype):
        return looked_up(self.embedding, tokens).astype(dtype)

    def attend(self, x):
        path = "embed_tokens/embedding"
        return product(x, self.embedding, path, self.config.matmul_precision, transposed=True)


class Projector(nn.Module):
    """Makes embeddings of a picture's features: linear, activation, linear."""

    config: ModelConfig
    lora_scaling: float = 1.0
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, features):
        config, vision = self.config, self.config.vision
        assert vision is not None
        scales = config.initializer_range, self.lora_scaling, self.lora_dropout

        def linear(name, x):
            return Linear(config.width, vision.projector_bias, *scales, config.matmul_precision, name=name)(x)

        return linear("linear_2", ACTIVATIONS[vision.projector_activation](linear("linear_1", features)))


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm and head; a projector where the model sees pictures.

    Attributes:
        config: the model.
        lora_scaling: factor of B A.
        lora_dropout: drawn only where an rng "dropout" is given.
        dtype: dtype of activations and products; None is `promote_types(float32, dtype of the embedding)`.
    """

    config: ModelConfig
    lora_scaling: float = 1.0
    lora_dropout: float = 0.0
    dtype: Any = None

    def setup(self):
        config = self.config
        self.embed_tokens = Embedding(config)
        in_axes: Any = (0, nn.broadcast, 0)  # flax declares one number; it takes one per argument
        scanned = nn.scan(
            nn.remat(DecoderLayer, prevent_cse=False),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=config.num_layers,
        )
        self.layers = scanned(config, self.lora_scaling, self.lora_dropout)
        if config.vision is not None:
            self.projector = Projector(config, self.lora_scaling, self.lora_dropout)
        self.final_norm = Scale(config.norm_eps, config.norm_offset)
        if not config.tied_embeddings:
            scales = config.initializer_range, 1.0, 0.0
            self.lm_head = Linear(config.vocab_size, False, *scales, config.matmul_precision)

    def __call__(self, tokens, attention_mask, positions=None, embeds=None, images=None):
        """Logits [batch, time, vocab], or [batch, response, vocab] at `positions` only.

        `embeds` [batch, time, width] takes the place of the tokens' rows of the embedding, and `images` [batch,
        images, features, size], projected, that of the image tokens' rows.
        """
        valid = jnp.asarray(attention_mask).astype(bool)
        where = token_positions(valid)
        x, _ = self._hidden(tokens, where, where, valid, None, None, embeds, images)
        return self._logits(x, positions)

    def decode(self, tokens, where, key_positions, key_valid, cache, write_at, positions, embeds=None, images=None):
        """Appends tokens to a cache.

        Where rotations depend on the length of a text, one that grows beyond a length at which they change (see
        `RopeConfig.changes_at`) has to be read again from its beginning: the cache holds what a shorter one gave.

        Args:
            tokens: [batch, time] new tokens.
            where: [batch, time] their positions in their texts.
            key_positions: [batch, slots] positions of the tokens in the cache, the new ones included.
            key_valid: [batch, slots] which slots hold real tokens, the new ones included; or [batch, time, slots]
                which of them each new token may see, itself included.
            cache: `KVCache`.
            write_at: slot of the first new token.
            positions: [batch, response] indices into `tokens` whose logits are wanted.
            embeds: [batch, time, width] instead of the tokens' rows of the embedding.
            images: [batch, images, features, size], projected instead of the image tokens' rows of the embedding.

        Returns:
            Logits at `positions`, and the cache.
        """
        pair = (cache.keys, cache.values)
        x, (keys, values) = self._hidden(tokens, where, key_positions, key_valid, pair, write_at, embeds, images)
        return self._logits(x, positions), KVCache(keys=keys, values=values)

    def _hidden(
        self, tokens, where, key_positions, key_valid, cache, write_at, embeds=None, images=None
    ) -> tuple[Array, Any]:
        config = self.config
        embedding = self.embed_tokens.embedding
        dtype = jnp.promote_types(jnp.float32, embedding.dtype) if self.dtype is None else self.dtype
        cos, sin = _angles(config, where, dtype)
        context = Context(
            cos=cos,
            sin=sin,
            query_positions=where,
            key_positions=key_positions,
            key_valid=key_valid,
            write_at=write_at,
        )
        x = self.embed_tokens(tokens, dtype) if embeds is None else embeds.astype(dtype)
        x = self._with_images(x, tokens, images)
        return self.layers(_times(x, config.embedding_multiplier), cache, context, _variations(config))

    def _with_images(self, x, tokens, images):
        """Embeddings with the projected features of pictures at the image tokens."""
        vision = self.config.vision
        if vision is None or (images is None and not self.is_initializing()):
            if images is not None:
                msg = f"This {self.config.model_type} model sees no pictures; leave them out."
                raise ValueError(msg)
            return x
        images = jnp.zeros((1, 1, 1, vision.feature_width)) if images is None else images
        vectors = self.projector(images.reshape(len(images), -1, images.shape[-1]).astype(x.dtype))
        return layers.place_images(x, vectors, tokens == vision.image_token)

    def _logits(self, x, positions):
        if positions is not None:
            x = jnp.take_along_axis(x, positions[..., None], axis=1)
        config = self.config
        x = self.final_norm(x)
        logits = self.embed_tokens.attend(x) if config.tied_embeddings else self.lm_head(x)
        if config.logit_divisor != 1:
            logits = logits / config.logit_divisor
        return logits if config.logit_softcap is None else layers.soft_cap(logits, config.logit_softcap)


def _angles(config, positions, dtype):
    """Cosines and sines of the model's rotations, with a leading axis where there are several."""
    plain = jnp.zeros((*positions.shape, config.rope.num_frequencies(config.head_dim)), dtype)
    pairs = [
        (plain + 1, plain) if rope is None else layers.rope_angles(rope, config.head_dim, positions, dtype)
        for rope in config.ropes
    ]
    if len(pairs) == 1:
        return pairs[0]
    return tuple(jnp.stack(parts) for parts in zip(*pairs, strict=True))


def _alike(values):
    """Whether all layers have the same."""
    return len(set(values)) == 1


def _variations(config):
    """`Variation` of all layers."""
    window = rope = None
    if not _alike(config.layer_windows):
        unseen = jnp.iinfo(jnp.int32).max  # farther than any token is
        window = jnp.asarray([unseen if here is None else here for here in config.layer_windows], jnp.int32)
    if len(config.ropes) > 1:
        rope = jnp.asarray(config.layer_ropes, jnp.int32)
    return Variation(window=window, rope=rope)


def token_positions(valid: Bool[Array, "batch time"]) -> Int[Array, "batch time"]:
    """A token's place in its text when padding is not counted; padding itself gets a place that is never seen."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=-1) - 1, 0)


def base_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every base parameter, by path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables: Any = jax.eval_shape(Decoder(config).init, key, tokens, tokens)
    leaves: dict[str, Any] = flatten_dict(variables["params"], sep="/")
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def init_base(config: ModelConfig, key: Key, dtype: str = "float32") -> BaseParams:
    """A fresh random base: matrices normal with `config.initializer_range`, norms the identity, biases zero.

    Args:
        config: the model.
        key: random key.
        dtype: storage dtype.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    base = jax.jit(Decoder(config).init)(key, tokens, tokens)["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), base)


def bind(config: ModelConfig, base: BaseParams, lora: LoraParams | None) -> tuple[Decoder, dict[str, Any]]:
    """The module and its variables for a base and an optional adapter.

    Raises:
        ValueError: the adapter has a module or a shape that this model has no place for.
    """
    dtype = jnp.promote_types(jnp.float32, base["embed_tokens"]["embedding"].dtype)
    if lora is not None:
        copies = lora.params.get(COPIES, {})
        check_lora(config, lora, gathered_shapes(base) if copies else base)
        base = with_copies(base, held_whole(copies))
    rows = base["embed_tokens"]["embedding"].shape[0]
    if rows != config.vocab_size or (config.tied_embeddings and "lm_head" in base):
        config = dataclasses.replace(
            config, vocab_size=rows, tied_embeddings=config.tied_embeddings and "lm_head" not in base
        )
    if lora is None:
        return Decoder(config, dtype=dtype), {"params": base}
    dtype = jnp.result_type(dtype, *(leaf.dtype for leaf in jax.tree.leaves(lora.params)))
    module = Decoder(config, lora.config.scaling, lora.config.dropout, dtype)
    return module, {"params": base, "lora": adapter_variables(lora)}


def adapter_variables(lora: LoraParams) -> LoraParams:
    """The collection "lora" of an adapter: B transposed, as `layers.low_rank` reads it, A with its layers' scales.

    Here, outside of the scan over layers, since inside XLA would merge the transposition with its products.
    """

    def of(modules):
        return {
            name: {"a": lora.config.scaled_rows(name, leaves["a"]), "b_t": jnp.swapaxes(leaves["b"], 1, 2)}
            for name, leaves in modules.items()
        }

    projector = jax.tree.map(lambda leaf: leaf[0], of(lora.params.get("projector", {})))
    return {"layers": of(lora.params.get("layers", {}))} | ({"projector": projector} if projector else {})


@dataclasses.dataclass(frozen=True)
class ApplyDecoder:
    """`(base, lora, tokens, attention_mask, positions, images) -> logits`, hashable, equal for equal models."""

    config: ModelConfig

    def __call__(
        self,
        base: BaseParams,
        lora: LoraParams | None,
        tokens: Int[Array | np.ndarray, "batch time"],
        attention_mask: Int[Array | np.ndarray, "batch time"] | Bool[Array | np.ndarray, "batch time"],
        positions: Int[Array | np.ndarray, "batch response"] | None = None,
        images: Float[Array | np.ndarray, "batch images features size"] | None = None,
        *,
        dropout_key: Key | None = None,
    ) -> Float[Array, "batch any_time vocab"]:
        """Next-token logits.

        Args:
            base: frozen parameters, see the module's docstring.
            lora: a `lora.Lora`; None is the base alone.
            tokens: token ids, padded on either side.
            attention_mask: nonzero for a real token.
            positions: indices into time at which logits are wanted; None is everywhere.
            images: features of each row's pictures, see `models.vision`; None is a text.
            dropout_key: turns the adapter's dropout on; only training gives one.

        Returns:
            Logits in `promote_types(float32, dtype of base and adapter)`.

        Raises:
            ValueError: the adapter does not fit the model.
        """
        module, variables = bind(self.config, base, lora)
        tokens = jnp.asarray(tokens)
        positions = None if positions is None else jnp.asarray(positions)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        images = None if images is None else jnp.asarray(images)
        return cast(Array, module.apply(variables, tokens, attention_mask, positions, None, images, rngs=rngs))
