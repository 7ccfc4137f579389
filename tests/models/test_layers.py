import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.models import layers
from llmeraser_jax.models.config import RopeConfig


def _qkv(key, batch=2, queries=7, heads=4, kv_heads=2, head_dim=6):
    q, k, v = (jax.random.normal(k, (batch, queries, heads, head_dim)) for k in jax.random.split(key, 3))
    return q, k[:, :, :kv_heads], v[:, :, :kv_heads]


def _attention_by_loops(q, k, v, valid, window):
    """Attention written out, one query and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, head_dim = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for b in range(batch):
        for t in range(queries):
            seen = [s for s in range(t + 1) if valid[b, s] and (window is None or t - s < window)]
            for h in range(heads):
                scores = np.array([q[b, t, h] @ k[b, s, h // group] for s in seen]) / math.sqrt(head_dim)
                weights = np.exp(scores - scores.max()) if seen else scores
                weights = weights / weights.sum() if seen else weights
                out[b, t, h] = sum(
                    (w * v[b, s, h // group] for w, s in zip(weights, seen, strict=True)), np.zeros(6)
                )
    return out


@pytest.fixture
def small_causal_blocks(monkeypatch):
    monkeypatch.setattr(layers, "CAUSAL_BLOCK", 2)


@pytest.mark.usefixtures("small_causal_blocks")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("chunk", "aligned"), [(None, False), (None, True), (3, True)])
def test_attention_matches_loops(window, chunk, aligned):
    q, k, v = _qkv(jax.random.key(0))
    valid = np.ones((2, 7), bool)
    valid[1, 5:] = False
    places = jnp.broadcast_to(jnp.arange(7), (2, 7))
    out = layers.attention(q, k, v, places, places, jnp.asarray(valid), window=window, chunk=chunk, aligned=aligned)
    expected = _attention_by_loops(q, k, v, valid, window)
    np.testing.assert_allclose(np.asarray(out)[valid], expected[valid], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (7, [(0, 7)]),
        (175, [(0, 175)]),
        (177, [(0, 88), (88, 177)]),
        (1024, [(0, 256), (256, 512), (512, 768), (768, 1024)]),
    ],
)
def test_causal_blocks_cover_all_queries_once(time, expected):
    assert layers.causal_blocks(time) == expected


@pytest.mark.usefixtures("small_causal_blocks")
def test_padding_on_the_left_changes_no_real_token_of_any_block():
    q, k, v = _qkv(jax.random.key(8), batch=1)
    places = jnp.arange(7)[None]
    alone = layers.attention(q, k, v, places, places, jnp.ones((1, 7), bool), aligned=True)
    padded = [jnp.pad(x, ((0, 0), (4, 0), (0, 0), (0, 0)), constant_values=50.0) for x in (q, k, v)]
    places = jnp.maximum(jnp.arange(11) - 4, 0)[None]
    q, k, v = padded
    out = layers.attention(q, k, v, places, places, (jnp.arange(11) >= 4)[None], aligned=True)
    np.testing.assert_allclose(out[:, 4:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queries", [8, 9, 11])
def test_chunked_attention_equals_whole_attention_and_so_do_its_derivatives(queries):
    q, k, v = _qkv(jax.random.key(1), queries=queries)
    places = jnp.broadcast_to(jnp.arange(queries), (2, queries))
    valid = places < jnp.array([[queries], [queries - 2]])

    def total(q, k, v, chunk):
        out = layers.attention(q, k, v, places, places, valid, window=None, chunk=chunk)
        return jnp.sum(jnp.where(valid[..., None, None], out, 0) ** 3)

    @functools.partial(jax.jit, static_argnums=0)
    def products(chunk):
        gradient = jax.grad(total, argnums=(0, 1, 2))
        return jax.jvp(lambda *x: gradient(*x, chunk), (q, k, v), (k_like(q), k, v))

    def k_like(x):
        return jnp.cos(x)

    np.testing.assert_allclose(total(q, k, v, 4), total(q, k, v, None), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), products(4), products(None))


@pytest.mark.usefixtures("small_causal_blocks")
@pytest.mark.parametrize("aligned", [False, True])
def test_derivatives_of_attention_are_those_of_a_softmax(aligned):
    # The module divides after the product with the values and drops the derivative of the peak.
    with jax.enable_x64(True):
        q, k, v = _qkv(jax.random.key(7), queries=6)
        q = 4 * q  # away from uniform weights
        places = jnp.broadcast_to(jnp.arange(6), (2, 6))
        valid = places < jnp.array([[6], [4]])
        seen = layers.visible(places, places, valid, None)[:, None]
        goal = jnp.cos(jnp.arange(q.size, dtype=q.dtype)).reshape(q.shape)

        def plain(q, k, v):
            k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
            scores = jnp.einsum("bqhd,bshd->bhqs", q, k) / math.sqrt(q.shape[-1])
            return jnp.einsum("bhqs,bshd->bqhd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), v)

        def ours(q, k, v):
            return layers.attention(q, k, v, places, places, valid, aligned=aligned)

        def derivatives(attend):
            def loss(*x):
                return jnp.sum(jnp.where(valid[..., None, None], attend(*x) - goal, 0) ** 3)

            gradient = jax.grad(loss, argnums=(0, 1, 2))
            return jax.jvp(
                lambda *x: (attend(*x)[0], gradient(*x)), (q, k, v), (jnp.sin(q), jnp.cos(k), jnp.sin(v))
            )

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
            derivatives(ours),
            derivatives(plain),
        )


def test_a_row_that_sees_nothing_is_finite_and_so_is_its_gradient():
    q, k, v = _qkv(jax.random.key(2), queries=3)
    places = jnp.zeros((2, 3), jnp.int32)
    nothing = jnp.zeros((2, 3), bool)
    gradient = jax.grad(lambda q: jnp.sum(layers.attention(q, k, v, places, places, nothing) ** 2))(q)
    assert jnp.all(jnp.isfinite(gradient))


def test_rotation_depends_on_distance_only():
    rope = RopeConfig(theta=100.0)
    x, y = jax.random.normal(jax.random.key(3), (2, 1, 1, 1, 8))

    def score(first, second):
        rotated = [
            layers.rotate(z, *layers.rope_angles(rope, 8, jnp.array([[place]]), jnp.dtype("float32")))
            for z, place in ((x, first), (y, second))
        ]
        return jnp.sum(rotated[0] * rotated[1])

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rotation_pairs_an_entry_with_the_one_half_a_head_away():
    rope = RopeConfig(theta=100.0)
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    cos, sin = layers.rope_angles(rope, 4, jnp.array([[2]]), jnp.dtype("float32"))
    a, b = 2.0, 2.0 / 10.0  # position 2 times 100 ** (0 and -1/2)
    expected = [
        math.cos(a) - 3 * math.sin(a),
        2 * math.cos(b) - 4 * math.sin(b),
        3 * math.cos(a) + math.sin(a),
        4 * math.cos(b) + 2 * math.sin(b),
    ]
    np.testing.assert_allclose(layers.rotate(x, cos, sin).ravel(), expected, rtol=1e-6)


def test_llama3_scaling_keeps_short_waves_stretches_long_ones_and_blends_between():
    plain = RopeConfig(theta=10000.0)
    scaled = RopeConfig(
        theta=10000.0,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=64,
    )
    before, after = (layers.rope_frequencies(rope, 64) for rope in (plain, scaled))
    wavelength = 2 * np.pi / before
    short, long = wavelength < 64 / 4, wavelength > 64
    np.testing.assert_allclose(after[short], before[short])
    np.testing.assert_allclose(after[long], before[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert np.all((after[between] <= before[between]) & (after[between] >= before[between] / 8))


def test_a_part_of_a_head_is_rotated_and_the_rest_stays():
    rope = RopeConfig(theta=100.0, rotated_share=0.5)
    x = jax.random.normal(jax.random.key(5), (1, 3, 2, 8))
    angles = layers.rope_angles(rope, 8, jnp.arange(3)[None], jnp.dtype("float32"))
    whole = layers.rope_angles(RopeConfig(theta=100.0), 4, jnp.arange(3)[None], jnp.dtype("float32"))
    np.testing.assert_array_equal(layers.rotate(x, *angles)[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(layers.rotate(x, *angles)[..., :4], layers.rotate(x[..., :4], *whole))


def test_the_most_probable_experts_share_the_weight():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]))
    np.testing.assert_allclose(layers.routing_weights(logits[:1], 2, False), [[0, 0.4, 0, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(layers.routing_weights(logits[:1], 2, True), [[0, 4 / 7, 0, 3 / 7]], rtol=1e-6)
    tied = layers.routing_weights(logits[1:], 2, True)  # as many as asked for, also of equal ones
    assert int(jnp.sum(tied > 0)) == 2
    np.testing.assert_allclose(jnp.sum(tied), 1, rtol=1e-6)


def test_soft_caps_bound_and_leave_small_numbers():
    x = jnp.array([-1e4, -0.01, 0.0, 0.01, 1e4])
    np.testing.assert_allclose(layers.soft_cap(x, 30.0), [-30, -0.01, 0, 0.01, 30], rtol=1e-6)


def test_rms_norm_of_a_constant_row_is_its_scale():
    x = jnp.full((1, 4), -3.0)
    scale = jnp.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(layers.rms_norm(x, scale, 0.0)[0], -scale, rtol=1e-6)


def test_low_rank_product_is_scaling_times_b_a_x():
    key = jax.random.key(4)
    a, b, x = (jax.random.normal(key, shape) for shape in ((2, 5), (3, 2), (4, 5)))
    expected = 0.7 * np.asarray(x, np.float64) @ (np.asarray(b, np.float64) @ np.asarray(a, np.float64)).T
    np.testing.assert_allclose(layers.low_rank(x, a, b.T, 0.7), expected, rtol=1e-5, atol=1e-6)
