"""Owns derivatives of the loss: gradients, Hessian products and Gauss-Newton products, summed over micro-batches.

`l(z)` is the response's mean cross entropy plus `(l2 / 2) ||theta||^2`. Every function takes each example with its
coefficient, `sum_i weights_i * f(z_i)`, and counts the L2 term once per unit of weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from experiments.torch_baseline.model import AdaptedModel, Batch, Params, axpy, weight_sum, zeros_like

# Cost of one product with one example, in gradient equivalents: on a frozen base a matrix product, its tangent and
# its transpose cost the same.
GRADIENT_EQUIVALENTS = {"hessian": 2.0, "gauss-newton": 1.5}
# With kept graphs: making those of either kind is a forward and a backward pass, and so is each product.
KEPT_GRADIENT_EQUIVALENTS = 1.0


def data_losses(model: AdaptedModel, params: Params, batch: Batch) -> torch.Tensor:
    """Each example's loss without the L2 term [batch], in the adapter's dtype."""
    logits = model.logits(params, batch).to(batch.target_weights.dtype)
    picked = torch.log_softmax(logits, dim=-1).gather(-1, batch.targets[..., None]).squeeze(-1)
    return -(picked * batch.target_weights).sum(-1)


def _loss(model: AdaptedModel, leaves: Params, batch: Batch) -> torch.Tensor:
    return (batch.weights * data_losses(model, leaves, batch)).sum()


def _leaves(params: Params) -> Params:
    return {name: tensor.detach().requires_grad_(True) for name, tensor in params.items()}


def _slope(leaves: Params, gradient: Sequence[torch.Tensor], v: Params) -> torch.Tensor:
    """`<gradient, v>`, to be differentiated once more."""
    return torch.stack([(g * v[name]).sum() for name, g in zip(leaves, gradient, strict=True)]).sum()


def _output_hessian_product(logits: torch.Tensor, tangent: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`weights_i * target_weights * (diag(p) - p p') tangent`, in the dtype of the logits."""
    coefficients = (batch.weights[:, None] * batch.target_weights)[..., None]
    probs = torch.softmax(logits.to(coefficients.dtype), dim=-1)
    scaled = probs * tangent.to(coefficients.dtype)
    return (coefficients * (scaled - probs * scaled.sum(-1, keepdim=True))).to(logits.dtype)


def _sum(
    params: Params, batches: Sequence[Batch], part: Callable[[Params, Batch], Sequence[torch.Tensor]], shift: Params
) -> Params:
    """The sum over batches of `part(leaves, batch)`, and `shift`."""
    total = zeros_like(params)
    for batch in batches:
        leaves = _leaves(params)
        total = axpy(1.0, dict(zip(leaves, part(leaves, batch), strict=True)), total)
    return axpy(1.0, shift, total)


def _shift(l2: float, batches: Sequence[Batch], v: Params) -> Params:
    return {name: l2 * weight_sum(batches) * tensor for name, tensor in v.items()}


def gradient_sum(model: AdaptedModel, params: Params, batches: Sequence[Batch], *, l2: float = 0.0) -> Params:
    """`sum_i weights_i * grad l(z_i)`."""

    def part(leaves: Params, batch: Batch) -> Sequence[torch.Tensor]:
        return torch.autograd.grad(_loss(model, leaves, batch), tuple(leaves.values()))

    return _sum(params, batches, part, _shift(l2, batches, params))


def hessian_product(
    model: AdaptedModel, params: Params, batches: Sequence[Batch], v: Params, *, l2: float = 0.0
) -> Params:
    """`sum_i weights_i * hess l(z_i) v`, reverse over reverse."""

    def part(leaves: Params, batch: Batch) -> Sequence[torch.Tensor]:
        inputs = tuple(leaves.values())
        gradient = torch.autograd.grad(_loss(model, leaves, batch), inputs, create_graph=True)
        return torch.autograd.grad(_slope(leaves, gradient, v), inputs)

    return _sum(params, batches, part, _shift(l2, batches, v))


def gauss_newton_product(
    model: AdaptedModel, params: Params, batches: Sequence[Batch], v: Params, *, l2: float = 0.0
) -> Params:
    """`sum_i weights_i * J_i' (diag(p) - p p') J_i v`, averaged over response tokens.

    The tangent is taken along with the forward pass that the backward pass reads.
    """

    def part(leaves: Params, batch: Batch) -> Sequence[torch.Tensor]:
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(tensor, v[name]) for name, tensor in leaves.items()}
            logits, tangent = forward_ad.unpack_dual(model.logits(dual, batch))
        assert tangent is not None
        with torch.no_grad():
            cotangent = _output_hessian_product(logits, tangent.detach(), batch)
        return torch.autograd.grad(logits, tuple(leaves.values()), grad_outputs=cotangent)

    return _sum(params, batches, part, _shift(l2, batches, v))


class _Kept:
    """Products of a sum over micro-batches whose graphs are made once and held.

    Memory grows with the examples: every value that the passes behind a graph leave is held. Arguments as of
    `hessian_product`.
    """

    def __init__(self, model: AdaptedModel, params: Params, batches: Sequence[Batch], *, l2: float = 0.0):
        self._leaves = _leaves(params)
        self._inputs = tuple(self._leaves.values())
        self._l2, self._batches = l2, batches
        self._graphs = [self._make(model, batch) for batch in batches]

    def __call__(self, v: Params) -> Params:
        """`sum_i weights_i * C(z_i) v`."""
        total = zeros_like(self._leaves)
        for graph in self._graphs:
            total = axpy(1.0, dict(zip(self._leaves, self._product(graph, v), strict=True)), total)
        return axpy(1.0, _shift(self._l2, self._batches, v), total)

    def _make(self, model: AdaptedModel, batch: Batch) -> Any:
        raise NotImplementedError

    def _product(self, graph: Any, v: Params) -> Sequence[torch.Tensor]:
        raise NotImplementedError


class KeptHessian(_Kept):
    """Hessian products, reverse over reverse, of gradients whose graphs are kept."""

    def _make(self, model: AdaptedModel, batch: Batch) -> Any:
        return torch.autograd.grad(_loss(model, self._leaves, batch), self._inputs, create_graph=True)

    def _product(self, graph: Any, v: Params) -> Sequence[torch.Tensor]:
        return torch.autograd.grad(_slope(self._leaves, graph, v), self._inputs, retain_graph=True)


class KeptGaussNewton(_Kept):
    """Gauss-Newton products on kept graphs: of the logits, and of their pullback `u -> J' u`.

    The pullback is linear, so that its own derivative along `u`, pulled back, is `J v`: a product is one backward
    pass through the pullback's graph and one through the logits'.
    """

    def _make(self, model: AdaptedModel, batch: Batch) -> Any:
        logits = model.logits(self._leaves, batch)
        cotangent = torch.zeros_like(logits, requires_grad=True)
        pullback = torch.autograd.grad(logits, self._inputs, grad_outputs=cotangent, create_graph=True)
        return batch, logits, cotangent, pullback

    def _product(self, graph: Any, v: Params) -> Sequence[torch.Tensor]:
        batch, logits, cotangent, pullback = graph
        tangent = torch.autograd.grad(_slope(self._leaves, pullback, v), cotangent, retain_graph=True)[0]
        with torch.no_grad():
            curved = _output_hessian_product(logits, tangent, batch)
        return torch.autograd.grad(logits, self._inputs, grad_outputs=curved, retain_graph=True)


PRODUCTS: dict[str, Callable[..., Params]] = {"hessian": hessian_product, "gauss-newton": gauss_newton_product}
KEPT: dict[str, Callable[..., Callable[[Params], Params]]] = {
    "hessian": KeptHessian,
    "gauss-newton": KeptGaussNewton,
}
