"""How a solve ended, as a value inside jit and in words at the Python boundary."""

from __future__ import annotations

from enum import IntEnum
from typing import SupportsInt


class Status(IntEnum):
    """Why the loop of a solver stopped."""

    CONVERGED = 0
    MAX_STEPS = 1
    NEGATIVE_CURVATURE = 2
    NEGATIVE_CURVATURE_AT_START = 3
    ZERO_RHS = 4
    NON_FINITE = 5
    RESIDUAL_DRIFT = 6
    DIVERGED = 7
    INDEFINITE_PRECONDITIONER = 8
    LEAST_SQUARES = 9


_WORDS = {
    Status.CONVERGED: "converged: the residual fell below the tolerance",
    Status.MAX_STEPS: "not converged: max_steps reached before the residual fell below the tolerance",
    Status.NEGATIVE_CURVATURE: (
        "not converged: stopped at a direction of non-positive curvature, with the iterate reached so far"
    ),
    Status.NEGATIVE_CURVATURE_AT_START: (
        "failed: the right-hand side itself is a direction of non-positive curvature, so there is no step; "
        "raise the damping or use gauss-newton"
    ),
    Status.RESIDUAL_DRIFT: (
        "not converged: by the solver's own account the residual is below the tolerance, but the true residual is "
        "not, which rounding or an asymmetric product causes"
    ),
    Status.ZERO_RHS: "failed: the right-hand side is zero, so there is nothing to solve",
    Status.NON_FINITE: "failed: a product, the right-hand side or the solution was not finite",
    Status.DIVERGED: (
        "failed: the iteration diverged; lower the learning rate, raise the scale or the damping, "
        "or use conjugate gradients"
    ),
    Status.INDEFINITE_PRECONDITIONER: (
        "failed: the preconditioner is not positive definite; damp it, or solve without one"
    ),
    Status.LEAST_SQUARES: (
        "not converged: no exact solution exists; stopped at a least-squares solution, whose residual the "
        "operator maps to zero"
    ),
}

_FAILURES = frozenset(
    {
        Status.NEGATIVE_CURVATURE_AT_START,
        Status.ZERO_RHS,
        Status.NON_FINITE,
        Status.DIVERGED,
        Status.INDEFINITE_PRECONDITIONER,
    }
)


def describe(status: SupportsInt) -> str:
    """The status in words."""
    return _WORDS[Status(int(status))]


def is_failure(status: SupportsInt) -> bool:
    """True where the solution must not be used: no step, or one that is not to be trusted."""
    return Status(int(status)) in _FAILURES
