"""The mathematics of a decoder layer as pure functions: norms, rotary positions, attention, low-rank products.

No parameters and no modules here. Everything runs in the dtype of the activations, which is float32 or wider;
products ask for full precision, because the default of accelerators (bfloat16 or TF32 passes) makes a
curvature product asymmetric enough to stop conjugate gradients. Products with frozen matrices: `models.precision`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax.models.rope import RopeConfig

PRECISION = jax.lax.Precision.HIGHEST
QUERY_CHUNK = 512
CHUNK_QUERIES_ABOVE = 1024
CAUSAL_BLOCK = 88  # least queries of a block that sees only the keys up to its end
MAX_CAUSAL_BLOCKS = 4  # each is compiled separately
_MASKED = -1e30


def rms_norm(x: Float[Array, "*lead n"], scale: Float[Array, " n"], eps: float) -> Float[Array, "*lead n"]:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.astype(x.dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int, long: bool = False) -> np.ndarray:
    """Radians per position of each rotation, float64; there are `head_dim / 2` where a whole head is rotated.

    llama3 scaling divides the frequencies of long wavelengths by `factor`, keeps those of short ones and blends
    linearly in (original context / wavelength) between; yarn blends linearly in the index of the frequency.
    longrope divides each frequency by its entry of the list that `long` selects. dynamic: those of short texts.
    """
    rotated = int(head_dim * rope.rotated_share)
    frequencies = rope.theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_max_position * frequencies / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / rope.factor
    if rope.scaling == "yarn":

        def index_of(turns: float) -> float:
            """Where the frequency stands that turns so often in the original context."""
            ratio = rope.original_max_position / (turns * 2 * math.pi)
            return rotated * math.log(ratio) / (2 * math.log(rope.theta))

        first, last = index_of(rope.beta_fast), index_of(rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotated - 1)
        width = last - first if last != first else 0.001
        stretched = np.clip((np.arange(len(frequencies)) - first) / width, 0.0, 1.0)
        return stretched * frequencies / rope.factor + (1 - stretched) * frequencies
    if rope.scaling == "longrope":
        return frequencies / np.asarray(rope.long_factor if long else rope.short_factor)
    return frequencies


def rope_angles(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "batch time"], dtype: jnp.dtype
) -> tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]]:
    """Cosines and sines of the rotations at `positions`, times the attention factor.

    Where a rotation depends on the length of the text (dynamic, longrope), it is each row's own: padding and the
    other rows of a batch change nothing. Differs from transformers, where it is the padded batch's.
    """
    if rope.depends_on_length:
        lengths = jnp.max(positions, axis=1) + 1
        frequencies = _frequencies_by_length(rope, head_dim, lengths, dtype)[:, None]
    else:
        frequencies = jnp.asarray(rope_frequencies(rope, head_dim), dtype)
    angles = positions[..., None].astype(dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention_factor != 1:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return cos, sin


def _frequencies_by_length(rope, head_dim, lengths, dtype):
    """[batch, half] radians per position."""
    if rope.scaling == "longrope":
        short, long = (jnp.asarray(rope_frequencies(rope, head_dim, here), dtype) for here in (False, True))
        return jnp.where(lengths[:, None] > rope.original_max_position, long, short)
    rotated = int(head_dim * rope.rotated_share)
    share = jnp.maximum(lengths, rope.original_max_position).astype(dtype) / rope.original_max_position
    theta = rope.theta * (rope.factor * share - (rope.factor - 1)) ** (rotated / (rotated - 2))
    return theta[:, None] ** -jnp.asarray(np.arange(0, rotated, 2) / rotated, dtype)


def rotate(
    x: Float[Array, "batch time any_heads head_dim"],
    cos: Float[Array, "batch time half"],
    sin: Float[Array, "batch time half"],
) -> Float[Array, "batch time any_heads head_dim"]:
    """Rotates entry i with entry i + half (Hugging Face's layout, not the interleaved one); the rest stays."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, rest] if rest.shape[-1] else rotated, axis=-1)


def low_rank(
    x: Float[Array, "*lead n"], a: Float[Array, "rank n"], b_t: Float[Array, "rank m"], scaling: float
) -> Float[Array, "*lead m"]:
    """`scaling * B A x`, without forming B A.

    Tokens form one axis and B is transposed, so that the derivative by B is `inner' g`. With two token axes, or
    with B as stored, XLA would transpose `g`, which is wide, and recompute everything fused into it.
    """
    tokens = x.reshape(-1, x.shape[-1])
    inner = jnp.einsum("tn,rn->tr", tokens, a.astype(x.dtype), precision=PRECISION)
    out = scaling * jnp.einsum("tr,rm->tm", inner, b_t.astype(x.dtype), precision=PRECISION)
    return out.reshape(*x.shape[:-1], b_t.shape[-1])


def place_images(
    x: Float[Array, "batch time width"],
    projected: Float[Array, "batch vectors width"],
    here: Bool[Array, "batch time"],
) -> Float[Array, "batch time width"]:
    """Embeddings with the k-th vector of a row where the row's k-th true entry of `here` is."""
    number = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, projected.shape[1] - 1)
    return jnp.where(here[..., None], jnp.take_along_axis(projected, number[..., None], axis=1), x)


def soft_cap(x: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """`cap * tanh(x / cap)`: near `x` where that is small, between -cap and cap everywhere."""
    return cap * jnp.tanh(x / cap)


def routing_weights(
    logits: Float[Array, "*lead experts"], count: int, normalised: bool
) -> Float[Array, "*lead experts"]:
    """Softmax probabilities of the `count` most probable experts, 0 for the others; the choice has no derivative.

    Args:
        logits: the router's.
        count: experts per token.
        normalised: the weights are divided by their sum.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probabilities), count)
    weights = jnp.where(jnp.any(chosen[..., None] == jnp.arange(logits.shape[-1]), axis=-2), probabilities, 0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True) if normalised else weights


def visible(
    query_positions: Int[Array, "batch queries"],
    key_positions: Int[Array, "batch keys"],
    key_valid: Bool[Array, "batch keys"] | Bool[Array, "batch queries keys"],
    window: int | Int[Array, ""] | None,
) -> Bool[Array, "batch queries keys"]:
    """Which keys a query sees: those valid (for it), not after it, and less than `window` tokens before it."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (key_valid if key_valid.ndim == 3 else key_valid[:, None]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    query_positions: Int[Array, "batch queries"],
    key_positions: Int[Array, "batch keys"],
    key_valid: Bool[Array, "batch keys"] | Bool[Array, "batch queries keys"],
    *,
    window: int | Int[Array, ""] | None = None,
    chunk: int | None = None,
    aligned: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Softmax attention with grouped key/value heads, optionally over chunks of queries.

    Each query's row is computed from the same numbers either way, so chunking changes memory
    (`chunk * keys` scores at a time instead of `queries * keys`) and nothing else.

    Where queries and keys are the same tokens, blocks of queries leave out the keys behind their end, which they do
    not see: up to three eighths of all pairs, in every derivative. This may change what padding attends to.

    Args:
        q: rotated queries.
        k: rotated keys.
        v: values.
        query_positions: place of each query in its text, padding not counted.
        key_positions: the same for keys.
        key_valid: False for padding or, with a row for each query, for keys that this query must not see.
        window: sliding window in tokens, which may differ from layer to layer of a scan; None for all.
        chunk: queries computed at a time; None for all.
        aligned: queries and keys are the same tokens in the same order.
        scale: factor of the scores; None is `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(score / softcap)`; None leaves them.
    """
    batch, queries = query_positions.shape
    attend = functools.partial(_attend, scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap)
    if chunk is None or queries <= chunk:
        mask = visible(query_positions, key_positions, key_valid, window)
        if not aligned:
            return attend(q, k, v, mask)
        parts = [
            attend(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end])
            for start, end in causal_blocks(queries)
        ]
        return jnp.concatenate(parts, axis=1)

    fill = -queries % chunk
    q_parts = jnp.pad(q, ((0, 0), (0, fill), (0, 0), (0, 0))).reshape(batch, -1, chunk, *q.shape[2:])
    position_parts = jnp.pad(query_positions, ((0, 0), (0, fill))).reshape(batch, -1, chunk)
    parts = [q_parts, position_parts]
    if key_valid.ndim == 3:
        parts.append(jnp.pad(key_valid, ((0, 0), (0, fill), (0, 0))).reshape(batch, -1, chunk, k.shape[1]))

    # Recomputed in the backward pass; otherwise the scores of all chunks would be stored.
    @jax.checkpoint
    def one_chunk(parts):
        q_part, positions, *valid = parts
        return attend(q_part, k, v, visible(positions, key_positions, valid[0] if valid else key_valid, window))

    out = jax.lax.map(one_chunk, tuple(jnp.moveaxis(part, 1, 0) for part in parts))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *q.shape[2:])[:, :queries]


def causal_blocks(time: int) -> list[tuple[int, int]]:
    """Start and end of the blocks that `time` queries are computed in, of nearly equal lengths."""
    count = min(max(time // CAUSAL_BLOCK, 1), MAX_CAUSAL_BLOCKS)
    ends = [time * (i + 1) // count for i in range(count)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _attend(q, k, v, mask, scale, softcap):
    """Attention of all queries, for second derivatives on a CPU: few passes over numbers of every pair of tokens.

    The division by the sum follows the product with the values, so its derivatives have [queries, head_dim]
    numbers, and only the exponential has one for each pair. The subtracted peak cancels and needs no derivative.
    Axes have the order that XLA multiplies them in.
    """
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    rows = (batch, kv_heads, groups * queries)
    q = jnp.moveaxis(q.reshape(batch, queries, kv_heads, groups, head_dim), 1, 3).reshape(*rows, head_dim)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    heads_first = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(q * scale, k, (((3,), (3,)), heads_first), precision=PRECISION)
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    scores = scores.reshape(batch, kv_heads, groups, queries, -1)
    # A finite number, so that a row of padding that sees nothing has no nan, in derivatives too.
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak).reshape(*rows, -1)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jax.lax.dot_general(weights, v, (((3,), (2,)), heads_first), precision=PRECISION) / total
    out = jnp.moveaxis(out.reshape(batch, kv_heads, groups, queries, head_dim), 3, 1)
    return out.reshape(batch, queries, heads, head_dim)
