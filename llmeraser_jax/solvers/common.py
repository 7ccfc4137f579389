"""Shared by solvers: units, the true residual, extreme eigenvalues of a tridiagonal matrix."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.solvers.status import Status
from llmeraser_jax.types import LoraParams, Operator


def check_rtol(solver: Any) -> None:
    """Checks a solver's tolerance.

    Raises:
        ValueError: `rtol` is out of its range.
    """
    if not 0 <= solver.rtol < 1:
        msg = f"rtol is {solver.rtol}; it must be in [0, 1)."
        raise ValueError(msg)


def to_units(rhs: LoraParams) -> tuple[LoraParams, Float[Array, ""]]:
    """The right-hand side divided by its largest entry, and that entry, the unit.

    Squares of a huge or tiny right-hand side leave the range of float32; after scaling they do not. The unit is
    bounded, so that its reciprocal is a normal number; it is 1 for a zero or non-finite right-hand side.
    """
    unit = trees.tree_max_abs(rhs)
    # Devices flush the subnormal reciprocal of a larger unit to zero.
    bound = 0.5 / float(jnp.finfo(unit.dtype).tiny)
    unit = jnp.where(jnp.isfinite(unit) & (unit > 0), jnp.minimum(unit, bound), 1)
    return trees.tree_scale(1 / unit, rhs), unit


def from_units(x: LoraParams, unit: Float[Array, ""], status: Int[Array, ""]) -> tuple[LoraParams, Int[Array, ""]]:
    """`unit * x`, and the status: `NON_FINITE` where the solution leaves the range of its dtype."""
    value = trees.tree_scale(unit, x)
    overflows = trees.tree_all_finite(x) & ~trees.tree_all_finite(value)
    return value, jnp.where(overflows, Status.NON_FINITE, status).astype(jnp.int32)


def relative_to(residual: LoraParams, rhs_norm: Float[Array, ""]) -> Float[Array, ""]:
    """`||residual|| / rhs_norm`; 0 for a zero or non-finite `rhs_norm`, infinity where it overflows."""
    positive = jnp.isfinite(rhs_norm) & (rhs_norm > 0)
    ratio = trees.tree_norm(residual) / jnp.where(positive, rhs_norm, 1)
    return jnp.where(positive, jnp.where(jnp.isnan(ratio), jnp.inf, ratio), 0.0)


def true_relative_residual(operator: Operator, unit_rhs: LoraParams, x: LoraParams) -> Float[Array, ""]:
    """`||b - A x|| / ||b||` from the definition, at one product; `b` and `x` in the same units."""
    return relative_to(trees.tree_sub(unit_rhs, operator.mv(x)), trees.tree_norm(unit_rhs))


def effective_tolerance(rtol: float, dtype) -> float:
    """`rtol`, but at least the dtype's epsilon: rounding makes anything lower unreachable."""
    return max(rtol, float(jnp.finfo(dtype).eps))


def tridiagonal_extremes(
    diagonal: Float[Array, " n"], off_diagonal: Float[Array, " n"], used: Bool[Array, " n"]
) -> Float[Array, 2]:
    """Least and largest eigenvalue of the leading block of a symmetric tridiagonal matrix.

    Args:
        diagonal: the diagonal; read where `used`.
        off_diagonal: entry `i` couples `i` and `i + 1`; read where both are `used`.
        used: true for the leading rows that exist, false from there on.

    Returns:
        [least, largest]; nan where no row is used.
    """
    # Unused rows hold the first diagonal entry: a Rayleigh quotient of the used block lies between its extremes.
    diagonal = jnp.where(used, diagonal, diagonal[0])
    coupled = used[:-1] & used[1:]
    off = jnp.where(coupled, off_diagonal[:-1], 0)
    sound = used[0] & jnp.all(jnp.isfinite(diagonal)) & jnp.all(jnp.isfinite(off))
    matrix = jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)
    eigenvalues = jnp.linalg.eigvalsh(jnp.where(sound, matrix, jnp.eye(len(diagonal), dtype=matrix.dtype)))
    return jnp.where(sound, eigenvalues[jnp.array([0, -1])], jnp.nan)
