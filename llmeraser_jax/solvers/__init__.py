"""Linear solvers: operator and right-hand side in, `Solution` out. They never see data."""

from collections.abc import Mapping
from types import MappingProxyType

from llmeraser_jax.solvers.block_cg import BlockConjugateGradients, BlockSolution
from llmeraser_jax.solvers.cg import CGState, ConjugateGradients, python_while_loop
from llmeraser_jax.solvers.direct import DirectInverse
from llmeraser_jax.solvers.lissa import Lissa
from llmeraser_jax.solvers.minres import Minres
from llmeraser_jax.solvers.quadratic import QuadraticDescent
from llmeraser_jax.solvers.reference_compat import ReferenceCompat
from llmeraser_jax.solvers.refinement import MAX_CORRECTIONS, inner_tolerance, solve_refined
from llmeraser_jax.solvers.spectral import SpectralPreconditioner, factored_preconditioner, nystroem_preconditioner
from llmeraser_jax.solvers.status import SolverError, Status, describe, is_failure, require_success
from llmeraser_jax.solvers.streamed import StreamedOperator, solve_streamed

# `block-cg` takes right-hand sides with a leading axis; the last three need a `types.FiniteSum`.
SOLVERS: Mapping[str, type] = MappingProxyType(
    {
        "cg": ConjugateGradients,
        "block-cg": BlockConjugateGradients,
        "minres": Minres,
        "quadratic": QuadraticDescent,
        "reference-compat": ReferenceCompat,
        "lissa": Lissa,
    }
)

__all__ = [
    "MAX_CORRECTIONS",
    "SOLVERS",
    "BlockConjugateGradients",
    "BlockSolution",
    "CGState",
    "ConjugateGradients",
    "DirectInverse",
    "Lissa",
    "Minres",
    "QuadraticDescent",
    "ReferenceCompat",
    "SolverError",
    "SpectralPreconditioner",
    "Status",
    "StreamedOperator",
    "describe",
    "factored_preconditioner",
    "inner_tolerance",
    "is_failure",
    "nystroem_preconditioner",
    "python_while_loop",
    "require_success",
    "solve_refined",
    "solve_streamed",
]
