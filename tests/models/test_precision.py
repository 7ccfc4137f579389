"""How products with frozen matrices are computed, read from the programs and compared with NumPy."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from llmeraser_jax._jaxprs import with_bfloat16_matmuls
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, linearise
from llmeraser_jax.losses import gradient_sum, lm_objective
from llmeraser_jax.models import ApplyDecoder, greedy_decode, init_base
from llmeraser_jax.models.precision import MATMUL_PRECISIONS, frozen_product, resolve_precision
from tests.models.tiny import tiny_config
from tests.small_lm import random_stack, small_config, small_lora

HIGHEST, HIGH = jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGH
# One number each (no count of tokens is one), so that a matrix is known by its shape.
SIZES = {"hidden_size": 20, "num_attention_heads": 4, "head_dim": 14, "intermediate_size": 36, "vocab_size": 32}
FROZEN = {(20, 56), (20, 28), (56, 20), (20, 36), (36, 20), (20, 32)}


def equations(jaxpr) -> Iterator[Any]:
    """All equations of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
                if isinstance(inner, core.Jaxpr):
                    yield from equations(inner)


def programs(setting, stored):
    """Training's gradient, every curvature's product, kept or not, and generation."""
    config = small_config(**SIZES)
    config = type(config)(**{**vars(config), "matmul_precision": setting})
    base = init_base(config, jax.random.key(0), stored)
    objective = lm_objective(ApplyDecoder(config), base, l2=0.0)
    lora, stack = small_lora(config, "float32"), random_stack(1, 2, "float32")
    yield "gradient", jax.make_jaxpr(lambda o, l, s: gradient_sum(o, l, s))(objective, lora, stack)
    for name, curvature in CURVATURES.items():
        operator = DatasetCurvature(objective, lora, stack, curvature)
        yield name, jax.make_jaxpr(lambda op, v: op.mv(v))(operator, lora)
        if name == "hessian":
            yield f"kept {name}", jax.make_jaxpr(lambda op, v: linearise(op).mv(v))(operator, lora)
    tokens = jnp.ones((2, 5), jnp.int32)
    stops = jnp.zeros((0,), jnp.int32)
    yield "decode", jax.make_jaxpr(lambda b, l, t: greedy_decode(config, b, l, t, t, stops, 2))(base, lora, tokens)


def frozen_products(program) -> Iterator[tuple[Any, ...]]:
    """Name, operand dtypes and precision of every product with one of the base's matrices."""
    for equation in equations(program.jaxpr):
        if equation.primitive.name in ("dot_general", "bfloat16_matmul"):
            left, right = (atom.aval for atom in equation.invars)
            if right.shape in FROZEN:
                yield equation.primitive.name, left.dtype, right.dtype, equation.params.get("precision")


@pytest.mark.parametrize(
    ("setting", "stored"), [("float32", "bfloat16"), ("tf32", "float32"), ("bfloat16", "bfloat16")]
)
def test_every_product_with_a_frozen_matrix_is_as_the_setting_says(setting, stored):
    expected = {
        "float32": ("dot_general", jnp.float32, stored, (HIGHEST, HIGHEST)),
        "tf32": ("dot_general", jnp.float32, stored, (HIGH, HIGH)),
        "bfloat16": ("bfloat16_matmul", jnp.float32, stored, None),
    }[setting]
    for name, program in programs(setting, stored):
        found = list(frozen_products(program))
        assert len(found) >= 8, name
        assert {tuple(map(str, product)) for product in found} == {
            (expected[0], str(jnp.dtype(expected[1])), str(jnp.dtype(expected[2])), str(expected[3]))
        }, name
        # Stacked kernels stay as they are stored: nothing converts one before the loop over layers.
        converted = [
            e.outvars[0].aval for e in equations(program.jaxpr) if e.primitive.name == "convert_element_type"
        ]
        assert not [aval for aval in converted if aval.ndim == 3 and aval.shape[1:] in FROZEN], name
        assert not [aval for aval in converted if aval.ndim == 2 and aval.shape in FROZEN], name


def test_bfloat16_rounds_both_operands_in_every_derivative():
    rng = np.random.default_rng(0)
    x, kernel, slope = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 3, 8), (8, 6), (5, 3, 6)))

    def narrow(a):
        return np.asarray(a.astype(jnp.bfloat16), np.float64)

    out, pull_back = jax.vjp(lambda x, k: frozen_product(x, k, "bfloat16"), x, kernel)
    by_x, by_kernel = pull_back(slope)
    pairs = [
        (out, narrow(x) @ narrow(kernel)),
        (jax.jvp(lambda x: frozen_product(x, kernel, "bfloat16"), (x,), (x,))[1], narrow(x) @ narrow(kernel)),
        (by_x, narrow(slope) @ narrow(kernel).T),
        (by_kernel, np.einsum("abn,abm->nm", narrow(x), narrow(slope))),
        (frozen_product(slope, kernel, "bfloat16", transposed=True), narrow(slope) @ narrow(kernel).T),
        (jax.vmap(lambda x: frozen_product(x, kernel, "bfloat16"), 1, 1)(x), narrow(x) @ narrow(kernel)),
        (
            jax.vmap(lambda x, k: frozen_product(x, k, "bfloat16"), (0, None))(x, kernel),
            narrow(x) @ narrow(kernel),
        ),
        (
            jax.vmap(lambda k: frozen_product(x, k, "bfloat16"))(jnp.stack([kernel, 2 * kernel])),
            np.stack([narrow(x) @ narrow(kernel), narrow(x) @ narrow(2 * kernel)]),
        ),
    ]
    for got, expected in pairs:
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(out, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64), rtol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_transpose_by_the_kernel_has_its_layout(transposed):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-4, 5, (7, 8)), jnp.float32)
    kernel = jnp.asarray(rng.integers(-4, 5, (6, 8) if transposed else (8, 6)), jnp.float32)
    loss = [
        jax.grad(lambda k, s=setting: jnp.sum(frozen_product(x, k, s, transposed=transposed) ** 2))(kernel)
        for setting in ("float32", "bfloat16")
    ]
    assert loss[1].shape == kernel.shape
    np.testing.assert_allclose(loss[1], loss[0], rtol=1e-2, atol=1.0)


def test_auto_is_float32_on_a_cpu_and_narrow_where_the_base_is(monkeypatch):
    for stored in (jnp.float32, jnp.bfloat16):
        assert resolve_precision("auto", jnp.dtype(stored)) == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    found = [resolve_precision("auto", jnp.dtype(stored)) for stored in ("float32", "bfloat16", "float16")]
    assert found == ["float32", "bfloat16", "float32"]
    assert [resolve_precision(s, jnp.dtype("bfloat16")) for s in MATMUL_PRECISIONS[1:]] == [*MATMUL_PRECISIONS[1:]]
    with pytest.raises((ValueError, TypeError), match="fp8"):  # TypeError: run-time type checks of the tests
        tiny_config(matmul_precision="fp8")


def test_narrow_curvature_products_round_what_meets_a_narrow_kernel_too():
    x, kernel = jnp.full((2, 3), 1.001), jnp.ones((3, 4), jnp.bfloat16)
    narrow = jax.jit(with_bfloat16_matmuls(lambda x, k: frozen_product(x, k)))
    np.testing.assert_array_equal(narrow(x, kernel), jnp.full((2, 4), 3.0))
