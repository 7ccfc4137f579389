"""The benchmark's own arithmetic and bookkeeping; that numbers are read as what they are."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmarks.main import BenchmarkConfig, measure_group
from experiments.benchmarks.sides import GROUPS, Prepared, Timed, solve_facts
from experiments.benchmarks.table import hessian_share, render_plot, render_table, targets
from experiments.benchmarks.worker import WorkerError
from experiments.benchmarks.workload import (
    SHAPES,
    Shape,
    Workload,
    make_examples,
    tallrec_lengths,
    write_workload,
)
from llmeraser_jax import files
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature
from llmeraser_jax.models.decoder import base_shapes
from tests.curvature.problem import relative_difference

TINY = Shape(
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    examples=3,
    chunk_size=2,
    torch_chunk_size=3,
)
VOCAB = 40


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    workload = Workload(
        directory=tmp_path_factory.mktemp("bench") / "models",
        dtype="float32",
        examples=3,
        chunk_size=2,
        torch_chunk_size=3,
        erase_rows=16,
        erase_sample=4,
        cg_steps=2,
    )
    write_workload(workload, TINY, rank=2, vocab_size=VOCAB)
    return workload


@pytest.fixture(scope="module")
def side(workload):
    from experiments.benchmarks.jax_side import JaxSide

    return JaxSide(workload)


@pytest.mark.parametrize(
    ("size", "stated"), [("1m", 1e6), ("10m", 10e6), ("110m", 110e6), ("1b", 1e9), ("7b", 6.5e9)]
)
def test_sizes_are_named_after_the_parameters_of_their_layers(size, stated):
    shapes = base_shapes(SHAPES[size].config())
    in_layers = sum(np.prod(s) for path, s in shapes.items() if path.endswith("_proj/kernel"))
    assert in_layers == SHAPES[size].decoder_parameters
    assert abs(in_layers / stated - 1) < 0.05


def test_lengths_are_like_tallrecs():
    lengths = tallrec_lengths(2000, np.random.default_rng(0))
    assert lengths.min() >= 100 and lengths.max() <= 250
    assert abs(np.median(lengths) - 160) < 5
    assert len(np.unique(lengths)) > 100


def test_every_row_has_the_stated_prompt_and_five_tokens_under_the_loss(side):
    assert {row.num_targets for row in side.dataset.encoded} == {5}
    again = make_examples(16, 2, VOCAB)  # the seed of `write_workload`
    for row, example in zip(side.dataset.encoded, again, strict=True):
        # BOS stands for one token of the prompt; the response follows.
        assert len(row.prompt) == 1 + len(example.instruction.split())
        assert 100 <= len(row.prompt) <= 250


def test_what_is_timed_is_the_librarys_own_product(side):
    _, run = side.prepare("gauss-newton recomputed")
    assert run() == {}
    operator = side.operator("gauss-newton")
    by_hand = DatasetCurvature(side.objective, side.lora, side.stack, CURVATURES["gauss-newton"]).mv(side.v)
    assert relative_difference(jax.jit(lambda o, v: o.mv(v))(operator, side.v), by_hand) < 1e-5
    # The measured rows' mean: weights sum to one, padding rows have none.
    assert sum(float(w.sum()) for w in side.stack.weights) == pytest.approx(1.0)
    prepared, _ = side.prepare("gradient")
    assert prepared.temp_bytes is not None and prepared.temp_bytes > 0
    assert prepared.argument_bytes is not None and prepared.argument_bytes > side.describe()["base_bytes"]


def test_two_devices_measure_the_same_product(workload, side):
    from experiments.benchmarks.jax_side import JaxSide

    both = JaxSide(workload, num_devices=2)
    assert len(both.stack.weights[0].sharding.device_set) == 2
    product = jax.jit(lambda operator, v: operator.mv(v))
    two, one = (jax.device_get(product(each.operator("gauss-newton"), each.v)) for each in (both, side))
    assert relative_difference(two, one) < 1e-5


@pytest.mark.torch
def test_both_libraries_measure_the_same_rows_and_the_same_product(workload, side):
    from experiments.benchmarks.torch_side import TorchSide
    from experiments.torch_baseline.curvature import gradient_sum
    from experiments.torch_baseline.model import axpy, norm
    from llmeraser_jax import trees
    from llmeraser_jax.losses import gradient_sum as our_gradient_sum

    theirs = TorchSide(workload, 1)
    assert theirs.describe()["tokens"] == side.describe()["tokens"]
    ours = float(trees.tree_norm(our_gradient_sum(side.objective, side.lora, side.stack)))
    assert norm(gradient_sum(theirs.model, theirs.params, theirs.batches, l2=1e-3)) == pytest.approx(ours, rel=1e-4)
    products = {}
    for kind, mode in (("hessian", "reverse-over-reverse"), ("gauss-newton", "shared")):
        anew, kept = (theirs._product(kind, each, theirs.v) for each in (mode, "kept"))
        assert norm(axpy(-1.0, anew, kept)) < 1e-5 * norm(anew)
        products[kind] = kept
    assert norm(axpy(-1.0, products["hessian"], products["gauss-newton"])) > 1e-2 * norm(products["hessian"])


def test_a_solve_that_ends_early_is_no_measurement():
    assert solve_facts(5, 5, negative_curvature=False) == {"iterations": 5, "products": 6}
    with pytest.raises(RuntimeError, match="negative curvature after 2 of 5"):
        solve_facts(5, 2, negative_curvature=True)
    with pytest.raises(RuntimeError, match="converged after 4 of 5"):
        solve_facts(5, 4, negative_curvature=False)


class FakeWorker:
    """Answers at once; notes what it was asked."""

    def __init__(self, side, log, broken=()):
        self.side, self.log, self.broken = side, log, broken

    def prepare(self, name):
        if name in self.broken:
            return Prepared(unsupported="RuntimeError: no")
        return Prepared(first_seconds=1.0)

    def run(self, name):
        self.log.append((self.side, name))
        return Timed(seconds=float(len(self.log)), cpu_seconds=1.0)


class FakeWorkers(dict):
    def forget(self):
        pass

    def lose(self, side):
        raise WorkerError(side)


def test_repetitions_alternate_and_what_raises_is_reported_and_left_out():
    log: list[tuple[str, str]] = []
    broken = "hessian forward-over-reverse"
    workers = FakeWorkers(jax=FakeWorker("jax", log), torch=FakeWorker("torch", log, broken=(broken,)))
    entries = measure_group(workers, "products", 3)  # pyright: ignore
    order = [pair for pair in GROUPS["products"] if pair != ("torch", broken)]
    assert log == order * 3
    assert entries[f"torch: {broken}"]["unsupported"] == "RuntimeError: no"
    assert "seconds" not in entries[f"torch: {broken}"]
    # The median of the 1st, 12th and 23rd call.
    assert entries["jax: gradient"]["seconds"] == 1.0 + len(order)


def _entry(seconds, temp=None, facts=None):
    prepared = Prepared(first_seconds=9.0, compile_seconds=8.0, temp_bytes=temp, argument_bytes=1)
    return {
        **dataclasses.asdict(prepared),
        "seconds": seconds,
        "cpu_seconds": seconds,
        "memory_bytes": None,
        "facts": facts or {},
    }


def _cell():
    settings = {"rank": 8, "vocab_size": 32000, "examples": 4, "chunk_size": 2, "torch_chunk_size": 4, "threads": 2}
    common = {
        "dtype": "float32",
        "decoder_parameters": 1_000_000,
        "settings": settings,
        "jax": {"devices": "1 x cpu", "tokens": 1000},
        "torch": {"devices": "cpu", "versions": {"torch": "2"}},
    }
    groups = {
        "ceiling": {
            "jax: matmul float32": _entry(1.0, facts={"flops": 100e9}),
            "jax: matmul bfloat16": _entry(1.0, facts={"flops": 400e9}),
        },
        "products": {
            "jax: gradient": _entry(1.0, temp=10),
            "jax: hessian recomputed": _entry(2.0, temp=20),
            "jax: hessian cached": _entry(1.2, temp=5),
            "jax: gauss-newton recomputed": _entry(1.5, temp=12),
            "torch: gradient": _entry(1.0),
            "torch: hessian reverse-over-reverse": _entry(2.6),
        },
        "operands": {"jax: hessian recomputed, bfloat16 operands": _entry(0.1)},
        "many": {"jax: hessian recomputed": _entry(2.0), "jax: hessian recomputed k=8": _entry(8.0)},
        "cg": {
            "jax: cg hessian cached": _entry(9.0, facts={"iterations": 5, "products": 6}),
            "jax: cg hessian recomputed": _entry(18.0, facts={"iterations": 5, "products": 6}),
            "jax: cg gauss-newton cached": _entry(7.2, facts={"iterations": 5, "products": 6}),
            "torch: hessian reverse-over-reverse": _entry(3.0),
            "torch: hessian forward-over-reverse": _entry(4.0),
        },
    }
    return {group: {**common, "entries": entries} for group, entries in groups.items()}


def test_targets_are_the_stated_ratios():
    cell = _cell()
    values = [target.value for target in targets(cell)]
    # 9 s / 6 products / 3 s, the better of two; 7.2 s / 6 products / 3 s; 2 / 1; 1.2 / 1; 1.5 / 1; 8 s / 8 / 2 s;
    # 20 / 10; 12 / 10 bytes; no erasure.
    assert values == pytest.approx([0.5, 0.4, 2.0, 1.2, 1.5, 0.5, 2.0, 1.2, None])
    verdicts = [target.verdict for target in targets(cell)]
    assert verdicts == ["met", "met", "met", "missed", "met", "met", "met", "missed", "not measured"]
    # 4 passes of 2 operations for 1e6 weights and 1000 tokens in 2 s, of 100e9 operations a second.
    assert hessian_share(cell, "float32") == pytest.approx(8e9 / 2 / 100e9)
    # The same with bfloat16 operands in 0.1 s, of 400e9 operations a second.
    assert hessian_share(cell, "bfloat16") == pytest.approx(8e9 / 0.1 / 400e9)
    del cell["operands"]
    assert hessian_share(cell, "bfloat16") is None
    # PyTorch's product inside of its solve, where that is the faster: 12 s / 6 products.
    inside = _entry(12.0, facts={"iterations": 5, "products": 6})
    cell["cg"]["entries"]["torch: cg hessian reverse-over-reverse"] = inside
    assert [target.value for target in targets(cell)[:2]] == pytest.approx([0.75, 0.6])
    # And with graphs that it keeps: 6 s / 6 products.
    cell["cg"]["entries"]["torch: cg hessian kept"] = _entry(6.0, facts={"iterations": 5, "products": 6})
    assert [target.value for target in targets(cell)[:2]] == pytest.approx([1.5, 1.2])
    # Of two erasures PyTorch's faster one.
    entries = {"jax: erase": _entry(1.0), "torch: erase": _entry(4.0)}
    cell["erase"] = {**cell["cg"], "entries": entries}
    assert targets(cell)[-1].value == pytest.approx(0.25)
    entries["torch: erase kept"] = _entry(2.5)
    assert targets(cell)[-1].value == pytest.approx(0.4)


def test_table_and_plot_show_every_entry(tmp_path):
    cell = _cell()
    cell["products"]["entries"]["torch: hessian forward-over-reverse"] = dataclasses.asdict(
        Prepared(unsupported="RuntimeError: a | b")
    )
    table = render_table({"1m-float32": cell})
    for result in cell.values():
        assert all(key in table for key in result["entries"])
    assert "unsupported: RuntimeError: a / b" in table
    assert "(6 products, 1500.0 ms each)" in table
    render_plot({"1m-float32": cell}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_configuration_names_its_cells_and_refuses_what_it_does_not_know(tmp_path):
    config = BenchmarkConfig(workdir=tmp_path, sizes=("1m", "7b"))
    assert list(config.cells()) == [("1m", "float32"), ("1m", "bfloat16"), ("7b", "bfloat16")]
    assert config.groups_of("1m", "float32") == tuple(GROUPS)
    assert "many" in config.groups_of("7b", "bfloat16") and "compile" not in config.groups_of("1m", "bfloat16")
    assert config.groups_of("1m", "bfloat16") == ("products", "cg", "erase")
    with pytest.raises(ValueError, match="sizes has 2m"):
        BenchmarkConfig(workdir=tmp_path, sizes=("2m",))
    with pytest.raises(ValueError, match="repeats is 0"):
        BenchmarkConfig(workdir=tmp_path, repeats=0)


def test_written_files_are_whole(workload):
    requests = [line for line in workload.requests.read_text().splitlines() if line]
    assert len(requests) == 2
    assert files.read_json(workload.base / "config.json")["num_hidden_layers"] == 2
