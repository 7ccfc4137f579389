"""Loops that cut their input once: values against the program as it was, and what the rewritten one still cuts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from llmeraser_jax.curvature.slicing import slice_in_inner_loops

CHUNKS, LAYERS, WIDTH = 4, 5, 3


def nested(x, y, *, reverse=False, also=False):
    """Over chunks a loop over layers, in a checkpoint in a call; `also` reads a chunk's slice besides."""

    @jax.jit
    @jax.checkpoint
    def of_chunk(carry, layers, scale):
        def of_layer(carry, layer):
            return carry * jnp.cos(layer) + scale.sum(), carry.sum() * layer

        return jax.lax.scan(of_layer, carry, layers, reverse=reverse)

    def chunk(carry, xs):
        layers, scale = xs
        carry, ys = of_chunk(carry, layers, scale)
        return carry, (ys * layers if also else ys, scale[0])

    return jax.lax.scan(chunk, jnp.ones(WIDTH), (x, y), reverse=not reverse)


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def shapes_cut(fn, *args) -> set:
    """Shapes of all slices that the program takes at a running index, loops' own included."""
    found = set()

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dynamic_slice":
                found.add(tuple(n for n in equation.outvars[0].aval.shape if n > 1))
            if equation.primitive.name == "scan":  # it runs over what has an axis more outside than inside
                body = inner(equation.params["jaxpr"]).invars
                shapes = [(o.aval.shape, i.aval.shape) for o, i in zip(equation.invars, body, strict=True)]
                found.update(within for outside, within in shapes if outside != within)
            jax.tree.map(look, [p for p in map(inner, equation.params.values()) if p is not None])

    def inner(value):
        value = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        return value if isinstance(value, core.Jaxpr) else None

    look(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_values_are_those_of_the_program_as_it_was(reverse, also):
    x, y = drawn(CHUNKS, LAYERS, WIDTH), drawn(CHUNKS, 2)

    def fn(x, y):
        return nested(x, y, reverse=reverse, also=also)

    expected, got = jax.jit(fn)(x, y), jax.jit(slice_in_inner_loops(fn))(x, y)
    assert jax.tree.structure(expected) == jax.tree.structure(got)
    for theirs, ours in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_an_outer_slice_that_only_an_inner_loop_runs_over_is_not_taken():
    x, y = drawn(CHUNKS, LAYERS, WIDTH), drawn(CHUNKS, 2)
    assert (LAYERS, WIDTH) in shapes_cut(nested, x, y)
    cut = shapes_cut(slice_in_inner_loops(nested), x, y)
    assert (LAYERS, WIDTH) not in cut and {(WIDTH,), (2,)} <= cut


def test_loops_in_loops_in_loops_loops_over_nothing_and_vectors():
    def fn(x, nothing):
        def outer(carry, x):
            def middle(carry, x):
                total, _ = jax.lax.scan(lambda c, a: (c + a * c, None), carry, x)
                return total, total

            return jax.lax.scan(middle, carry, x)

        empty, _ = jax.lax.scan(lambda c, a: (c + a, None), jnp.zeros(2), nothing)
        return *jax.lax.scan(outer, jnp.ones(2), x), empty

    x, nothing = drawn(2, 3, 4, 2), jnp.zeros((0, 2))
    sliced = slice_in_inner_loops(fn)
    for theirs, ours in zip(fn(x, nothing), sliced(x, nothing), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert (3, 4, 2) not in shapes_cut(sliced, x, nothing) and (4, 2) not in shapes_cut(sliced, x, nothing)
    several = jnp.stack([x, 2 * x])
    for theirs, ours in zip(*(jax.vmap(f, (0, None))(several, nothing) for f in (fn, sliced)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
