"""Owns the solves: conjugate gradients, and Adam on the quadratic as the paper and the released script have it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

from experiments.torch_baseline.model import Params, axpy, norm, scaled, vdot, zeros_like
from llmeraser_jax.solvers import Status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
    """How a solve ended.

    Attributes:
        value: the iterate reached.
        status: why the loop stopped.
        num_steps: steps taken.
        relative_residual: `||b - A x|| / ||b||` from the definition; nan where it was not computed.
        negative_curvature: some direction p had p'Ap <= 0.
        history: of conjugate gradients the recurrence's relative residual after each step; of Adam the norm of each
            step's gradient over `||b||`.
        ritz_extremes: least and largest eigenvalue that the recurrence met; nan for Adam.
    """

    value: Params
    status: Status
    num_steps: int
    relative_residual: float
    negative_curvature: bool = False
    history: tuple[float, ...] = ()
    ritz_extremes: tuple[float, float] = (math.nan, math.nan)


def _no_rhs(rhs: Params, rhs_norm: float) -> Solution | None:
    """The failure of a solve without a usable right-hand side."""
    if rhs_norm > 0 and math.isfinite(rhs_norm):
        return None
    status = Status.ZERO_RHS if rhs_norm == 0 else Status.NON_FINITE
    return Solution(value=zeros_like(rhs), status=status, num_steps=0, relative_residual=0.0)


def conjugate_gradients(mv: Callable[[Params], Params], rhs: Params, *, rtol: float, max_steps: int) -> Solution:
    """Solves `A x = rhs` from 0 with `max_steps` products, and one more for the true residual.

    A direction of non-positive curvature stops it with the iterate reached; at the first step there is none, and
    the status is a failure.

    Args:
        mv: the product with `A`, symmetric and the same at every call.
        rhs: a vector of adapter space.
        rtol: stop when the recurrence's residual is at most this share of the right-hand side.
        max_steps: stop after so many products; that is not convergence.
    """
    tolerance = max(rtol, torch.finfo(next(iter(rhs.values())).dtype).eps)
    rhs_norm, x = norm(rhs), zeros_like(rhs)
    if (broken := _no_rhs(rhs, rhs_norm)) is not None:
        return broken
    residual, direction = rhs, rhs
    residual_sq = float(vdot(rhs, rhs))
    history: list[float] = []
    inverse_alphas: list[float] = []
    betas: list[float] = []
    status = Status.MAX_STEPS
    while len(history) < max_steps:
        product = mv(direction)
        curvature = float(vdot(direction, product))
        if not math.isfinite(curvature):
            status = Status.NON_FINITE
            break
        inverse_alphas.append(curvature / residual_sq)
        if curvature <= 0:
            status = Status.NEGATIVE_CURVATURE if history else Status.NEGATIVE_CURVATURE_AT_START
            break
        alpha = residual_sq / curvature
        x = axpy(alpha, direction, x)
        residual = axpy(-alpha, product, residual)
        before, residual_sq = residual_sq, float(vdot(residual, residual))
        if not math.isfinite(residual_sq):
            status = Status.NON_FINITE
            break
        history.append(math.sqrt(residual_sq) / rhs_norm)
        if history[-1] <= tolerance:
            status = Status.CONVERGED
            break
        betas.append(residual_sq / before)
        direction = axpy(betas[-1], direction, residual)
    true_residual = norm(axpy(-1.0, mv(x), rhs)) / rhs_norm
    if status is Status.CONVERGED and not true_residual <= 2 * tolerance:
        status = Status.RESIDUAL_DRIFT
    return Solution(
        value=x,
        status=status,
        num_steps=len(history),
        relative_residual=true_residual,
        negative_curvature=status in (Status.NEGATIVE_CURVATURE, Status.NEGATIVE_CURVATURE_AT_START),
        history=tuple(history),
        ritz_extremes=_ritz_extremes(inverse_alphas, betas),
    )


def _ritz_extremes(inverse_alphas: list[float], betas: list[float]) -> tuple[float, float]:
    """Extreme eigenvalues of the Lanczos matrix that the coefficients stand for (Golub and Van Loan)."""
    size = len(inverse_alphas)
    if size == 0:
        return math.nan, math.nan
    inverse, beta = np.array(inverse_alphas), np.array(betas[: size - 1])
    diagonal = inverse + np.concatenate([[0.0], beta * inverse[:-1]])
    off_diagonal = np.sqrt(beta) * inverse[:-1]
    eigenvalues = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1))
    return float(eigenvalues[0]), float(eigenvalues[-1])


def adam_on_quadratic(
    term_mv: Callable[[int, Params], Params],
    rhs: Params,
    *,
    product_is_constant: bool,
    learning_rate: float = 1e-5,
    num_steps: int = 20,
    start: float = 1e-5,
    weight_decay: float = 1e-5,
    on_step: Callable[[int, Params], None] = lambda step, iterate: None,
) -> Solution:
    """PyTorch's Adam on `1/2 d'H d - b'd`, one mini-batch product per step.

    The released script's loss is `1/2 <d, H_batch d> - <b, d>` with the product a constant to automatic
    differentiation: its gradient is `1/2 H_batch d - b`, and its fixed point twice the influence step. The paper's
    is `H_batch d - b`.

    Args:
        term_mv: `(step, d) -> H_batch d`, damping included.
        rhs: b.
        product_is_constant: whether to differentiate as the script does.
        learning_rate: Adam's; betas 0.9 and 0.999, epsilon 1e-8.
        num_steps: products; all are taken, unless a number is not finite.
        start: every number of the first iterate.
        weight_decay: times the iterate, added to the gradient before Adam.
        on_step: called after each step with its number, from 1, and the iterate.

    Returns:
        The solution, its residual not computed: one mini-batch does not know it. The status is MAX_STEPS: the loop
        has no criterion of convergence.
    """
    rhs_norm = norm(rhs)
    if (broken := _no_rhs(rhs, rhs_norm)) is not None:
        return broken
    iterate = {name: torch.full_like(tensor, start).requires_grad_() for name, tensor in rhs.items()}
    optimiser = torch.optim.Adam(list(iterate.values()), lr=learning_rate, weight_decay=weight_decay)
    history: list[float] = []
    status = Status.MAX_STEPS
    for step in range(num_steps):
        at = {name: tensor.detach() for name, tensor in iterate.items()}
        product = term_mv(step, at)
        gradient = axpy(-1.0, rhs, scaled(0.5 if product_is_constant else 1.0, product))
        size = norm(gradient) / rhs_norm
        if not math.isfinite(size):
            status = Status.NON_FINITE
            break
        for name, tensor in iterate.items():
            tensor.grad = gradient[name]
        optimiser.step()
        history.append(size)
        on_step(step + 1, {name: tensor.detach().clone() for name, tensor in iterate.items()})
    value = {name: tensor.detach().clone() for name, tensor in iterate.items()}
    if not math.isfinite(norm(value)):
        status = Status.NON_FINITE
    return Solution(
        value=value, status=status, num_steps=len(history), relative_residual=math.nan, history=tuple(history)
    )
