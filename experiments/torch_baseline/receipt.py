"""Owns the receipt: the one that `llmeraser erase` writes, filled from PyTorch."""

from __future__ import annotations

import importlib.metadata
import math
import resource
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llmeraser_jax.unlearning.cost import GRADIENT

from experiments.torch_baseline.batches import num_examples
from experiments.torch_baseline.config import BaselineConfig
from experiments.torch_baseline.curvature import GRADIENT_EQUIVALENTS
from experiments.torch_baseline.erase import Erased, Eraser
from experiments.torch_baseline.model import Params, axpy, norm, vdot
from llmeraser_jax.data import Example, Request, content_hash, edited_example
from llmeraser_jax.environment import library_versions
from llmeraser_jax.unlearning import EraseConfig, Receipt
from llmeraser_jax.unlearning.receipt import GradientEquivalents, NamedExample, summarise_solves


def make_receipt(
    eraser: Eraser,
    examples: Sequence[Example],
    requests: Sequence[Request],
    before: Params,
    erased: Erased,
    seconds: float,
) -> dict[str, Any]:
    """The receipt, ready for JSON.

    Args:
        eraser: what erased.
        examples: the training examples as they stood.
        requests: in file order.
        before: the adapter as trained.
        erased: the result.
        seconds: wall-clock time of the erasure.
    """
    config, data = eraser.config, eraser.data
    by_id = {example.id: example for example in examples}
    named = []
    for request in requests:
        after = edited_example(by_id[request.id], request)
        named.append(
            NamedExample(
                id=request.id,
                action=str(request.action),
                hash_before=content_hash(by_id[request.id]),
                hash_after=None if after is None else content_hash(after),
            )
        )
    actions = [example.action for example in named]
    norms, num_sampled = _edited_gradient_norms(eraser, (before, erased.params))
    delta = axpy(-1.0, before, erased.params)
    product_change, product_before = product_norms(before, delta, eraser.model.scaling)
    asymmetry = math.nan if config.uses_descent else product_asymmetry(eraser, before)
    first, cost = erased.steps[0], erased.cost
    receipt = Receipt(
        config=_nearest_config(config),
        counts={action: actions.count(action) for action in ("remove", "modify_query", "correct_response")},
        named=tuple(named),
        num_examples_before=data.num_trained,
        num_examples_after=len(data.edited_examples),
        method=config.method,
        complete=False,
        validity=None,
        targets=None,
        outcome=_outcome(config),
        final_weight=erased.steps[-1].weight_after,
        rhs_norm=first.rhs_norm / (first.weight_before - first.weight_after),
        solver=summarise_solves(erased.steps),
        steps=erased.steps,
        num_correctors=0,
        corrected="",
        attempts=(),
        curvature_reason=f"{config.kind}: as asked for",
        step_standard_error=None,
        product_asymmetry=asymmetry,
        delta_norm=norm(delta),
        adapter_norm_before=norm(before),
        adapter_norm_after=norm(erased.params),
        product_change_norm=product_change,
        product_norm_before=product_before,
        bf16_survival=bf16_survival(before, delta),
        edited_gradient_norm_before=norms[0],
        edited_gradient_norm_after=norms[1],
        gradient_norm_examples=num_sampled,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(eraser.model.device),
        gradient_equivalents=GradientEquivalents(
            rhs=cost.rhs,
            curvature=cost.curvature,
            trust_region=cost.trust_region,
            total=cost.total,
            diagnostics=cost.diagnostics,
            retraining=None,
            share_of_retraining=None,
        ),
        versions={**library_versions(), **{name: importlib.metadata.version(name) for name in ("torch", "peft")}},
    )
    return {**receipt.to_mapping(), "config": config.to_mapping()}


def _nearest_config(config: BaselineConfig) -> EraseConfig:
    """What the package's own configuration would say; the written receipt has the baseline's in its place."""
    return EraseConfig(
        method="path" if config.mode == "path" else "step",
        curvature="hessian" if config.kind == "hessian" else "gauss-newton",
        curvature_data=config.curvature_data,
        damping=config.rho,
        trust_region=False,
        l2=config.l2,
    )


def _outcome(config: BaselineConfig) -> str:
    told = {
        "published": f"{config.descent_steps} steps of the released script were taken",
        "paper": f"{config.descent_steps} steps of Adam on the quadratic were taken",
        "cg": "the single step was taken",
        "path": "the weight of the named examples was taken out",
    }[config.mode]
    return f"not judged: {told}; `llmeraser evaluate` says what that did"


def _seeded(which: np.ndarray, size: int, seed: Sequence[int]) -> np.ndarray:
    if len(which) <= size:
        return which
    return np.sort(np.random.default_rng(seed).choice(which, size=size, replace=False))


def _edited_gradient_norms(eraser: Eraser, adapters: Sequence[Params]) -> tuple[list[float], int]:
    """`||grad L'||` of each adapter on the same examples; counted as diagnostics."""
    chosen = _seeded(eraser.data.edited_examples, eraser.config.diagnostic_sample, [eraser.config.seed, 4])
    batches = eraser.batches(chosen, 1 / len(chosen))
    eraser.cost.diagnostics += GRADIENT * len(chosen) * len(adapters)
    return [norm(eraser.gradient(adapter, batches)) for adapter in adapters], len(chosen)


def product_norms(old: Params, delta: Params, scaling: float) -> tuple[float, float]:
    """Frobenius norms of the change of `scaling * B A` over all modules, and of that product before.

    The change is `dB (A + dA) + B dA`; norms come from Gram matrices, so that no product is formed.
    """

    def squared(left: torch.Tensor, right: torch.Tensor) -> float:
        return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)

    change = product = 0.0
    for name_a in old:
        if ".lora_A." not in name_a:
            continue
        name_b = name_a.replace(".lora_A.", ".lora_B.")
        a, b, da, db = (x.double() for x in (old[name_a], old[name_b], delta[name_a], delta[name_b]))
        change += squared(torch.cat([db, b], dim=1), torch.cat([a + da, da]))
        product += squared(b, a)
    return scaling * math.sqrt(change), scaling * math.sqrt(product)


def product_asymmetry(eraser: Eraser, params: Params) -> float:
    """`|u'Av - v'Au| / (||u|| ||Av||)` of the first step's operator, u and v random; counted as diagnostics."""
    batches = eraser.curvature_batches(eraser.config.weights()[1])
    generator = torch.Generator().manual_seed(eraser.config.seed)
    u, v = (
        {n: torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for n, t in params.items()}
        for _ in range(2)
    )
    av, au = eraser.product(params, batches, v), eraser.product(params, batches, u)
    eraser.cost.diagnostics += 2 * GRADIENT_EQUIVALENTS[eraser.config.kind] * num_examples(batches)
    return float(abs(vdot(u, av) - vdot(v, au))) / (norm(u) * norm(av))


def bf16_survival(old: Params, delta: Params) -> float:
    """`<round(old + delta) - round(old), delta> / ||delta||^2`, rounding to bfloat16."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.float().bfloat16().double()

    survived = {name: rounded(old[name] + delta[name]) - rounded(old[name]) for name in old}
    return float(vdot(survived, delta) / vdot(delta, delta))


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory in use so far: the device's where it is a GPU, else the process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
