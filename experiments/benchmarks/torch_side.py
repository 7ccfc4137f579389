"""Owns what is measured of PyTorch: the baseline's own functions, eager and compiled."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.sides import CG_DAMPING, Prepared, solve_facts
from experiments.benchmarks.workload import L2, Workload, encode
from experiments.torch_baseline import curvature
from experiments.torch_baseline.batches import Batch, make_batches
from experiments.torch_baseline.config import BaselineConfig
from experiments.torch_baseline.erase import Eraser, edit_data, erase
from experiments.torch_baseline.model import Params, axpy, load_adapted_model
from experiments.torch_baseline.receipt import make_receipt
from experiments.torch_baseline.solvers import conjugate_gradients
from llmeraser_jax.data import load_examples, load_requests
from llmeraser_jax.models import load_tokenizer


class TorchSide:
    """The baseline on a workload."""

    def __init__(self, workload: Workload, num_threads: int):
        torch.set_num_threads(num_threads)
        self.workload = workload
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # As for the package: float32 products are float32's, not TF32's.
        torch.backends.cuda.matmul.allow_tf32 = False
        dtype: torch.dtype = getattr(torch, workload.dtype)
        self.model = load_adapted_model(workload.base, workload.adapter, dtype=dtype, device=self.device)
        self.tokenizer = load_tokenizer(workload.base)
        self.examples = load_examples(workload.train)
        self.dataset = encode(self.examples, self.tokenizer)
        self.params = self.model.loaded_params()
        generator = torch.Generator().manual_seed(5)
        self.v: Params = {
            name: torch.randn(tensor.shape, generator=generator).to(self.device)
            for name, tensor in self.params.items()
        }
        self._kept: dict[str, Callable[[Params], Params]] = {}
        indices, weights = workload.measured_rows(self.dataset)
        self.batches = make_batches(
            self.dataset, indices, weights, chunk_size=workload.torch_chunk_size, device=self.device
        )

    def _bucketed(self) -> list[Batch]:
        """The same rows padded to the buckets' shapes, so that a compiler meets few of them."""
        indices, weights = self.workload.measured_rows(self.dataset)
        buckets = np.array([self.dataset.bucket_of(int(i)) for i in indices])
        batches = []
        for bucket in np.unique(buckets):
            chosen = buckets == bucket
            batches += make_batches(
                self.dataset,
                indices[chosen],
                weights[chosen],
                chunk_size=self.workload.torch_chunk_size,
                device=self.device,
                shape=self.dataset.buckets[bucket],
            )
        return batches

    def prepare(self, name: str) -> tuple[Prepared, Callable[[], dict[str, Any]]]:
        """See `sides.Side`."""
        kind, _, mode = name.removeprefix("compile ").removeprefix("cg ").partition(" ")
        if kind == "erase":
            run = functools.partial(self._erase, keep_graphs=mode == "kept")
        elif kind == "matmul":
            run = self._matmul(mode)
        elif name.startswith("compile"):
            run = self._compiled(kind, mode)
        elif name.startswith("cg"):
            run = self._cg(kind, mode)
        else:
            run = self._eager(kind, mode)

        def synchronised() -> dict[str, Any]:
            facts = run()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return facts

        started = time.perf_counter()
        synchronised()
        return Prepared(first_seconds=time.perf_counter() - started), synchronised

    def _eager(self, kind: str, mode: str) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            if kind == "gradient":
                curvature.gradient_sum(self.model, self.params, self.batches, l2=L2)
            else:
                self._product(kind, mode, self.v)
            return {}

        return run

    def _product(self, kind: str, mode: str, v: Params) -> Params:
        if mode == "kept":
            if kind not in self._kept:
                self._kept[kind] = self._keep(kind)
            return self._kept[kind](v)
        return curvature.PRODUCTS[kind](self.model, self.params, self.batches, v, l2=L2, mode=mode)

    def _keep(self, kind: str) -> Callable[[Params], Params]:
        return curvature.KEPT[kind](self.model, self.params, self.batches, l2=L2)

    def _compiled(self, kind: str, mode: str) -> Callable[[], dict[str, Any]]:
        """torch.compile of one micro-batch's function, its derivatives included; shapes are symbolic."""
        torch._dynamo.reset()
        functions = {
            "gradient": curvature.batch_gradient,
            "hessian": curvature.batch_hessian_product,
            "gauss-newton": curvature.batch_gauss_newton_product,
        }
        compiled = torch.compile(functions[kind], dynamic=True)
        batches = self._bucketed()

        def run() -> dict[str, Any]:
            total = None
            for batch in batches:
                if kind == "gradient":
                    part = compiled(self.model, self.params, batch)
                else:
                    part = compiled(self.model, self.params, batch, self.v, mode=mode)
                total = part if total is None else axpy(1.0, part, total)
            return {}

        return run

    def _matmul(self, dtype: str) -> Callable[[], dict[str, Any]]:
        n = 1024 if self.device == "cpu" else 8192
        a = torch.randn((n, n), device=self.device).to(getattr(torch, dtype))

        def run() -> dict[str, Any]:
            torch.mm(a, a)
            return {"flops": 2 * n**3}

        return run

    def _cg(self, kind: str, mode: str) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            # From nothing, as the package's: where graphs are kept, making them is in the time.
            product = self._keep(kind) if mode == "kept" else functools.partial(self._product, kind, mode)
            solution = conjugate_gradients(
                lambda v: axpy(CG_DAMPING[kind], v, product(v)),
                self.v,
                rtol=0.0,
                max_steps=self.workload.cg_steps,
            )
            return solve_facts(
                self.workload.cg_steps, solution.num_steps, negative_curvature=solution.negative_curvature
            )

        return run

    def _erase(self, *, keep_graphs: bool) -> dict[str, Any]:
        workload = self.workload
        config = BaselineConfig(
            mode="cg",
            curvature="gauss-newton",
            curvature_data="sample",
            sample_size=workload.erase_sample,
            damping=1e-2,
            cg_max_steps=workload.cg_steps,
            cg_rtol=0.0,
            l2=L2,
            chunk_size=workload.torch_chunk_size,
            diagnostic_sample=workload.diagnostic_sample,
            keep_graphs=keep_graphs,
        )
        started = time.perf_counter()
        requests = load_requests(workload.requests, self.examples)
        dataset = encode(self.examples, self.tokenizer)
        eraser = Eraser(self.model, edit_data(dataset, requests, self.tokenizer), config)
        erased = erase(eraser, self.params)
        seconds = time.perf_counter() - started
        receipt = make_receipt(eraser, self.examples, requests, self.params, erased, seconds)
        cost = receipt["gradient_equivalents"]
        return {
            "iterations": int(receipt["solver"]["iterations"]),
            "gradient_equivalents": float(cost["total"]),
            "diagnostics": float(cost["diagnostics"]),
            "receipt_seconds": seconds,
        }

    def forget(self) -> None:
        """Lets go of graphs."""
        self._kept.clear()

    def device_peak(self) -> Callable[[], int | None] | None:
        """The CUDA allocator's peak over what it holds now; None on a CPU."""
        if self.device == "cpu":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before

    def describe(self) -> dict[str, Any]:
        """Device, versions, sizes."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {
            "devices": name,
            "versions": {"torch": torch.__version__},
            "buckets": [list(batch.tokens.shape) for batch in self.batches],
            "tokens": int(sum(int(batch.attention_mask.sum()) for batch in self.batches)),
        }
