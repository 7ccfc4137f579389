"""Owns what is measured of `llmeraser_jax`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llmeraser_jax as le
from experiments.benchmarks.sides import CG_DAMPING, Prepared, solve_facts
from experiments.benchmarks.workload import L2, Workload, encode
from llmeraser_jax import trees
from llmeraser_jax.curvature import (
    CURVATURES,
    Bfloat16Products,
    Damped,
    DatasetCurvature,
    linearise,
)
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.losses import gradient_sum, lm_objective
from llmeraser_jax.parallel import make_mesh, place_stack, replicate
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.types import mv_many

MATMUL_SIZE = {"cpu": 1024}  # of the square matrices behind the ceiling; 8192 on an accelerator


def _product(operator, v):
    return operator.mv(v)


def _residuals(operator):
    return linearise(operator).residuals  # and not the base again


class JaxSide:
    """The package on a workload.

    Args:
        workload: the files.
        num_devices: share out the rows of each micro-batch.
    """

    def __init__(self, workload: Workload, num_devices: int = 1):
        self.workload = workload
        mesh = make_mesh(data=num_devices) if num_devices > 1 else None
        self.model = le.load_model(workload.base, dtype=workload.dtype, mesh=mesh)
        self.lora = replicate(le.load_adapter(workload.adapter, self.model), mesh)
        self.examples = le.load_examples(workload.train)
        self.dataset = encode(self.examples, self.model.tokenizer)
        indices, weights = workload.measured_rows(self.dataset)
        self.stack = place_stack(self.dataset.stack(indices, weights, chunk_size=workload.chunk_size), mesh)
        self.objective = lm_objective(self.model.apply, self.model.base, l2=L2)
        self.v = replicate(trees.tree_random_normal(jax.random.key(5), self.lora), mesh)
        self._linearised: dict[str, Any] = {}
        self._executables: dict[str, tuple[Any, float]] = {}  # and the seconds that compilation took
        self._solve = jax.jit(ConjugateGradients.solve, static_argnums=0)

    def operator(self, kind: str) -> DatasetCurvature:
        """The mean curvature of the measured rows."""
        return DatasetCurvature(self.objective, self.lora, self.stack, CURVATURES[kind])

    def prepare(self, name: str) -> tuple[Prepared, Callable[[], dict[str, Any]]]:
        """See `sides.Side`."""
        kind = "hessian" if "hessian" in name else "gauss-newton"
        cached = name.endswith("cached") or " cached k=" in name
        if name == "erase":
            return self._timed_first(self._erase)
        if name.startswith("matmul"):
            return self._matmul(name.removeprefix("matmul "))
        if name == "gradient":
            return self._compiled(name, gradient_sum, self.objective, self.lora, self.stack)
        if name.startswith("build"):
            return self._compiled(name, _residuals, self.operator(kind))
        if name.startswith("cg"):
            return self._cg(kind, cached)
        operator = self._cached(kind) if cached else self.operator(kind)
        if name.endswith(", bfloat16 operands"):
            return self._compiled(name, _product, Bfloat16Products(operator), self.v)
        if " k=" in name:
            k = int(name.rsplit("=", 1)[1])
            vs = jax.tree.map(lambda x: jnp.stack([x] * k), self.v)
            return self._compiled(name, mv_many, operator, vs)
        return self._compiled(name, _product, operator, self.v)

    def _cached(self, kind: str):
        """The linearised operator, held once for all entries of a group."""
        if kind not in self._linearised:
            self._linearised[kind] = linearise(self.operator(kind))
        return self._linearised[kind]

    def forget(self) -> None:
        """Lets go of caches; executables stay, so that no program is compiled twice."""
        self._linearised.clear()

    def _compiled(self, name: str, function: Callable, *args) -> tuple[Prepared, Callable[[], dict[str, Any]]]:
        started = time.perf_counter()
        # Leaves, because run-time shape checks refuse the placeholders that `lower` puts into a batch.
        leaves, structure = jax.tree.flatten(args)
        if name not in self._executables:

            def of_leaves(leaves):
                return function(*jax.tree.unflatten(structure, leaves))

            compiled = jax.jit(of_leaves).lower(leaves).compile()
            self._executables[name] = (compiled, time.perf_counter() - started)
        compiled, compile_seconds = self._executables[name]
        jax.block_until_ready(compiled(leaves))
        analysis = compiled.memory_analysis()

        def run() -> dict[str, Any]:
            jax.block_until_ready(compiled(leaves))
            return {}

        prepared = Prepared(
            first_seconds=time.perf_counter() - started,
            compile_seconds=compile_seconds,
            temp_bytes=None if analysis is None else int(analysis.temp_size_in_bytes),
            argument_bytes=None
            if analysis is None
            else int(analysis.argument_size_in_bytes + analysis.output_size_in_bytes),
        )
        return prepared, run

    def _timed_first(self, run: Callable[[], dict[str, Any]]) -> tuple[Prepared, Callable[[], dict[str, Any]]]:
        started = time.perf_counter()
        run()
        return Prepared(first_seconds=time.perf_counter() - started), run

    def _matmul(self, dtype: str) -> tuple[Prepared, Callable[[], dict[str, Any]]]:
        n = MATMUL_SIZE.get(jax.default_backend(), 8192)
        a = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)), dtype)
        precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
        prepared, run = self._compiled(f"matmul {dtype}", lambda a: jnp.dot(a, a, precision=precision), a)
        return prepared, lambda: {**run(), "flops": 2 * n**3}

    def _cg(self, kind: str, cached: bool) -> tuple[Prepared, Callable[[], dict[str, Any]]]:
        """A solve from nothing: where the products are cached, making the cache is in the time."""
        solver = ConjugateGradients(rtol=0.0, max_steps=self.workload.cg_steps)
        operator, rhs = self.operator(kind), self.v

        def run() -> dict[str, Any]:
            given = linearise(operator) if cached else operator
            solution = jax.block_until_ready(self._solve(solver, Damped(given, CG_DAMPING[kind]), rhs))
            return solve_facts(
                self.workload.cg_steps,
                int(solution.num_steps),
                negative_curvature=bool(solution.negative_curvature),
            )

        return self._timed_first(run)

    def _erase(self) -> dict[str, Any]:
        workload = self.workload
        config = le.EraseConfig(
            method="step",
            curvature="gauss-newton",
            curvature_data="sample",
            sample_size=workload.erase_sample,
            damping=1e-2,
            trust_region=False,
            cg_max_steps=workload.cg_steps,
            cg_rtol=0.0,
            l2=L2,
            chunk_size=workload.chunk_size,
            diagnostic_sample=workload.diagnostic_sample,
        )
        requests = le.load_requests(workload.requests, self.examples)
        dataset = encode(self.examples, self.model.tokenizer)
        result = le.erase(self.model, self.lora, dataset, requests, config)
        jax.block_until_ready(result.lora)
        solver = result.receipt.solver
        return {
            "iterations": int(solver.iterations),
            "gradient_equivalents": float(result.receipt.gradient_equivalents.total),
            "diagnostics": float(result.receipt.gradient_equivalents.diagnostics),
            "receipt_seconds": float(result.receipt.seconds),
        }

    def device_peak(self) -> Callable[[], int | None] | None:
        """None on a CPU. JAX's allocator keeps one peak for the process; a program's own is in its analysis."""
        statistics = jax.local_devices()[0].memory_stats()
        return None if not statistics else lambda: None

    def _num_tokens(self) -> int:
        """Real tokens of the measured rows; rows of weight 0 fill micro-batches."""
        pairs = zip(self.stack.batches, self.stack.weights, strict=True)
        return int(sum(np.asarray(batch.attention_mask)[np.asarray(w) != 0].sum() for batch, w in pairs))

    def describe(self) -> dict[str, Any]:
        """Device, versions, sizes."""
        return {
            "devices": describe_devices(),
            "versions": library_versions(),
            "buckets": [list(batch.tokens.shape) for batch in self.stack.batches],
            "tokens": self._num_tokens(),
            "base_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.model.base)),
            "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.lora)),
        }
