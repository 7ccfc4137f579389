"""Owns what is measured of `llmeraser_jax`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llmeraser_jax as le
from experiments.benchmarks.workload import CG_DAMPING, CG_STEPS, ERASE_SAMPLE, L2, Workload, encode, solve_facts
from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, example_rows, linearise
from llmeraser_jax.environment import describe_devices
from llmeraser_jax.losses import gradient_sum, lm_objective
from llmeraser_jax.parallel import make_mesh, place_stack, replicate
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.types import mv_many

Run = Callable[[], dict[str, Any]]


def _product(operator, v):
    return operator.mv(v)


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
        self.lora = replicate(le.load_adapter(workload.directory / "adapter", self.model), mesh)
        self.examples = le.load_examples(workload.directory / "train.jsonl")
        self.dataset = encode(self.examples, self.model.tokenizer)
        indices, weights = workload.measured_rows(self.dataset)
        self.stack = place_stack(self.dataset.stack(indices, weights, chunk_size=workload.shape.chunk_size), mesh)
        self.objective = lm_objective(self.model.apply, self.model.base, l2=L2)
        self.v = replicate(trees.tree_random_normal(jax.random.key(5), self.lora), mesh)
        self._solve = jax.jit(ConjugateGradients.solve, static_argnums=0)

    def operator(self, kind: str) -> DatasetCurvature:
        """The mean curvature of the measured rows."""
        return DatasetCurvature(self.objective, self.lora, self.stack, CURVATURES[kind])

    def prepare(self, name: str) -> tuple[dict[str, Any], Run]:
        """Compiles an entry and calls it once: what that took, and a function that runs it to the end."""
        started = time.perf_counter()
        facts, run = self._prepare(name)
        run()
        return {**facts, "first_seconds": time.perf_counter() - started}, run

    def _prepare(self, name: str) -> tuple[dict[str, Any], Run]:
        kind = "hessian" if "hessian" in name else "gauss-newton"
        if name == "erase":
            return {}, self._erase
        if name == "default erase":
            return {}, self._erase_by_default
        if name.startswith("matmul"):
            n = 1024 if jax.default_backend() == "cpu" else 8192
            a = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)), name.split()[1])
            precision = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
            facts, run = self._compiled(lambda a: jnp.dot(a, a, **precision), a)
            return facts, lambda: {**run(), "flops": 2 * n**3}
        if name == "gradient":
            return self._compiled(gradient_sum, self.objective, self.lora, self.stack)
        if name == "gradients of rows":
            rows = partial(example_rows, kind="loss")
            return self._compiled(rows, self.objective, self.lora, self.stack, jax.random.key(6))
        if name.startswith("cg"):
            return {}, lambda: self._cg(kind, kept=name.endswith("kept"))
        operator = linearise(self.operator(kind)) if name.endswith("kept") else self.operator(kind)
        if " k=" in name:
            k = int(name.rsplit("=", 1)[1])
            return self._compiled(mv_many, operator, jax.tree.map(lambda x: jnp.stack([x] * k), self.v))
        return self._compiled(_product, operator, self.v)

    def _compiled(self, function: Callable, *args) -> tuple[dict[str, Any], Run]:
        # Leaves, because run-time shape checks refuse the placeholders that `lower` puts into a batch.
        leaves, structure = jax.tree.flatten(args)
        compiled = jax.jit(lambda leaves: function(*jax.tree.unflatten(structure, leaves))).lower(leaves).compile()
        analysis = compiled.memory_analysis()

        def run() -> dict[str, Any]:
            jax.block_until_ready(compiled(leaves))
            return {}

        return {"temp_bytes": None if analysis is None else int(analysis.temp_size_in_bytes)}, run

    def _cg(self, kind: str, *, kept: bool) -> dict[str, Any]:
        """A solve from nothing: where products are kept, making what is kept is in the time."""
        operator = linearise(self.operator(kind)) if kept else self.operator(kind)
        solver = ConjugateGradients(rtol=0.0, max_steps=CG_STEPS)
        solution = jax.block_until_ready(self._solve(solver, Damped(operator, CG_DAMPING[kind]), self.v))
        return solve_facts(int(solution.num_steps), negative_curvature=bool(solution.negative_curvature))

    def _erase(self) -> dict[str, Any]:
        method = le.Step(
            curvature=le.CurvatureSpec(sample_size=ERASE_SAMPLE, damping=1e-2),
            solver=ConjugateGradients(max_steps=CG_STEPS, rtol=0.0),
            trust_region=None,
        )
        requests = le.load_requests(self.workload.directory / "requests.jsonl", self.examples)
        task = le.UnlearningTask(
            model=self.model,
            adapter=self.lora,
            data=encode(self.examples, self.model.tokenizer),
            requests=requests,
            training=le.TrainConfig(l2=L2),
        )
        result = le.erase(task, method, math.inf, chunk_size=self.workload.shape.chunk_size)
        cost = jax.block_until_ready(result).cost
        return {"gradient_equivalents": float(cost.total), "diagnostics": float(cost.diagnostics)}

    def _erase_by_default(self) -> dict[str, Any]:
        """The method that `llmeraser erase` takes, from the files of many rows to the adapter."""
        directory = self.workload.directory / "many"
        examples = le.load_examples(directory / "train.jsonl")
        task = le.UnlearningTask(
            model=self.model,
            adapter=self.lora,
            data=encode(examples, self.model.tokenizer),
            requests=le.load_requests(directory / "requests.jsonl", examples),
            calibration=encode(le.load_examples(directory / "calibration.jsonl"), self.model.tokenizer),
            training=le.TrainConfig(l2=L2),
        )
        cost = jax.block_until_ready(le.erase(task)).cost
        return {"gradient_equivalents": float(cost.total), "diagnostics": float(cost.diagnostics)}

    def describe(self) -> dict[str, Any]:
        """Device and sizes."""
        pairs = zip(self.stack.batches, self.stack.weights, strict=True)  # rows of weight 0 fill micro-batches
        tokens = int(sum(np.asarray(batch.attention_mask)[np.asarray(w) != 0].sum() for batch, w in pairs))
        return {"devices": describe_devices(), "tokens": tokens}
