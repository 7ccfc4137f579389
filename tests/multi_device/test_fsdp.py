"""The base shared out over "fsdp": every sum and value matches one device; each layer is gathered by itself."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.convert import quantize
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, linearise
from llmeraser_jax.curvature.row_sets import RowSet
from llmeraser_jax.losses import example_losses, gradient_sum, loss_sum
from llmeraser_jax.models import init_base
from llmeraser_jax.parallel import make_mesh, parse_mesh, place_stack, replicate, shard_base
from llmeraser_jax.parallel import mesh as meshes
from llmeraser_jax.solvers import ConjugateGradients, Status
from tests.multi_device.test_one_against_eight import random_direction, relative_difference, setup
from tests.small_lm import random_stack, small_config, small_lora, small_objective

MESHES = ("data=2,fsdp=2,model=2", "fsdp=8", "data=4,fsdp=2")


def product(operator, v):
    return jax.jit(lambda op, v: op.mv(v))(operator, v)


def solve(objective, lora, stack):
    """Of a system with eigenvalues far apart, to a residual of 1e-10."""
    operator = Damped(DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]), 3.0)
    return jax.jit(ConjugateGradients(rtol=1e-10, max_steps=6).solve)(operator, gradient_sum(objective, lora, stack))


def everything(mesh):
    """Sums, products and values that the package computes with examples, in float64."""
    objective, lora, stack = setup("float64", mesh)
    v = random_direction(lora)
    found = {
        "loss": loss_sum(objective, lora, stack),
        "losses": example_losses(objective, lora, stack),
        "gradient": gradient_sum(objective, lora, stack),
    }
    for kind in CURVATURES:
        operator = DatasetCurvature(objective, lora, stack, CURVATURES[kind])
        found[kind] = product(operator, v)
        found[f"cached {kind}"] = product(linearise(operator), v)
    for kind in ("log-odds", "roots"):
        rows = RowSet(objective, lora, stack, jax.random.key(3), kind)
        found[f"products with {kind}"] = jax.jit(RowSet.products)(rows, v)
        found[f"sketches of {kind}"] = jax.jit(RowSet.sketch, static_argnames="width")(rows, jax.random.key(4), 4)
    return found, solve(objective, lora, stack)


@pytest.fixture(scope="module")
def one():
    with jax.enable_x64(True):
        return everything(None)


@pytest.mark.parametrize("text", MESHES)
def test_sums_and_values_match_one_device_in_float64(one, text):
    with jax.enable_x64(True):
        found, solution = everything(parse_mesh(text))
        for name, expected in one[0].items():
            assert relative_difference(found[name], expected) < 1e-12, name
        expected = one[1]
        assert relative_difference(solution.value, expected.value) < 1e-5
        assert int(solution.num_steps) == int(expected.num_steps) > 0
        assert Status(int(solution.status)) == Status(int(expected.status))
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(solution.value))
