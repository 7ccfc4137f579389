"""Owns what is measured of PyTorch: the baseline's own functions."""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmarks.workload import CG_DAMPING, CG_STEPS, ERASE_SAMPLE, L2, Workload, encode, solve_facts
from experiments.torch_baseline import curvature
from experiments.torch_baseline.erase import BaselineConfig, Eraser, edit_data, erase
from experiments.torch_baseline.model import Params, axpy, load_adapted_model, make_batches, norm
from experiments.torch_baseline.solvers import conjugate_gradients
from llmeraser_jax.data import load_examples, load_requests
from llmeraser_jax.models import load_tokenizer


class TorchSide:
    """The baseline on a workload."""

    def __init__(self, workload: Workload, num_threads: int):
        torch.set_num_threads(num_threads)
        self.workload = workload
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = False  # as for the package: float32 products are float32's
        adapter, dtype = workload.directory / "adapter", getattr(torch, workload.dtype)
        self.model = load_adapted_model(workload.base, adapter, dtype=dtype, device=self.device)
        self.tokenizer = load_tokenizer(workload.base)
        self.examples = load_examples(workload.directory / "train.jsonl")
        self.dataset = encode(self.examples, self.tokenizer)
        self.params = self.model.loaded_params()
        draw = torch.Generator().manual_seed(5)
        self.v = {n: torch.randn(t.shape, generator=draw).to(self.device) for n, t in self.params.items()}
        rows = workload.measured_rows(self.dataset)
        chunk = workload.shape.torch_chunk_size
        self.batches = make_batches(self.dataset, *rows, chunk_size=chunk, device=self.device)

    def prepare(self, name: str) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
        """Calls an entry once: how long that took, and a function that runs it to the end."""
        kind, _, mode = name.removeprefix("cg ").partition(" ")
        if kind == "erase":
            run = functools.partial(self._erase, keep_graphs=mode == "kept")
        elif kind == "matmul":
            n = 1024 if self.device == "cpu" else 8192
            a = torch.randn((n, n), device=self.device).to(getattr(torch, mode))
            run = lambda: {"flops": 2 * n**3 + 0 * torch.mm(a, a).shape[0]}  # noqa: E731
        elif kind == "gradient":
            model: Any = types.SimpleNamespace(logits=torch.compile(self.model.logits)) if mode else self.model
            run = lambda: curvature.gradient_sum(model, self.params, self.batches, l2=L2) and {}  # noqa: E731
        elif name.startswith("cg"):
            run = functools.partial(self._cg, kind, mode)
        else:
            product = self.operator(kind, mode)
            run = lambda: product(self.v) and {}  # noqa: E731

        def synchronised() -> dict[str, Any]:
            facts = run()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return facts

        started = time.perf_counter()
        synchronised()
        return {"first_seconds": time.perf_counter() - started}, synchronised

    def operator(self, kind: str, mode: str) -> Callable[[Params], Params]:
        """Products of the measured rows, their graphs kept or made anew for each."""
        if mode == "kept":
            return curvature.KEPT[kind](self.model, self.params, self.batches, l2=L2)
        if mode == "differences":
            return self._difference_of_gradients
        return lambda v: curvature.PRODUCTS[kind](self.model, self.params, self.batches, v, l2=L2)

    def _difference_of_gradients(self, v: Params) -> Params:
        """The Hessian product by central differences."""
        step = 1e-3 / float(norm(v))
        ahead, behind = (
            curvature.gradient_sum(self.model, axpy(side * step, v, self.params), self.batches, l2=L2)
            for side in (1.0, -1.0)
        )
        return {name: (ahead[name] - behind[name]) / (2 * step) for name in v}

    def _cg(self, kind: str, mode: str) -> dict[str, Any]:
        product = self.operator(kind, mode)  # from nothing, as the package's: making graphs is in the time
        solution = conjugate_gradients(
            lambda v: axpy(CG_DAMPING[kind], v, product(v)), self.v, rtol=0.0, max_steps=CG_STEPS
        )
        return solve_facts(solution.num_steps, negative_curvature=solution.negative_curvature)

    def _erase(self, *, keep_graphs: bool) -> dict[str, Any]:
        config = BaselineConfig(
            sample_size=ERASE_SAMPLE,
            damping=1e-2,
            cg_max_steps=CG_STEPS,
            cg_rtol=0.0,
            chunk_size=self.workload.shape.torch_chunk_size,
            keep_graphs=keep_graphs,
        )
        requests = load_requests(self.workload.directory / "requests.jsonl", self.examples)
        edited = edit_data(encode(self.examples, self.tokenizer), requests, self.tokenizer)
        cost = erase(Eraser(self.model, edited, config, l2=L2), self.params).cost
        return {"gradient_equivalents": cost["rhs"] + cost["curvature"], "diagnostics": cost["diagnostics"]}

    def describe(self) -> dict[str, Any]:
        """Device and sizes."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        tokens = int(sum(int(batch.attention_mask.sum()) for batch in self.batches))
        return {"devices": f"{name}, torch {torch.__version__}", "tokens": tokens}
