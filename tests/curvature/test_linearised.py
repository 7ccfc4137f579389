"""Cached linearisation: the same products, without the primal pass, where memory allows."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest

from llmeraser_jax import trees
from llmeraser_jax._jaxprs import MATMULS, set_checkpoints
from llmeraser_jax.curvature import (
    CURVATURES,
    Curvature,
    Damped,
    DatasetCurvature,
    LinearisedCurvature,
    hessian,
    hessian_product,
    linearisation_bytes,
    linearise,
)
from llmeraser_jax.curvature.hessian import linearise_hessian
from llmeraser_jax.solvers import ConjugateGradients
from tests.curvature.problem import Compiled, compile_product, decoder_problem, relative_difference
from tests.curvature.programs import equations
from tests.small_lm import random_stack


def operator_of(kind, dtype):
    return DatasetCurvature(*decoder_problem(dtype), CURVATURES[kind])


class Case(NamedTuple):
    """A float32 operator, its linearisation, and the products of both."""

    operator: DatasetCurvature
    cached: LinearisedCurvature
    recomputed_product: Compiled
    cached_product: Compiled


@pytest.fixture(scope="module", params=list(CURVATURES))
def case(request):
    operator = operator_of(request.param, "float32")
    cached, v = linearise(operator), operator.params
    return Case(operator, cached, *(compile_product(o, v) for o in (operator, cached)))


def test_cached_products_equal_recomputed_ones_in_float32(case):
    v = trees.tree_random_normal(jax.random.key(3), case.operator.params)
    cached, recomputed = case.cached_product(case.cached, v), case.recomputed_product(case.operator, v)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(cached))
    assert relative_difference(cached, recomputed) < 1e-6


@pytest.mark.parametrize("kind", CURVATURES)
def test_cached_products_equal_recomputed_ones_in_float64(kind):
    with jax.enable_x64(True):
        operator = operator_of(kind, "float64")
        v = trees.tree_random_normal(jax.random.key(3), operator.params)
        both = jax.jit(lambda op, v: (linearise(op).mv(v), op.mv(v)))
        assert relative_difference(*both(operator, v)) < 1e-13


def test_cached_products_are_symmetric_and_as_definite_as_declared(case):
    u, v = (trees.tree_random_normal(jax.random.key(k), case.operator.params) for k in (1, 2))
    au, av = (case.cached_product(case.cached, x) for x in (u, v))
    difference = abs(float(trees.tree_vdot(u, av) - trees.tree_vdot(v, au)))
    assert difference < 1e-6 * float(trees.tree_norm(u) * trees.tree_norm(av))
    assert case.cached.positive_semidefinite == case.operator.positive_semidefinite
    assert not case.cached.positive_semidefinite or float(trees.tree_vdot(u, au)) > 0


def test_one_compiled_product_serves_every_linearisation(case):
    moved = case.operator.replace(params=trees.tree_scale(1.1, case.operator.params))
    v = case.operator.params
    got = case.cached_product(linearise(moved, 10**9), v)
    assert relative_difference(got, case.recomputed_product(moved, v)) < 1e-6
    assert relative_difference(got, case.recomputed_product(case.operator, v)) > 1e-3


def test_a_cached_product_does_less_work(case):
    assert case.cached_product.flops < 0.8 * case.recomputed_product.flops


def test_conjugate_gradients_take_a_linearised_operator():
    operator = operator_of("gauss-newton", "float32")
    solver = ConjugateGradients(rtol=1e-3, max_steps=5)
    solve = jax.jit(lambda op, b: solver.solve(op, b).value)
    rhs = operator.params
    cached, recomputed = (solve(Damped(o, 1.0), rhs) for o in (linearise(operator), operator))
    assert relative_difference(cached, recomputed) < 1e-4


def test_the_base_and_the_data_are_not_held_twice(case):
    operator, cached = case.operator, case.cached
    kernels = {leaf.shape for leaf in jax.tree.leaves(operator.objective.frozen["layers"]) if leaf.ndim == 3}
    assert not kernels & {value.shape for value in cached.residuals.values}
    assert cached.operator.objective.frozen is operator.objective.frozen


def test_bytes_are_known_from_shapes(case):
    assert linearisation_bytes(case.operator) == sum(value.nbytes for value in case.cached.residuals.values) > 0


def test_residuals_grow_with_the_data_alone():
    objective, lora, _ = decoder_problem("float32")
    one, two, four, eight = (
        linearisation_bytes(DatasetCurvature(objective, lora, random_stack(n, 3, "float32"), CURVATURES["hessian"]))
        for n in (1, 2, 4, 8)
    )
    assert eight - four == 2 * (four - two) > 0
    # A single micro-batch keeps what is elementwise too.
    assert one > two


@pytest.mark.parametrize("kind", CURVATURES)
def test_residuals_grow_with_the_length_of_rows_and_not_with_its_square(kind):
    objective, lora, _ = decoder_problem("float32")
    lengths = (32, 64, 96)  # below the length at which attention is computed in blocks
    stacks = [random_stack(2, 3, "float32", time=time) for time in lengths]
    short, medium, long = (
        linearisation_bytes(DatasetCurvature(objective, lora, stack, CURVATURES[kind])) for stack in stacks
    )
    # Pairs of tokens, which attention has a number for in each head, would grow by 3 and by 5 times 32^2.
    assert long - medium == medium - short > 0


def test_tangents_that_are_passed_from_layer_to_layer_are_those_of_products_alone(monkeypatch):
    objective, lora, _ = decoder_problem("float32")
    stack = random_stack(1, 3, "float32", time=32)

    def numbers_handed_over():
        """By loops, at every depth."""
        program = jax.make_jaxpr(linearise_hessian(objective, lora, stack))(lora).jaxpr
        scans = (equation for equation in equations(program) if equation.primitive.name == "scan")
        return sum(variable.aval.size for scan in scans for variable in scan.outvars)

    products_alone = numbers_handed_over()
    monkeypatch.setattr(hessian, "MATMULS", jax.checkpoint_policies.everything_saveable)
    assert 0 < products_alone < 0.8 * numbers_handed_over()


def test_the_budget_decides(case):
    operator = case.operator
    needed = linearisation_bytes(operator)
    assert linearise(operator, needed - 1) is operator
    assert linearise(operator, 0) is operator
    assert isinstance(linearise(operator, needed), LinearisedCurvature)
    with pytest.raises(ValueError, match="memory_budget_bytes is -1"):
        linearise(operator, -1)


def test_a_kind_without_a_linearisation_is_recomputed_or_refused():
    bare = Curvature(hessian_product, positive_semidefinite=False, gradient_equivalents=2.0)
    operator = DatasetCurvature(*decoder_problem("float32"), bare)
    assert linearise(operator, 10**9) is operator
    with pytest.raises(ValueError, match="linearise"):
        linearise(operator)


def test_costs_are_the_stated_ones():
    for kind, product, setup in (
        ("hessian", 2.0, 1.0),
        ("gauss-newton", 1.5, 1 / 3),
        ("empirical-fisher", 1.5, 1 / 3),
    ):
        operator = operator_of(kind, "float32")
        assert (operator.setup_cost, operator.product_cost) == (0.0, product)
        assert (linearise(operator).setup_cost, linearise(operator).product_cost) == (setup, 1.0)


def test_checkpoints_keep_what_they_are_set_to_at_any_depth():
    @partial(jax.checkpoint, prevent_cse=False)
    def layer(x, w):
        return jnp.sin(x @ w) @ w

    def fn(x, ws):
        return jax.lax.scan(lambda c, w: (jax.jit(layer)(c, w), None), x, ws)[0]

    x, ws = jnp.arange(9.0).reshape(3, 3) / 9, jnp.linspace(-1, 1, 18).reshape(2, 3, 3)
    value, plain = jax.linearize(fn, x, ws)
    counts = {"nothing": count_operations(plain, x, ws)}
    for name, policy in (("all", jax.checkpoint_policies.everything_saveable), ("products", MATMULS)):
        set_value, linear = jax.linearize(set_checkpoints(fn, policy), x, ws)
        chex.assert_trees_all_equal(value, set_value)
        chex.assert_trees_all_close(plain(x, ws), linear(x, ws), rtol=1e-5)
        counts[name] = count_operations(linear, x, ws)
    # The tangents of two products are four. Where they were not kept: the first product, and the slope of the sine.
    assert counts == {"nothing": (5, 1), "all": (4, 0), "products": (4, 1)}


def count_operations(fn, *args) -> tuple[int, int]:
    """Products of matrices and cosines in a function's program, a loop's body once."""
    names = [equation.primitive.name for equation in equations(jax.make_jaxpr(fn)(*args).jaxpr)]
    return names.count("dot_general"), names.count("cos")
