"""Linear solvers: `solver.solve(operator, rhs) -> Solution`. A solver is hyper-parameters and never sees data."""

from llmeraser_jax.solvers.block_cg import BlockConjugateGradients, BlockSolution
from llmeraser_jax.solvers.cg import CGState, ConjugateGradients, python_while_loop
from llmeraser_jax.solvers.direct import DirectInverse
from llmeraser_jax.solvers.lissa import Lissa
from llmeraser_jax.solvers.minres import Minres
from llmeraser_jax.solvers.quadratic import QuadraticDescent
from llmeraser_jax.solvers.reference_compat import ReferenceCompat
from llmeraser_jax.solvers.refinement import MAX_CORRECTIONS, Refined, RefinedSolution, inner_tolerance
from llmeraser_jax.solvers.resumable import Resumable
from llmeraser_jax.solvers.spectral import SpectralPreconditioner, factored_preconditioner, nystroem_preconditioner
from llmeraser_jax.solvers.status import Status, describe, is_failure

__all__ = [
    "MAX_CORRECTIONS",
    "BlockConjugateGradients",
    "BlockSolution",
    "CGState",
    "ConjugateGradients",
    "DirectInverse",
    "Lissa",
    "Minres",
    "QuadraticDescent",
    "ReferenceCompat",
    "Refined",
    "RefinedSolution",
    "Resumable",
    "SpectralPreconditioner",
    "Status",
    "describe",
    "factored_preconditioner",
    "inner_tolerance",
    "is_failure",
    "nystroem_preconditioner",
    "python_while_loop",
]
