"""The benchmark's own arithmetic and bookkeeping; that numbers are read as what they are."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from experiments.benchmarks import workload as module
from experiments.benchmarks.main import BenchmarkConfig, tables, targets
from experiments.benchmarks.timing import measure_group
from experiments.benchmarks.workload import GROUPS, SHAPES, Workload, make_examples, solve_facts, write_workload
from llmeraser_jax import files
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature
from llmeraser_jax.evaluation.render import render_text
from llmeraser_jax.models.decoder import base_shapes
from tests.curvature.problem import relative_difference

TINY = module.Shape(
    width=16, mlp_width=24, num_layers=2, num_heads=2, num_kv_heads=1, examples=3, chunk_size=2, torch_chunk_size=3,
    vocab_size=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    workload = Workload(directory=tmp_path_factory.mktemp("bench") / "models", shape=TINY, dtype="float32")
    write_workload(workload)
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
    lengths = module.tallrec_lengths(2000, np.random.default_rng(0))
    assert lengths.min() >= 100 and lengths.max() <= 250
    assert abs(np.median(lengths) - 160) < 5
    assert len(np.unique(lengths)) > 100


def test_every_row_has_the_stated_prompt_and_five_tokens_under_the_loss(side):
    assert {row.num_targets for row in side.dataset.encoded} == {5}
    again = make_examples(32, 2, 40)  # the seed of `write_workload`
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
    assert prepared["temp_bytes"] > 0 and prepared["first_seconds"] > 0


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
    for kind in ("hessian", "gauss-newton"):
        anew, kept = (theirs.operator(kind, mode)(theirs.v) for mode in ("recomputed", "kept"))
        assert norm(axpy(-1.0, anew, kept)) < 1e-5 * norm(anew)
        products[kind] = kept
    assert norm(axpy(-1.0, products["hessian"], products["gauss-newton"])) > 1e-2 * norm(products["hessian"])
    for name in ("matmul float32", "gradient", "hessian recomputed", "erase kept"):
        facts, run = theirs.prepare(name)
        assert facts["first_seconds"] > 0 and isinstance(run(), dict)


def test_a_solve_that_ends_early_is_no_measurement():
    assert solve_facts(5, negative_curvature=False) == {"products": 6}
    with pytest.raises(RuntimeError, match="negative curvature after 2 of 5"):
        solve_facts(2, negative_curvature=True)
    with pytest.raises(RuntimeError, match="converged after 4 of 5"):
        solve_facts(4, negative_curvature=False)


class FakeWorker:
    """Answers at once; notes what it was asked."""

    def __init__(self, side, log, broken=()):
        self.side, self.log, self.broken = side, log, broken

    def prepare(self, name):
        return {"unsupported": "RuntimeError: no"} if name in self.broken else {"first_seconds": 1.0}

    def run(self, name):
        self.log.append((self.side, name))
        return {"seconds": float(len(self.log)), "cpu_seconds": 1.0, "memory_bytes": 1, "facts": {}}

    def forget(self):
        pass


def test_repetitions_alternate_and_what_raises_is_reported_and_left_out():
    log: list[tuple[str, str]] = []
    broken = "hessian kept"
    workers = {"jax": FakeWorker("jax", log), "torch": FakeWorker("torch", log, broken=(broken,))}
    entries = measure_group(workers, "products", 3)
    order = [pair for pair in GROUPS["products"] if pair != ("torch", broken)]
    assert log == order * 3
    assert entries[f"torch: {broken}"] == {"unsupported": "RuntimeError: no"}
    # The median of three calls.
    assert entries["jax: gradient"]["seconds"] == 1.0 + len(order)


def _entry(seconds, temp=None, **facts):
    return {"first_seconds": 9.0, "temp_bytes": temp, "seconds": seconds, "cpu_seconds": seconds, "facts": facts}


def _cell():
    common = {
        "decoder_parameters": 1_000_000,
        "settings": {"threads": 2},
        "jax": {"devices": "1 x cpu", "tokens": 1000},
        "torch": {"devices": "cpu"},
    }
    groups = {
        "ceiling": {"jax: matmul float32": _entry(1.0, flops=100e9)},
        "products": {
            "jax: gradient": _entry(1.0, temp=10),
            "jax: hessian recomputed": _entry(2.0, temp=20),
            "jax: hessian kept": _entry(1.2, temp=5),
            "jax: gauss-newton recomputed": _entry(1.5, temp=12),
            "torch: gradient": _entry(1.0),
            "torch: hessian kept": {"unsupported": "RuntimeError: a | b"},
        },
        "many": {"jax: hessian recomputed": _entry(2.0), "jax: hessian recomputed k=8": _entry(8.0)},
        "cg": {
            "jax: cg hessian kept": _entry(9.0, products=6),
            "jax: cg hessian recomputed": _entry(18.0, products=6),
            "jax: cg gauss-newton kept": _entry(7.2, products=6),
            "torch: cg hessian recomputed": _entry(18.0, products=6),
        },
    }
    return {group: {**common, "entries": entries} for group, entries in groups.items()}


def test_targets_are_the_stated_ratios():
    cell = _cell()
    # 9 s / 6 products / 3 s, the better of two; 7.2 s / 6 products / 3 s; 2 / 1; 1.2 / 1; 1.5 / 1; 8 s / 8 / 2 s;
    # 20 / 10; 12 / 10 bytes; no erasure.
    values = [value for _, _, value in targets(cell)]
    assert values == pytest.approx([0.5, 0.4, 2.0, 1.2, 1.5, 0.5, 2.0, 1.2, None])
    # With graphs that PyTorch keeps: 6 s / 6 products.
    cell["cg"]["entries"]["torch: cg hessian kept"] = _entry(6.0, products=6)
    assert [value for _, _, value in targets(cell)[:2]] == pytest.approx([1.5, 1.2])
    # Of two erasures PyTorch's faster one.
    entries = {"jax: erase": _entry(1.0), "torch: erase recomputed": _entry(4.0), "torch: erase kept": _entry(2.5)}
    cell["erase"] = {**cell["cg"], "entries": entries}
    assert targets(cell)[-1][2] == pytest.approx(0.4)


def test_the_table_shows_every_entry():
    cell = _cell()
    shown = render_text(tables({"1m-float32": cell}))
    for result in cell.values():
        assert all(key in shown for key in result["entries"])
    assert "unsupported: RuntimeError: a | b" in shown
    assert "(1500.0 ms for each product)" in shown and "(100 GFLOP/s)" in shown


def test_a_configuration_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="sizes has 2m"):
        BenchmarkConfig(workdir=tmp_path, sizes=("2m",))
    with pytest.raises(ValueError, match="repeats is 0"):
        BenchmarkConfig(workdir=tmp_path, repeats=0)


def test_written_files_are_whole(workload):
    requests = [line for line in (workload.directory / "requests.jsonl").read_text().splitlines() if line]
    assert len(requests) == 4
    assert files.read_json(workload.base / "config.json")["num_hidden_layers"] == 2
