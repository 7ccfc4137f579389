"""What the TPU compiler makes of the package's programs: reductions, gathers, and where results live."""

from __future__ import annotations

import pytest

from experiments.pod.collectives import collectives
from experiments.pod.main import PodConfig, collective_totals, run
from experiments.pod.programs import model_config
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.parallel import mesh_sizes
from llmeraser_jax.planning import Workload

TINY = {"topology": "v5e:2x2", "model": "tiny", "tokens": 64, "response": 8, "examples": 16, "microbatch": 2}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each program is compiled in a process of its own, so that libtpu is never loaded in this one."""
    pytest.importorskip("libtpu")
    workdir = tmp_path_factory.mktemp("pod")
    return run(PodConfig(workdir=workdir, mesh="data=2,model=2", programs=("gradient", "rows"), **TINY))


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory):
    """The same gradient with the base over "fsdp"."""
    pytest.importorskip("libtpu")
    workdir = tmp_path_factory.mktemp("pod_fsdp")
    return run(PodConfig(workdir=workdir, mesh="data=2,fsdp=2", programs=("gradient",), **TINY))["gradient"]


def test_layers_are_gathered_one_by_one_as_they_are_stored(shared_out):
    gathers = [
        one for one in shared_out["collectives"] if one["kind"] == "all-gather" and one["shapes"][0][0] != "s32"
    ]
    layers = [one for one in gathers if one["executions"] == 2 * 2]  # micro-batches and layers
    head = [one for one in gathers if one not in layers]
    assert all(one["axes"] == "fsdp" for one in gathers)
    assert len(layers) == 2 * 7  # each kernel forward and backward
    assert all(shape[0] == "bf16" and shape[1] == 1 for one in layers for shape in one["shapes"])
    assert [one["shapes"] for one in head] == [[["bf16", 256, 1024]]]
    assert head[0]["executions"] == 2


def test_the_adapter_is_reduced_once_over_all_that_share_the_examples(shared_out):
    reductions = [one for one in shared_out["collectives"] if one["kind"] == "all-reduce"]
    assert [(one["axes"], one["executions"]) for one in reductions] == [("data,fsdp", 1)]
    assert reductions[0]["bytes"] <= shared_out["adapter_bytes"] + 4


@pytest.mark.parametrize(("mesh", "most"), [("data=2,model=2", 1.0), ("data=2,fsdp=2", 1.6)])
def test_memory_is_planned_within_six_percent_or_from_above(results, shared_out, mesh, most):
    """At this size a whole gathered layer is much; `tests/test_planning.py` has 7 billion parameters."""
    result = results["gradient"] if mesh == "data=2,model=2" else shared_out
    work = Workload(
        config=model_config("tiny"),
        lora=LoraConfig(rank=8, alpha=16.0, target_modules="all-linear"),
        mesh=mesh_sizes(mesh),
        time=64,
        response=8,
        dtype="bfloat16",
    )
    compiled = result["argument_bytes"] + result["temporary_bytes"]
    planned = work.still_bytes + 2 * work.adapter_bytes + 2 * work.gradient_row_bytes
    assert 0.94 * compiled <= planned <= most * compiled


def test_rows_are_exchanged_and_not_what_they_are_computed_from(results):
    """Each device sends away at most what it does not keep of the rows it computed."""
    sent = sum(size for (kind, _), (_, size) in collective_totals(results["rows"]).items() if kind == "all-to-all")
    assert 0 < sent <= results["rows"]["output_bytes"]


def test_a_gradient_is_reduced_once_over_data(results):
    totals = collective_totals(results["gradient"])
    executions, size = totals["all-reduce", "data"]
    assert executions == 1
    assert size <= results["gradient"]["adapter_bytes"] + 4  # and the sum of weights


@pytest.mark.parametrize("program", ["gradient", "rows"])
def test_no_weight_is_gathered(results, program):
    kernels = results[program]["kernels"]
    gathered = [
        shape[-2:]
        for one in results[program]["collectives"]
        if one["kind"] == "all-gather"
        for dtype, *shape in one["shapes"]
        if dtype == "bf16"
    ]
    assert len(kernels) == 3
    assert not [shape for shape in gathered if shape in kernels or shape[::-1] in kernels]


def test_a_gradient_lives_where_the_adapter_does(results):
    assert all(shape == here for shape, here in results["gradient"]["outputs"])


def test_each_device_holds_its_share_of_every_row(results):
    values, *rows = results["rows"]["outputs"]
    assert values[0] == [16]
    for shape, here in rows:
        assert here[0] == 16
        assert shape[1:] != here[1:]
        assert _size(here) * 4 == _size(shape)


def _size(shape):
    return shape[0] * (_size(shape[1:]) if shape[1:] else 1)


def test_collectives_are_counted_as_often_as_their_loops_run():
    text = """HloModule m
%cond.1 (p: (s32[])) -> pred[] {
  %constant.1 = s32[] constant(7)
}
%body.1 (p: (s32[])) -> (s32[]) {
  %r.1 = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%a, %b), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0)
}
ENTRY %main (p: f32[]) -> f32[] {
  %while.1 = (s32[]) while(%t), condition=%cond.1, body=%body.1
  %g.1 = f32[8]{0} all-gather(%x), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}
}
"""
    reduced, gathered = collectives(text, {"data": 2, "model": 2})
    assert (reduced["kind"], reduced["axes"], reduced["executions"], reduced["bytes"]) == (
        "all-reduce",
        "data",
        7,
        32,
    )
    assert (gathered["kind"], gathered["axes"], gathered["executions"], gathered["bytes"]) == (
        "all-gather", "model", 1, 32,
    )  # fmt: skip
