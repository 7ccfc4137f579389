"""Owns derivatives of the loss: gradients, Hessian products and Gauss-Newton products, summed over micro-batches.

`l(z)` is the response's mean cross entropy plus `(l2 / 2) ||theta||^2`. Functions that end in `_sum` and the
products take every example with its coefficient: `sum_i weights_i * f(z_i)`. Those that begin with `batch_` look at
one micro-batch and leave the L2 term out; they are what a benchmark compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.autograd import forward_ad

from experiments.torch_baseline.batches import Batch, weight_sum
from experiments.torch_baseline.model import AdaptedModel, Params, axpy, zeros_like

HessianMode = Literal["reverse-over-reverse", "forward-over-reverse"]
GaussNewtonMode = Literal["shared", "separate"]
Kind = Literal["hessian", "gauss-newton"]

# Cost of one product with one example, in gradient equivalents (`method.md`: on a frozen base a matrix product, its
# tangent and its transpose cost the same).
GRADIENT_EQUIVALENTS = {"hessian": 2.0, "gauss-newton": 1.5}
# With kept graphs: making those of either kind is a forward and a backward pass, and so is each product.
KEPT_GRADIENT_EQUIVALENTS = 1.0


def data_losses(
    model: AdaptedModel, params: Params, batch: Batch, *, logits_at_response: bool = True
) -> torch.Tensor:
    """Each example's loss without the L2 term [batch], in the adapter's dtype."""
    logits = model.logits(params, batch, at_response=logits_at_response).to(batch.target_weights.dtype)
    log_probs = torch.log_softmax(logits, dim=-1)
    picked = log_probs.gather(-1, batch.targets[..., None]).squeeze(-1)
    return -(picked * batch.target_weights).sum(-1)


def batch_loss(
    model: AdaptedModel, params: Params, batch: Batch, *, logits_at_response: bool = True
) -> torch.Tensor:
    """`sum_i weights_i * data loss_i` of one micro-batch."""
    return (batch.weights * data_losses(model, params, batch, logits_at_response=logits_at_response)).sum()


def batch_gradient(model: AdaptedModel, params: Params, batch: Batch, *, logits_at_response: bool = True) -> Params:
    """`sum_i weights_i * grad data loss_i` of one micro-batch."""
    leaves = _leaves(params)
    loss = batch_loss(model, leaves, batch, logits_at_response=logits_at_response)
    return dict(zip(leaves, torch.autograd.grad(loss, tuple(leaves.values())), strict=True))


def batch_hessian_product(
    model: AdaptedModel,
    params: Params,
    batch: Batch,
    v: Params,
    *,
    mode: HessianMode = "reverse-over-reverse",
    logits_at_response: bool = True,
) -> Params:
    """`sum_i weights_i * hess(data loss_i) v` of one micro-batch.

    Args:
        model: base and adapter.
        params: where the Hessian is taken.
        batch: examples with coefficients.
        v: a vector of adapter space.
        mode: `reverse-over-reverse` differentiates `<gradient, v>`; `forward-over-reverse` is the directional
            derivative of the gradient (`torch.func`).
        logits_at_response: see `AdaptedModel.logits`.

    Raises:
        ValueError: unknown mode.
    """
    if mode == "reverse-over-reverse":
        leaves = _leaves(params)
        inputs = tuple(leaves.values())
        loss = batch_loss(model, leaves, batch, logits_at_response=logits_at_response)
        gradient = torch.autograd.grad(loss, inputs, create_graph=True)
        return dict(zip(leaves, torch.autograd.grad(_slope(leaves, gradient, v), inputs), strict=True))
    if mode == "forward-over-reverse":

        def gradient_of(p: Params) -> Params:
            return torch.func.grad(lambda q: batch_loss(model, q, batch, logits_at_response=logits_at_response))(p)

        point = {name: tensor.detach() for name, tensor in params.items()}
        return torch.func.jvp(gradient_of, (point,), (v,))[1]
    msg = f"mode is {mode!r}; it must be 'reverse-over-reverse' or 'forward-over-reverse'."
    raise ValueError(msg)


def batch_gauss_newton_product(
    model: AdaptedModel,
    params: Params,
    batch: Batch,
    v: Params,
    *,
    mode: GaussNewtonMode = "shared",
    logits_at_response: bool = True,
) -> Params:
    """`sum_i weights_i * J_i' (diag(p) - p p') J_i v` of one micro-batch, averaged over response tokens.

    Args:
        model: base and adapter.
        params: where the matrix is taken.
        batch: examples with coefficients.
        v: a vector of adapter space.
        mode: `shared` takes the tangent along with the forward pass that the backward pass reads; `separate` runs
            two forward passes, the one with the tangent without a tape (less memory, a third more work).
        logits_at_response: see `AdaptedModel.logits`.

    Raises:
        ValueError: unknown mode.
    """
    leaves = _leaves(params)

    def outputs(p: Params) -> torch.Tensor:
        return model.logits(p, batch, at_response=logits_at_response)

    if mode == "shared":
        logits, tangent = _with_tangent(outputs, leaves, v)
    elif mode == "separate":
        with torch.no_grad():
            _, tangent = _with_tangent(outputs, params, v)
        logits = outputs(leaves)
    else:
        msg = f"mode is {mode!r}; it must be 'shared' or 'separate'."
        raise ValueError(msg)
    with torch.no_grad():
        cotangent = _output_hessian_product(logits, tangent, batch)
    products = torch.autograd.grad(logits, tuple(leaves.values()), grad_outputs=cotangent)
    return dict(zip(leaves, products, strict=True))


def _slope(leaves: Params, gradient: Sequence[torch.Tensor], v: Params) -> torch.Tensor:
    """`<gradient, v>`, to be differentiated once more."""
    return torch.stack([(g * v[name]).sum() for name, g in zip(leaves, gradient, strict=True)]).sum()


def _leaves(params: Params) -> Params:
    return {name: tensor.detach().requires_grad_(True) for name, tensor in params.items()}


def _with_tangent(
    outputs: Callable[[Params], torch.Tensor], params: Params, v: Params
) -> tuple[torch.Tensor, torch.Tensor]:
    """`outputs(params)` and its derivative along `v`, detached."""
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(tensor, v[name]) for name, tensor in params.items()}
        primal, tangent = forward_ad.unpack_dual(outputs(dual))
    if tangent is None:
        msg = "The outputs do not depend on the adapter; is it a part of this model?"
        raise RuntimeError(msg)
    return primal, tangent.detach()


def _output_hessian_product(logits: torch.Tensor, tangent: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`weights_i * target_weights * (diag(p) - p p') tangent`, in the dtype of the logits."""
    coefficients = (batch.weights[:, None] * batch.target_weights)[..., None]
    probs = torch.softmax(logits.to(coefficients.dtype), dim=-1)
    scaled = probs * tangent.to(coefficients.dtype)
    return (coefficients * (scaled - probs * scaled.sum(-1, keepdim=True))).to(logits.dtype)


def loss_sum(
    model: AdaptedModel, params: Params, batches: Sequence[Batch], *, logits_at_response: bool = True
) -> float:
    """`sum_i weights_i * data loss_i`, without the L2 term."""
    with torch.no_grad():
        parts = [batch_loss(model, params, batch, logits_at_response=logits_at_response) for batch in batches]
    return float(torch.stack(parts).double().sum())


def gradient_sum(
    model: AdaptedModel,
    params: Params,
    batches: Sequence[Batch],
    *,
    l2: float = 0.0,
    logits_at_response: bool = True,
) -> Params:
    """`sum_i weights_i * grad l(z_i)`, the L2 term included once per unit of weight."""
    total = zeros_like(params)
    for batch in batches:
        total = axpy(1.0, batch_gradient(model, params, batch, logits_at_response=logits_at_response), total)
    return axpy(l2 * weight_sum(batches), params, total)


def hessian_product(
    model: AdaptedModel,
    params: Params,
    batches: Sequence[Batch],
    v: Params,
    *,
    l2: float = 0.0,
    mode: HessianMode = "reverse-over-reverse",
    logits_at_response: bool = True,
) -> Params:
    """`sum_i weights_i * hess l(z_i) v`; see `batch_hessian_product`."""
    total = zeros_like(params)
    for batch in batches:
        part = batch_hessian_product(model, params, batch, v, mode=mode, logits_at_response=logits_at_response)
        total = axpy(1.0, part, total)
    return axpy(l2 * weight_sum(batches), v, total)


class _Kept:
    """Products of a sum over micro-batches whose graphs are made once and held.

    Memory grows with the examples: every value that the passes behind a graph leave is held.

    Args:
        model: base and adapter.
        params: where the matrix is taken.
        batches: examples with coefficients.
        l2: as in `hessian_product`.
        logits_at_response: see `AdaptedModel.logits`.
    """

    def __init__(
        self,
        model: AdaptedModel,
        params: Params,
        batches: Sequence[Batch],
        *,
        l2: float = 0.0,
        logits_at_response: bool = True,
    ):
        self._leaves = _leaves(params)
        self._inputs = tuple(self._leaves.values())
        self._shift = l2 * weight_sum(batches)
        self._graphs = [self._make(model, batch, logits_at_response) for batch in batches]

    def __call__(self, v: Params) -> Params:
        """`sum_i weights_i * C(z_i) v`, the L2 term included."""
        total = zeros_like(self._leaves)
        for graph in self._graphs:
            part = self._product(graph, v)
            total = axpy(1.0, dict(zip(self._leaves, part, strict=True)), total)
        return axpy(self._shift, v, total)

    def _make(self, model: AdaptedModel, batch: Batch, logits_at_response: bool) -> Any:
        """The graphs of one micro-batch."""
        raise NotImplementedError

    def _product(self, graph: Any, v: Params) -> Sequence[torch.Tensor]:
        """The product with `v` on them."""
        raise NotImplementedError


class KeptHessian(_Kept):
    """Hessian products, reverse over reverse, of gradients whose graphs are kept."""

    def _make(self, model: AdaptedModel, batch: Batch, logits_at_response: bool) -> Sequence[torch.Tensor]:
        loss = batch_loss(model, self._leaves, batch, logits_at_response=logits_at_response)
        return torch.autograd.grad(loss, self._inputs, create_graph=True)

    def _product(self, graph: Sequence[torch.Tensor], v: Params) -> Sequence[torch.Tensor]:
        return torch.autograd.grad(_slope(self._leaves, graph, v), self._inputs, retain_graph=True)


class KeptGaussNewton(_Kept):
    """Gauss-Newton products on kept graphs: of the logits, and of their pullback `u -> J' u`.

    The pullback is linear, so that its own derivative along `u`, pulled back, is `J v`: a product is one backward
    pass through the pullback's graph and one through the logits'.
    """

    def _make(self, model: AdaptedModel, batch: Batch, logits_at_response: bool) -> Any:
        logits = model.logits(self._leaves, batch, at_response=logits_at_response)
        cotangent = torch.zeros_like(logits, requires_grad=True)
        pullback = torch.autograd.grad(logits, self._inputs, grad_outputs=cotangent, create_graph=True)
        return batch, logits, cotangent, pullback

    def _product(self, graph: Any, v: Params) -> Sequence[torch.Tensor]:
        batch, logits, cotangent, pullback = graph
        slope = _slope(self._leaves, pullback, v)
        tangent = torch.autograd.grad(slope, cotangent, retain_graph=True)[0]
        with torch.no_grad():
            curved = _output_hessian_product(logits, tangent, batch)
        return torch.autograd.grad(logits, self._inputs, grad_outputs=curved, retain_graph=True)


def gauss_newton_product(
    model: AdaptedModel,
    params: Params,
    batches: Sequence[Batch],
    v: Params,
    *,
    l2: float = 0.0,
    mode: GaussNewtonMode = "shared",
    logits_at_response: bool = True,
) -> Params:
    """`sum_i weights_i * G(z_i) v`; see `batch_gauss_newton_product`."""
    total = zeros_like(params)
    for batch in batches:
        part = batch_gauss_newton_product(model, params, batch, v, mode=mode, logits_at_response=logits_at_response)
        total = axpy(1.0, part, total)
    return axpy(l2 * weight_sum(batches), v, total)


PRODUCTS: dict[str, Callable[..., Params]] = {"hessian": hessian_product, "gauss-newton": gauss_newton_product}
KEPT: dict[str, Callable[..., Callable[[Params], Params]]] = {
    "hessian": KeptHessian,
    "gauss-newton": KeptGaussNewton,
}
