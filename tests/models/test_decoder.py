import dataclasses

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.lora import Lora, LoraConfig
from llmeraser_jax.models import DecoderLayer, Model, decoder, init_base, layers
from llmeraser_jax.models.decoder import ApplyDecoder, Context, Decoder, adapter_variables, token_positions
from llmeraser_jax.models.generation import generate
from llmeraser_jax.models.precision import frozen_product
from tests.models.tiny import MASK, TOKENS, VARIED, apply, random_lora, tiny_config, tiny_model


@pytest.mark.parametrize("changes", [VARIED[name] for name in ("gemma3", "smollm3")])
def test_layers_that_differ_are_scanned_as_if_each_were_written_out(changes):
    model = tiny_model(**changes)
    config, lora = model.config, random_lora(model)
    logits = apply(model.apply, model.base, lora, TOKENS, MASK)

    def alone(layer):
        """The model of one layer, and what it keeps of base and adapter."""
        of_one = {name: getattr(config, name) and (getattr(config, name)[layer],) for name in _PER_LAYER}
        if config.sliding_window is not None and config.layer_windows[layer] is None:
            of_one |= {"sliding_window": None, "windowed_layers": None}
        one = dataclasses.replace(config, num_layers=1, **of_one)
        variables = {"params": model.base, "lora": adapter_variables(lora)}
        cut = {
            name: leaves | {"layers": jax.tree.map(lambda leaf: leaf[layer : layer + 1], leaves["layers"])}
            for name, leaves in variables.items()
        }
        return Decoder(one, lora.config.scaling), cut

    where = token_positions(MASK)
    x = model.base["embed_tokens"]["embedding"][TOKENS]
    for layer in range(config.num_layers):
        module, variables = alone(layer)
        x, _ = module.apply(variables, TOKENS, where, where, MASK, None, None, x, method="_hidden")
        x = x / (config.embedding_multiplier if layer + 1 < config.num_layers else 1)
    expected = module.apply(variables, x, None, method="_logits")
    np.testing.assert_allclose(np.asarray(expected)[MASK], np.asarray(logits)[MASK], rtol=1e-5, atol=1e-5)


_PER_LAYER = ("windowed_layers", "unrotated_layers")


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_scan_equals_an_explicit_loop_over_layers(with_lora):
    model = tiny_model(num_layers=4)
    config = model.config
    lora = random_lora(model) if with_lora else None
    expected = apply(model.apply, model.base, lora, TOKENS, MASK)

    where = token_positions(MASK)
    cos, sin = layers.rope_angles(config.rope, config.head_dim, where, jnp.dtype("float32"))
    context = Context(cos=cos, sin=sin, query_positions=where, key_positions=where, key_valid=MASK, write_at=None)
    x = model.base["embed_tokens"]["embedding"][TOKENS]
    layer = DecoderLayer(config, 1.0 if lora is None else lora.config.scaling)
    adapted = {} if lora is None else adapter_variables(lora)
    for index in range(config.num_layers):
        variables = {"params": model.base["layers"]} | ({} if lora is None else {"lora": adapted["layers"]})
        x, _ = layer.apply(jax.tree.map(lambda leaf: leaf[index], variables), x, None, context)  # noqa: B023
    x = layers.rms_norm(x, model.base["final_norm"]["scale"], config.norm_eps)
    logits = frozen_product(x, model.base["lm_head"]["kernel"])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_logits_at_positions_are_the_logits_of_those_positions():
    model = tiny_model()
    positions = jnp.array([[0, 8], [5, 2], [3, 3]])
    everywhere = apply(model.apply, model.base, None, TOKENS, MASK)
    chosen = apply(model.apply, model.base, None, TOKENS, MASK, positions)
    assert chosen.shape == (3, 2, 29)
    np.testing.assert_allclose(
        chosen, jnp.take_along_axis(everywhere, positions[..., None], axis=1), rtol=1e-5, atol=1e-5
    )


def test_the_head_is_computed_at_positions_only():
    model = tiny_model(vocab_size=997)
    positions = jnp.zeros((3, 1), jnp.int32)
    jaxpr = jax.make_jaxpr(model.apply)(model.base, None, TOKENS, MASK, positions)
    shapes = {tuple(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars}
    assert (3, 1, 997) in shapes
    assert (3, 9, 997) not in shapes


@pytest.mark.parametrize(
    "changes", [{}, {"model_type": "mistral", "sliding_window": 3}, VARIED["dynamic"], VARIED["mixtral"]]
)
def test_padding_on_either_side_and_its_tokens_change_nothing(changes):
    model = tiny_model(**changes)
    alone = apply(model.apply, model.base, None, TOKENS[:1, :5], jnp.ones((1, 5), jnp.int32))
    for left in (0, 4):
        for filler in (0, 11):
            padded = jnp.full((1, 9), filler).at[:, left : left + 5].set(TOKENS[:1, :5])
            mask = jnp.zeros((1, 9), jnp.int32).at[:, left : left + 5].set(1)
            out = apply(model.apply, model.base, None, padded, mask)[:, left : left + 5]
            np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-5)


def test_padding_inside_a_text_is_not_counted_as_distance():
    model = tiny_model(model_type="mistral", sliding_window=3)
    alone = apply(model.apply, model.base, None, TOKENS[:1, :5], jnp.ones((1, 5), jnp.int32))
    places = jnp.array([0, 1, 4, 5, 8])
    padded = jnp.zeros((1, 9), TOKENS.dtype).at[:, places].set(TOKENS[:1, :5])
    mask = jnp.zeros((1, 9), jnp.int32).at[:, places].set(1)
    out = apply(model.apply, model.base, None, padded, mask)[:, places]
    np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-5)


def test_a_token_does_not_change_logits_before_it():
    model = tiny_model()
    changed = TOKENS.at[:, 6].set((TOKENS[:, 6] + 1) % 29)
    mask = jnp.ones_like(TOKENS)
    before, after = (apply(model.apply, model.base, None, tokens, mask) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.allclose(before[:, 6:], after[:, 6:])


def test_long_sequences_take_the_chunked_path_with_the_same_logits(monkeypatch):
    model = tiny_model()
    whole = apply(model.apply, model.base, None, TOKENS, MASK)
    monkeypatch.setattr(layers, "CHUNK_QUERIES_ABOVE", 8)
    monkeypatch.setattr(layers, "QUERY_CHUNK", 4)
    jax.clear_caches()  # the constants are read when tracing
    chunked = apply(model.apply, model.base, None, TOKENS, MASK)
    # The chunked path loops inside the scan over layers: one scan more than without.
    assert str(jax.make_jaxpr(lambda b: model.apply(b, None, TOKENS, MASK))(model.base)).count("scan[") == 2
    np.testing.assert_allclose(np.asarray(chunked)[MASK], np.asarray(whole)[MASK], rtol=1e-5, atol=1e-5)


def test_a_pass_over_whole_texts_is_cut_into_causal_blocks_and_one_with_a_cache_is_not(monkeypatch):
    model, cut = tiny_model(), []
    blocks = layers.causal_blocks
    monkeypatch.setattr(layers, "causal_blocks", lambda time: cut.append(time) or blocks(time))
    tokens = jax.ShapeDtypeStruct((1, 200), jnp.int32)
    products = str(jax.make_jaxpr(lambda t: model.apply(model.base, None, t, jnp.ones((1, 200), bool)))(tokens))
    assert set(cut) == {200}
    # Two blocks have two products each where one would have two in all.
    monkeypatch.setattr(layers, "causal_blocks", lambda time: [(0, time)])
    whole = str(jax.make_jaxpr(lambda t: model.apply(model.base, None, t, jnp.ones((1, 200), bool)))(tokens))
    assert products.count("dot_general") == whole.count("dot_general") + 2
    monkeypatch.setattr(layers, "causal_blocks", blocks)
    cut.clear()
    generate(model, None, [[3] * 90], 2)
    assert not cut


def test_a_fresh_adapter_leaves_logits_alone_and_a_random_one_does_not():
    model = tiny_model()
    base_logits = apply(model.apply, model.base, None, TOKENS, MASK)
    fresh = model.init_lora(jax.random.key(0), LoraConfig(target_modules="all-linear"))
    fresh_logits = apply(model.apply, model.base, fresh, TOKENS, MASK)
    np.testing.assert_allclose(fresh_logits, base_logits, rtol=1e-5, atol=1e-5)
    moved = apply(model.apply, model.base, random_lora(model), TOKENS, MASK)
    assert float(jnp.abs(moved - base_logits).max()) > 0.1


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_every_linear_layer_reads_its_adapter(module):
    model = tiny_model()
    lora = random_lora(model, target_modules=(module,))
    assert set(lora.params["layers"]) == {module}
    base_logits = apply(model.apply, model.base, None, TOKENS, MASK)
    assert float(jnp.abs(apply(model.apply, model.base, lora, TOKENS, MASK) - base_logits).max()) > 1e-2


@pytest.mark.parametrize(
    ("base_dtype", "lora_dtype", "expected"),
    [("bfloat16", "float32", "float32"), ("float32", "float32", "float32"), ("float64", "float64", "float64")],
)
def test_arithmetic_is_float32_or_wider(base_dtype, lora_dtype, expected):
    with jax.enable_x64(True):
        model = tiny_model(dtype=base_dtype)
        lora = random_lora(model, dtype=lora_dtype)
        assert model.apply(model.base, lora, TOKENS, MASK).dtype == jnp.dtype(expected)


def _loss(model, lora, base=None):
    logits = model.apply(model.base if base is None else base, lora, TOKENS, MASK)
    return -jnp.mean(jnp.where(MASK, jax.nn.log_softmax(logits)[..., 5], 0))


def test_gradient_and_hessian_products_match_finite_differences():
    with jax.enable_x64(True):
        model = tiny_model(dtype="float64")
        lora = random_lora(model, dtype="float64")
        v = random_lora(model, seed=9, scale=0.05, dtype="float64")
        loss = jax.jit(lambda p: _loss(model, p))
        gradient = jax.jit(jax.grad(loss))
        forward, backward = (trees.tree_axpy(step, v, lora) for step in (1e-5, -1e-5))
        slope = (loss(forward) - loss(backward)) / 2e-5
        np.testing.assert_allclose(trees.tree_vdot(gradient(lora), v), slope, rtol=1e-7)
        product = jax.jit(lambda p, d: jax.jvp(gradient, (p,), (d,))[1])(lora, v)
        differences = jax.tree.map(lambda a, b: (a - b) / 2e-5, gradient(forward), gradient(backward))
        chex.assert_trees_all_close(product, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_hessian_products_are_those_of_the_dense_hessian(name):
    with jax.enable_x64(True):
        model = tiny_model(dtype="float64", **VARIED[name])
        targets = tuple(model.config.linear_shapes)
        lora = random_lora(model, dtype="float64", rank=1, target_modules=(targets[0], targets[-1]))
        flat, unravel = jax.flatten_util.ravel_pytree(lora)
        loss = jax.jit(lambda p: _loss(model, unravel(p)))
        v = np.random.default_rng(0).standard_normal(flat.shape)
        v = jnp.asarray(v / np.linalg.norm(v))
        hessian = jax.jit(jax.hessian(loss))(flat)
        gradient = jax.jit(jax.grad(loss))
        product = jax.jit(lambda p, d: jax.jvp(gradient, (p,), (d,))[1])(flat, v)
        np.testing.assert_allclose(product, hessian @ v, rtol=1e-9, atol=1e-12)
        differences = (gradient(flat + 1e-5 * v) - gradient(flat - 1e-5 * v)) / 2e-5
        assert float(jnp.linalg.norm(product - differences)) < 1e-6 * float(jnp.linalg.norm(product))


def test_the_hessian_is_symmetric_in_float32():
    model = tiny_model()
    lora = random_lora(model)
    u, v = (random_lora(model, seed=seed, scale=1.0) for seed in (1, 2))
    product = jax.jit(lambda d: jax.jvp(jax.grad(lambda p: _loss(model, p)), (lora,), (d,))[1])
    left, right = trees.tree_vdot(u, product(v)), trees.tree_vdot(v, product(u))
    scale = trees.tree_norm(u) * trees.tree_norm(product(v))
    assert abs(float(left - right)) < 1e-6 * float(scale)


def test_remat_keeps_little_per_layer(monkeypatch):
    def temporary_bytes(num_layers):
        config = tiny_config(num_layers=num_layers, width=32, mlp_width=256)
        base, lora = jax.eval_shape(lambda: _fresh(config))
        tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

        def loss(lora, base, tokens):
            return jnp.sum(ApplyDecoder(config)(base, lora, tokens, jnp.ones_like(tokens), tokens[:, :1]))

        analysis = jax.jit(jax.grad(loss)).lower(lora, base, tokens).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    def per_layer():
        return (temporary_bytes(10) - temporary_bytes(2)) / 8

    with_remat = per_layer()
    monkeypatch.setattr(decoder.nn, "remat", lambda module, **_: module)
    assert with_remat < 0.2 * per_layer()


def _fresh(config):
    model = Model(config=config, base=init_base(config, jax.random.key(0)))
    return model.base, model.init_lora(jax.random.key(1), LoraConfig(target_modules="all-linear"))


def test_apply_is_equal_and_hashable_for_equal_models_and_compiles_once():
    first, second = tiny_model(0), tiny_model(1)
    assert first.apply == second.apply
    assert hash(first.apply) == hash(second.apply)
    assert first.apply != ApplyDecoder(tiny_config(norm_eps=1e-3))

    @chex.assert_max_traces(n=1)
    def run(apply, base, lora):
        return apply(base, lora, TOKENS, MASK)

    jitted = jax.jit(run, static_argnums=0)
    for model in (first, second):
        jitted(model.apply, model.base, random_lora(model))


def test_an_adapter_that_does_not_fit_is_refused():
    model = tiny_model()
    lora = random_lora(model)
    stray = Lora(params={"layers": {"w_pack": lora.params["layers"]["q_proj"]}}, config=lora.config)
    with pytest.raises(ValueError, match="w_pack"):
        model.apply(model.base, stray, TOKENS, MASK)
    deeper = random_lora(tiny_model(num_layers=3))
    with pytest.raises(ValueError, match=r"layers/\w+_proj/a is \(3, 3, 24\); .* need \(2, 3, 24\)"):
        model.apply(model.base, deeper, TOKENS, MASK)


def test_dropout_is_drawn_only_where_a_key_is_given():
    model = tiny_model()
    plain, dropping = random_lora(model), random_lora(model, dropout=0.5)
    without = apply(model.apply, model.base, plain, TOKENS, MASK)
    np.testing.assert_array_equal(apply(model.apply, model.base, dropping, TOKENS, MASK), without)
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = [
        apply(model.apply, model.base, dropping, TOKENS, MASK, dropout_key=key)
        for key in (keys[0], keys[0], keys[1])
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])
    assert not np.allclose(drawn[0], without)
    np.testing.assert_array_equal(apply(model.apply, model.base, plain, TOKENS, MASK, dropout_key=keys[0]), without)


def test_dropout_is_unbiased():
    # The last projection of the only layer: what it adds is linear in the dropout mask.
    model = tiny_model(num_layers=1)
    lora = random_lora(model, target_modules=("down_proj",), dropout=0.4)
    module = Decoder(model.config, lora.config.scaling, lora.config.dropout)
    variables = {"params": model.base, "lora": adapter_variables(lora)}

    def hidden(key):
        valid = MASK
        where = token_positions(valid)
        rngs = None if key is None else {"dropout": key}
        return module.apply(variables, TOKENS, where, where, valid, None, None, rngs=rngs, method="_hidden")[0]

    keys = jax.random.split(jax.random.key(1), 2000)
    draws = jax.jit(jax.vmap(hidden))(keys)
    standard_error = jnp.std(draws, axis=0) / jnp.sqrt(2000)
    deviation = jnp.abs(jnp.mean(draws, axis=0) - hidden(None))
    assert float(jnp.max(deviation / (standard_error + 1e-6))) < 5.5
