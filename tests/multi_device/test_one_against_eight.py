"""Everything numerical on a 4 x 2 mesh of CPU devices matches one device."""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, linearisation_bytes, linearise
from llmeraser_jax.losses import gradient_sum, loss_sum
from llmeraser_jax.parallel import (
    is_primary,
    make_mesh,
    on_primary,
    parse_mesh,
    place_stack,
    replicate,
    shard_base,
    spec_for,
    start_processes,
    to_host,
)
from llmeraser_jax.solvers import ConjugateGradients, Status
from tests.small_lm import random_stack, small_config, small_lora, small_objective


def setup(dtype: str, mesh):
    config = small_config()
    objective, lora = small_objective(config, dtype), small_lora(config, dtype)
    stack = random_stack(2, 8, dtype)
    if mesh is not None:
        objective = dataclasses.replace(objective, frozen=shard_base(objective.frozen, mesh))
        lora, stack = replicate(lora, mesh), place_stack(stack, mesh)
    return objective, lora, stack


def random_direction(lora):
    return jax.tree.map(
        lambda x, z: jax.device_put(z, x.sharding), lora, trees.tree_random_normal(jax.random.key(9), lora)
    )


def several_products(products, objective, lora, stack):
    operator = DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"])
    vectors = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), random_direction(lora), lora)
    return jax.jit(products)(operator, vectors)


def relative_difference(a, b) -> float:
    a, b = jax.device_get((a, b))
    difference = np.sqrt(
        sum(float(np.sum((x - y) ** 2)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    )
    return difference / np.sqrt(sum(float(np.sum(x**2)) for x in jax.tree.leaves(b)))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=4, model=2)


def test_the_base_is_really_sharded_and_the_adapter_replicated(mesh):
    objective, lora, stack = setup("float32", mesh)
    kernel = objective.frozen["layers"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 8)
    assert stack.batches[0].tokens.addressable_shards[0].data.shape == (2, 2, 12)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(lora))


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(lambda o, l, s: loss_sum(o, l, s), id="loss"),
        pytest.param(lambda o, l, s: gradient_sum(o, l, s), id="gradient"),
        *(
            pytest.param(
                lambda o, l, s, kind=kind: jax.jit(lambda op, v: op.mv(v))(
                    DatasetCurvature(o, l, s, CURVATURES[kind]), random_direction(l)
                ),
                id=kind,
            )
            for kind in CURVATURES
        ),
        *(
            pytest.param(lambda o, l, s, products=products: several_products(products, o, l, s), id=name)
            for name, products in {
                "one after the other": lambda op, vs: op.mv_many(vs),
                "all at once": lambda op, vs: jax.vmap(op.mv)(vs),
            }.items()
        ),
    ],
)
def test_sums_match_one_device_in_float64(mesh, compute):
    with jax.enable_x64(True):
        one, eight = (compute(*setup("float64", m)) for m in (None, mesh))
        assert relative_difference(eight, one) < 1e-12


# The Hessian of this random network has eigenvalues in the hundreds below zero.
@pytest.mark.parametrize(
    ("kind", "damping"), [("gauss-newton", 3.0), pytest.param("hessian", 1000.0, marks=pytest.mark.slow)]
)
def test_conjugate_gradients_match_one_device_in_float64(mesh, kind, damping):
    with jax.enable_x64(True):
        solver = ConjugateGradients(rtol=1e-10, max_steps=6)
        solutions = []
        for m in (None, mesh):
            chex.clear_trace_counter()
            objective, lora, stack = setup("float64", m)
            operator = Damped(DatasetCurvature(objective, lora, stack, CURVATURES[kind]), damping)
            rhs = gradient_sum(objective, lora, stack)
            solve = jax.jit(chex.assert_max_traces(lambda op, b: solver.solve(op, b), n=1))
            solutions.append(solve(operator, rhs))
            solve(operator, rhs)
        one, eight = solutions
        assert relative_difference(eight.value, one.value) < 1e-5
        assert int(one.num_steps) == int(eight.num_steps) > 0
        assert Status(int(one.status)) == Status(int(eight.status))


@pytest.mark.parametrize(
    "kind", ["gauss-newton", *(pytest.param(k, marks=pytest.mark.slow) for k in CURVATURES if k != "gauss-newton")]
)
def test_cached_products_match_one_device_in_float64(mesh, kind):
    with jax.enable_x64(True):
        products = []
        for m in (None, mesh):
            objective, lora, stack = setup("float64", m)
            operator = DatasetCurvature(objective, lora, stack, CURVATURES[kind])
            cached = linearise(operator)
            assert linearisation_bytes(operator) == sum(leaf.nbytes for leaf in jax.tree.leaves(cached.residuals))
            products.append(jax.jit(lambda op, v: op.mv(v))(cached, random_direction(lora)))
        assert relative_difference(products[1], products[0]) < 1e-12


def reductions_by_program(fn, *args) -> dict[str, int]:
    """Name of each program that `fn` compiles to, the entry's being `ENTRY` -> reductions over devices in it."""
    leaves, structure = jax.tree.flatten(args)  # run-time shape checks refuse the placeholders of `lower`
    lowered = jax.jit(lambda leaves: fn(*jax.tree.unflatten(structure, leaves))).lower(leaves)
    text = lowered.compile().as_text()
    assert text is not None
    counts, program = {}, ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            program = line.split()[0]
        elif " all-reduce(" in line:
            counts[program] = counts.get(program, 0) + 1
    return counts


@pytest.mark.parametrize("name", ["loss", "gradient", *CURVATURES, *(f"cached {kind}" for kind in CURVATURES)])
def test_devices_that_share_the_examples_wait_for_each_other_once(name):
    objective, lora, stack = setup("float32", make_mesh(data=4))
    sums = {"loss": loss_sum, "gradient": gradient_sum}
    if name in sums:
        counts = reductions_by_program(sums[name], objective, lora, stack)
    else:
        operator = DatasetCurvature(objective, lora, stack, CURVATURES[name.removeprefix("cached ")])
        operator = linearise(operator) if name.startswith("cached") else operator
        counts = reductions_by_program(lambda op, v: op.mv(v), operator, random_direction(lora))
    assert counts == {"ENTRY": 1}


def test_ten_optimiser_steps_match_one_device_in_float64(mesh):
    with jax.enable_x64(True):
        results = []
        for m in (None, mesh):
            objective, lora, stack = setup("float64", m)
            optimiser = optax.adam(1e-2)

            @jax.jit
            @chex.assert_max_traces(n=1)
            def step(objective, lora, state, stack, optimiser=optimiser):
                updates, state = optimiser.update(gradient_sum(objective, lora, stack), state, lora)
                return optax.apply_updates(lora, updates), state

            chex.clear_trace_counter()
            start: Any = lora
            state = replicate(optimiser.init(start), m)
            for _ in range(10):
                lora, state = step(objective, lora, state, stack)
            assert float(trees.tree_norm(trees.tree_sub(lora, start))) > 0.1
            results.append(lora)
        assert relative_difference(results[1], results[0]) < 1e-5


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="rotary/table"):
        spec_for("rotary/table")


def test_a_dimension_that_the_mesh_does_not_divide_is_refused():
    mesh = make_mesh(data=1, model=3)
    with pytest.raises(ValueError, match="q_proj/kernel"):
        shard_base({"layers": {"q_proj": {"kernel": np.zeros((2, 8, 8))}}}, mesh)
    with pytest.raises(ValueError, match="micro-batch"):
        place_stack(random_stack(1, 8, "float32"), make_mesh(data=3))


@pytest.mark.parametrize("text", ["data=x", "tensor=2", "data=2,data=2", "data=64", "data=0"])
def test_a_mesh_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match=r"[Mm]esh"):
        parse_mesh(text)


def test_a_mesh_is_read_from_text():
    mesh = parse_mesh("data=4,model=2")
    assert mesh is not None and dict(mesh.shape) == {"data": 4, "fsdp": 1, "model": 2}
    assert parse_mesh("") is None
    mesh = parse_mesh("data=2, fsdp=4")
    assert mesh is not None and dict(mesh.shape) == {"data": 2, "fsdp": 4, "model": 1}


def test_a_mesh_of_several_processes_has_a_device_of_each(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # the devices here are those of process 0
    with pytest.raises(ValueError, match="leaves processes 1 without a device"):
        parse_mesh("data=2")
    with pytest.raises(ValueError, match="2 processes; name a mesh"):
        parse_mesh("")


@pytest.mark.parametrize("text", ["automatic", "host,2,0", "host:1,2", "host:1,2,2", "host:1,0,0", "host:1,2,-1"])
def test_processes_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match="are not understood"):
        start_processes(text)


def test_a_single_process_is_the_primary_one():
    seen = []
    on_primary(lambda: seen.append(1))
    assert seen == [1] and is_primary()
    with pytest.raises(ZeroDivisionError):
        on_primary(lambda: 1 / 0)
    spread = place_stack(random_stack(1, 8, "float32"), make_mesh(data=4)).weights[0]
    assert isinstance(to_host(spread), np.ndarray) and np.array_equal(to_host((spread,))[0], spread)
