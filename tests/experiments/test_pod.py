"""What the TPU compiler makes of the package's programs: reductions, gathers, and where results live."""

from __future__ import annotations

import pytest

from experiments.pod.collectives import collectives
from experiments.pod.main import PodConfig, collective_totals, run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each program is compiled in a process of its own, so that libtpu is never loaded in this one."""
    pytest.importorskip("libtpu")
    return run(
        PodConfig(
            workdir=tmp_path_factory.mktemp("pod"), topology="v5e:2x2", mesh="data=2,model=2", model="tiny",
            programs=("gradient", "rows"), tokens=64, response=8, examples=16, microbatch=2,
        )
    )  # fmt: skip


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
