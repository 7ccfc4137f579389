"""The base shared out over "fsdp": every sum and value matches one device; each layer is gathered by itself."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.convert import quantize
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, example_rows, linearise
from llmeraser_jax.curvature.row_sets import RowSet
from llmeraser_jax.lora import LoraConfig, init_lora
from llmeraser_jax.losses import example_losses, gradient_sum, loss_and_gradient_sums, loss_sum
from llmeraser_jax.parallel import make_mesh, parse_mesh, place_stack, replicate, shard_base
from llmeraser_jax.parallel import mesh as meshes
from llmeraser_jax.solvers import ConjugateGradients, Status
from llmeraser_jax.unlearning.matching_rows import StoredRows
from tests.multi_device.test_one_against_eight import random_direction, relative_difference, setup
from tests.small_lm import random_stack, small_config, small_lora, small_objective

MESHES = ("data=2,fsdp=2,model=2", "fsdp=8", "data=4,fsdp=2")


def product(operator, v):
    return jax.jit(lambda op, v: op.mv(v))(operator, v)


_rows = jax.jit(partial(example_rows, num_roots=2))


def solve(objective, lora, stack):
    """Of a system with eigenvalues far apart, to a residual of 1e-10."""
    operator = Damped(DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]), 3.0)
    return jax.jit(ConjugateGradients(rtol=1e-10, max_steps=6).solve)(
        operator, gradient_sum(objective, lora, stack)
    )


def sums(mesh):
    """Sums and values that the package computes with examples, and a solution."""
    objective, lora, stack = setup("float64", mesh)
    operator = DatasetCurvature(objective, lora, stack, CURVATURES["hessian"])
    found = {
        "losses": example_losses(objective, lora, stack),
        "gradient": loss_and_gradient_sums(objective, lora, stack),
        "hessian": product(operator, random_direction(lora)),
    }
    return found, solve(objective, lora, stack)


def rows(mesh):
    """What the package computes of single rows, and a cached product."""
    objective, lora, stack = setup("float64", mesh)
    v = random_direction(lora)
    row_set = RowSet(objective, lora, stack, jax.random.key(3), "roots")
    operator = DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"])
    return {
        "gauss-newton": product(operator, v),
        "cached": product(linearise(operator), v),
        "products": jax.jit(RowSet.products)(row_set, v),
        "sketches": jax.jit(RowSet.sketch, static_argnames="width")(row_set, jax.random.key(4), 4),
        "rows": jax.tree.leaves(_rows(objective, lora, stack, jax.random.key(0), np.asarray(2, np.int32))),
    }


@pytest.fixture(scope="module")
def one():
    with jax.enable_x64(True):
        return sums(None)


@pytest.mark.parametrize("text", [MESHES[0], *(pytest.param(text, marks=pytest.mark.slow) for text in MESHES[1:])])
def test_sums_and_solutions_match_one_device_in_float64(one, text):
    with jax.enable_x64(True):
        found, solution = sums(parse_mesh(text))
        for name, expected in one[0].items():
            assert relative_difference(found[name], expected) < 1e-12, name
        expected = one[1]
        assert relative_difference(solution.value, expected.value) < 1e-5
        assert int(solution.num_steps) == int(expected.num_steps) > 0
        assert Status(int(solution.status)) == Status(int(expected.status))
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(solution.value))


def test_rows_match_one_device_in_float64():
    with jax.enable_x64(True):
        found, expected = (rows(mesh) for mesh in (parse_mesh(MESHES[0]), None))
        for name, value in expected.items():
            assert relative_difference(found[name], value) < 1e-12, name


def matching_step(mesh):
    """The solve of target matching: values of the rows, and the step that moves them."""
    objective, lora, stack = setup("float64", mesh)
    rows = StoredRows(objective, mesh, damping=0.1, shrinkage=0.5, row_ridge=0.01, num_roots=1)
    rows.add_curvature(lora, stack, jax.random.key(5))
    values, gradients = rows.measure(lora, stack, "log-odds")
    step = rows.solve(gradients, np.linspace(0.5, 2.0, len(values)), None)
    return values, step.delta, step.predicted


def test_target_matching_takes_the_step_of_one_device_in_float64():
    with jax.enable_x64(True):
        found, expected = (matching_step(mesh) for mesh in (parse_mesh(MESHES[0]), None))
        for value, like in zip(found, expected, strict=True):
            assert relative_difference(value, like) < 1e-8
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found[1]))


def gathers_and_reductions(fn, *args) -> tuple[list[tuple[str, int]], list[str]]:
    """Program and numbers of each gather that `fn` compiles to; programs of each reduction. The entry is ENTRY."""
    leaves, structure = jax.tree.flatten(args)  # run-time shape checks refuse the placeholders of `lower`
    text = jax.jit(lambda leaves: fn(*jax.tree.unflatten(structure, leaves))).lower(leaves).compile().as_text()
    gathers, reductions, program = [], [], ""
    for line in (text or "").splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            program = line.split()[0]
        elif found := re.search(r" = \w+\[([\d,]*)\]\S* all-gather\(", line):
            gathers.append((program, int(np.prod([int(size) for size in found[1].split(",")]))))
        elif " all-reduce(" in line:
            reductions.append(program)
    return gathers, reductions


@pytest.mark.parametrize("name", ["gradient", "gauss-newton"])
def test_layers_are_gathered_one_by_one_and_the_adapter_is_reduced_once(name):
    objective, lora, stack = setup("float32", parse_mesh("data=2,fsdp=4"))
    if name == "gradient":
        gathers, reductions = gathers_and_reductions(gradient_sum, objective, lora, stack)
    else:
        operator = DatasetCurvature(objective, lora, stack, CURVATURES[name])
        gathers, reductions = gathers_and_reductions(lambda op, v: op.mv(v), operator, random_direction(lora))
    config = small_config()
    largest = config.width * max(config.mlp_width, config.vocab_size)
    assert reductions == ["ENTRY"]
    assert len(gathers) >= 7  # as many as a layer has kernels
    assert all(program != "ENTRY" and size <= largest for program, size in gathers)


def test_each_device_holds_its_share_of_the_base():
    objective, _, stack = setup("float32", parse_mesh("data=2,fsdp=4"))
    q, down = (objective.frozen["layers"][name]["kernel"] for name in ("q_proj", "down_proj"))
    assert q.addressable_shards[0].data.shape == (2, 4, 16)
    assert down.addressable_shards[0].data.shape == (2, 24, 4)
    assert objective.frozen["embed_tokens"]["embedding"].addressable_shards[0].data.shape == (32, 4)
    assert stack.batches[0].tokens.addressable_shards[0].data.shape == (2, 1, 12)


FAMILIES = {
    "tied": {"tie_word_embeddings": True},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "nf4-double": {"hidden_size": 256, "intermediate_size": 256},
    "int8": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_bases_match_one_device_in_float64(name):
    with jax.enable_x64(True):
        config, mesh = small_config(**FAMILIES[name]), make_mesh(fsdp=2, model=2)
        objective, lora = small_objective(config, "float64"), small_lora(config, "float64")
        if name in ("nf4-double", "int8"):
            kernels = objective.frozen["layers"]
            quantized = {k: {"kernel": quantize(v["kernel"], name)} for k, v in kernels.items() if "kernel" in v}
            base = {**objective.frozen, "layers": {**kernels, **quantized}}
            objective = dataclasses.replace(objective, frozen=base)
        stack = random_stack(1, 4, "float64")
        alone = loss_sum(objective, lora, stack)
        objective = dataclasses.replace(objective, frozen=shard_base(objective.frozen, mesh))
        together = loss_sum(objective, replicate(lora, mesh), place_stack(stack, mesh))
        assert relative_difference(together, alone) < 1e-12


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trained_copies_are_whole_on_every_device(tied):
    """Sums, and the rows of single examples, which no device may mix with those of others."""
    with jax.enable_x64(True):
        config, mesh = small_config(tie_word_embeddings=tied), make_mesh(fsdp=2, model=2)
        objective = small_objective(config, "float64", l2=0.0)
        names = ("lm_head", "norm") if tied else ("embed_tokens", "lm_head", "down_proj", "norm")
        lora_config = LoraConfig(rank=2, target_modules=("q_proj", "v_proj"), modules_to_save=names)
        fresh = init_lora(jax.random.key(1), lora_config, config, objective.frozen)
        lora = jax.tree.map(lambda x: x.astype("float64"), fresh)
        lora = trees.tree_axpy(0.1, trees.tree_random_normal(jax.random.key(2), lora), lora)
        stack = random_stack(1, 4, "float64")

        def found(objective, lora, stack):
            operator = DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"])
            rows = RowSet(objective, lora, stack, jax.random.key(3), "roots")
            v = random_direction(lora)
            return {
                "losses": example_losses(objective, lora, stack),
                "gradient": gradient_sum(objective, lora, stack),
                "product": product(operator, v),
                "products of rows": jax.jit(RowSet.products)(rows, v),
                "rows": jax.tree.leaves(_rows(objective, lora, stack, jax.random.key(0), np.asarray(2, np.int32))),
            }

        alone = found(objective, lora, stack)
        objective = dataclasses.replace(objective, frozen=shard_base(objective.frozen, mesh))
        together = found(objective, replicate(lora, mesh), place_stack(stack, mesh))
        for name, value in alone.items():
            assert relative_difference(together[name], value) < 1e-12, name
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(together["gradient"]))


def test_slices_share_out_data_alone(monkeypatch):
    monkeypatch.setattr(meshes, "slice_of", lambda device: device.id // 4)
    mesh = make_mesh(data=4, fsdp=2)
    assert [[d.id for d in row.flat] for row in mesh.devices] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "model": 1}
    with pytest.raises(ValueError, match="2 slices, which share out data alone"):
        make_mesh(fsdp=8)
    with pytest.raises(ValueError, match="use all devices"):
        make_mesh(data=2, fsdp=3)
