"""Linear solvers: operator and right-hand side in, `Solution` out. They never see data."""

from llmeraser_jax.solvers.cg import CGState, ConjugateGradients, python_while_loop
from llmeraser_jax.solvers.status import SolverError, Status, describe, is_failure, require_success

__all__ = [
    "CGState",
    "ConjugateGradients",
    "SolverError",
    "Status",
    "describe",
    "is_failure",
    "python_while_loop",
    "require_success",
]
