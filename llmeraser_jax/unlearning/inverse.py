"""The inverse-curvature product of a step: which matrix, from which examples, by which solver, at what cost.

A method states the matrix as a `CurvatureSpec` and passes the solver as the object it is. `InverseCurvature` makes
the operator at a point, asks the budget first, solves, and books what the solve took.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least, check_choice, check_positive
from llmeraser_jax.curvature import (
    CACHED_PRODUCT_COST,
    CURVATURES,
    Bfloat16Products,
    Damped,
    DatasetCurvature,
    EkFac,
    block_mean_eigenvalues,
    damping_product,
    ekfac,
    example_factors,
    factored_curvature,
    largest_term_eigenvalue,
    linearise,
    load_ekfac,
    mean_eigenvalue,
    product_asymmetry,
    relative_damping,
    save_ekfac,
    streamed_operator,
)
from llmeraser_jax.losses import example_places
from llmeraser_jax.parallel import from_primary
from llmeraser_jax.solvers import (
    ConjugateGradients,
    Minres,
    Refined,
    Resumable,
    SpectralPreconditioner,
    factored_preconditioner,
    inner_tolerance,
)
from llmeraser_jax.types import ExampleStack, LoraParams, Operator, Preconditioner, PyTree, Solution, Solver
from llmeraser_jax.unlearning.budget import BACKWARD, FORWARD, Budget
from llmeraser_jax.unlearning.problem import Weighted
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import Workspace

logger = logging.getLogger(__name__)

DEFAULT_SAMPLE = 64
_EIGENVALUE_PROBES = 4  # products behind a relative damping
_LEAST_DAMPING = 1e-5  # memorised data shrink eigenvalues; a relative damping stays above this
_TERMS, _PRODUCTS = 4, 5  # behind the step size of stochastic solvers


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvatureSpec:
    """The matrix of a step.

    Attributes:
        kind: `gauss-newton` (positive semidefinite), `hessian` (indefinite on a tuned network), `empirical-fisher`,
            or `auto`: the Hessian until a solve meets non-positive curvature, Gauss-Newton from then on.
        data: examples behind it: `sample` (forget rows and a sample of retained ones, redrawn at every step of a
            path), `all`, or `retained` (all retained rows, without the forget rows).
        sample_size: retained rows in the sample; None starts with 64 and takes more where the step's standard error
            is too large.
        max_standard_error: the sample grows until the first step's standard error over its norm is at most this;
            inf never grows it.
        damping: rho, added besides the L2 term's lambda; with another `damping_kind` a factor.
        damping_kind: `constant`; or `damping` times the mean eigenvalue (`mean-eigenvalue`), or times that of each
            LoRA matrix of each layer (`per-matrix`), both estimated with 4 products and at least 1e-5.
        memory_budget_bytes: what a solve may keep to save the primal pass of every product; 0 recomputes always.
            Results do not change.
        matmul_precision: `bfloat16` uses bfloat16 matmul inputs with float32 accumulation in products; residuals
            stay in float32 and are solved for again until they meet the solver's tolerance.
        stream: copy examples to the device one micro-batch at a time and save the state of every solve, so that a
            method that was killed goes on where it was.
    """

    kind: Literal["gauss-newton", "hessian", "empirical-fisher", "auto"] = "gauss-newton"
    data: Literal["sample", "all", "retained"] = "sample"
    sample_size: int | None = None
    max_standard_error: float = 0.2
    damping: float = 7e-3
    damping_kind: Literal["constant", "mean-eigenvalue", "per-matrix"] = "constant"
    memory_budget_bytes: int = 2**30
    matmul_precision: Literal["float32", "bfloat16"] = "float32"
    stream: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "kind", (*CURVATURES, "auto"))
        check_choice(self, "data", ("sample", "all", "retained"))
        check_choice(self, "damping_kind", ("constant", "mean-eigenvalue", "per-matrix"))
        check_choice(self, "matmul_precision", ("float32", "bfloat16"))
        check_at_least(self, sample_size=1, damping=0, memory_budget_bytes=0)
        check_positive(self, "max_standard_error")
        if self.data != "sample" and self.sample_size is not None:
            msg = f"sample_size is {self.sample_size}, and data {self.data!r}: only data 'sample' draws one."
            raise ValueError(msg)
        if self.stream and (self.damping_kind != "constant" or self.matmul_precision != "float32"):
            msg = (
                "stream goes with damping_kind 'constant' and matmul_precision 'float32'; got "
                f"{self.damping_kind!r} and {self.matmul_precision!r}."
            )
            raise ValueError(msg)

    @property
    def without_forget_rows(self) -> bool:
        """Whether the curvature leaves the forget rows and their replacements out."""
        return self.data == "retained"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPreconditioner:
    """Inverts a Gauss-Newton matrix estimated from random rows of each example exactly.

    Takes a third to a half of conjugate gradients' products (`experiments/preconditioners`).

    Attributes:
        num_roots: random rows per example; fewer than 8 are too noisy to help.
    """

    num_roots: int = 8

    def __post_init__(self) -> None:
        check_at_least(self, num_roots=1)

    @property
    def gradient_equivalents(self) -> float:
        """Cost of making it, per example."""
        return FORWARD + self.num_roots * BACKWARD


@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerPreconditioner:
    """Kronecker factors with corrected eigenvalues (EK-FAC) of the Gauss-Newton matrix, for single steps.

    The factors belong to the adapter. One conjugate-gradient step with them is their direction at its best length.

    Attributes:
        num_roots: random rows per example.
        directory: factors are read from there, or made and saved there; None makes them anew.
    """

    num_roots: int = 1
    directory: Path | None = None

    def __post_init__(self) -> None:
        check_at_least(self, num_roots=1)

    @property
    def gradient_equivalents(self) -> float:
        """Cost of making the factors, per example: one pass for bases, one for eigenvalues."""
        return 2 * (FORWARD + self.num_roots * BACKWARD)


@partial(jax.jit, static_argnames="solver")
def _solve(solver: Solver, operator: Operator, rhs: LoraParams) -> Solution:
    return solver.solve(operator, rhs)


@partial(jax.jit, static_argnames="solver")
def _solve_preconditioned(
    solver: ConjugateGradients, operator: Operator, rhs: LoraParams, preconditioner: Preconditioner
) -> Solution:
    return solver.solve(operator, rhs, preconditioner)


@partial(jax.jit, static_argnames="num_roots")
def _make_row_preconditioner(objective, params, stack, key, damping, num_roots: int) -> SpectralPreconditioner:
    curvature = factored_curvature(objective, params, stack, key, damping=damping, num_roots=num_roots)
    return factored_preconditioner(curvature)


@partial(jax.jit, static_argnames="num_roots")
def make_ekfac(objective, params, stack, basis_key, eigenvalue_key, damping, num_roots: int) -> EkFac:
    """EK-FAC in the eigenbasis of `example_factors`, as one program."""
    factors = example_factors(objective, params, stack, basis_key, num_roots=num_roots)
    return ekfac(objective, params, stack, eigenvalue_key, factors=factors, damping=damping, num_roots=num_roots)


_mean_eigenvalue = jax.jit(mean_eigenvalue, static_argnames="num_probes")
_matrix_eigenvalues = jax.jit(block_mean_eigenvalues, static_argnames="num_probes")
_largest_term_eigenvalue = jax.jit(largest_term_eigenvalue, static_argnames=("num_terms", "num_products"))
_asymmetry = jax.jit(product_asymmetry)


def measure_asymmetry(operator: Operator, like: LoraParams, *, seed: int, jitted: bool = True) -> float:
    """`|u'Av - v'Au| / (||u|| ||Av||)` for random u and v; costs two products."""
    rng = np.random.default_rng(seed)
    u, v = (jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), like) for _ in range(2))
    return float((_asymmetry if jitted else product_asymmetry)(operator, u, v))


class InverseCurvature:
    """`(sum_i c_i C(z_i) + rho I)^-1` as a specification and a solver say; counts what it computes.

    Attributes:
        spec: which matrix.
        solver: how to solve with it.
        kind: the curvature in use; with `auto` the Hessian until a solve has met non-positive curvature.
        sample_size: retained rows in a sample.
        asymmetry: of the first operator; nan before.
    """

    def __init__(self, task: UnlearningTask, workspace: Workspace, spec: CurvatureSpec, solver: Solver):
        check_solver(spec, solver)
        self.task, self.workspace, self.spec, self.solver = task, workspace, spec, solver
        self.objective = task.objective
        self.kind = "hessian" if spec.kind == "auto" else spec.kind
        self.sample_size = DEFAULT_SAMPLE if spec.sample_size is None else spec.sample_size
        self.asymmetry = math.nan
        self._fell_back = ""
        self._rhos = self._stated_damping()
        self._num_solves = 0

    @property
    def sample(self) -> int | None:
        """Retained rows behind the curvature: None for all of them."""
        return self.sample_size if self.spec.data == "sample" else None

    @property
    def num_sampled(self) -> int:
        """The same as a number."""
        retained = len(self.task.problem.retained)
        return retained if self.sample is None else min(self.sample, retained)

    @property
    def reason(self) -> str:
        """Which curvature it is and why."""
        if self.spec.kind != "auto":
            return f"{self.kind}: as asked for"
        if self._fell_back:
            return f"gauss-newton: {self._fell_back}"
        return "hessian: no solve met non-positive curvature on the Krylov space that it explored"

    def aside(self) -> InverseCurvature:
        """A copy whose solves are not the method's: with a budget, a count and an asymmetry of its own."""
        other = copy.copy(self)
        other.workspace = dataclasses.replace(self.workspace, budget=Budget())
        return other

    def with_fewer_steps(self) -> None:
        """Solves take one step fewer from here on."""
        solver: Any = self.solver
        self.solver = dataclasses.replace(solver, max_steps=solver.max_steps - 1)

    def _stated_damping(self) -> PyTree:
        """rho where no measurement enters it, else None."""
        return self.spec.damping if self.spec.damping_kind == "constant" else None

    def _damping(self, operator: DatasetCurvature) -> PyTree:
        """rho: one number, or one for each LoRA matrix; relative ones are measured at the first solve of a kind."""
        if self._rhos is None:
            price = _EIGENVALUE_PROBES * CURVATURES[self.kind].gradient_equivalents
            self.workspace.budget.spend("curvature", price * len(example_places(operator.stack)))
            by_matrix = self.spec.damping_kind == "per-matrix"
            estimate = _matrix_eigenvalues if by_matrix else _mean_eigenvalue
            key = jax.random.key(self.workspace.seed)
            means = estimate(operator, key, operator.params, num_probes=_EIGENVALUE_PROBES)
            self._rhos = relative_damping(means, self.spec.damping, floor=_LEAST_DAMPING)
        return self._rhos

    def damping_energy(self, delta: LoraParams) -> float:
        """`delta' D delta` with the damping matrix D; after the first solve."""
        return float(trees.tree_vdot(delta, damping_product(self._rhos, delta)))

    @property
    def least_damping(self) -> float:
        """The smallest rho of any block; after the first solve."""
        return min(float(jnp.min(rho)) for rho in jax.tree.leaves(self._rhos))

    def solve(self, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        """`(sum_i c_i C(z_i) + rho I)^-1 rhs`.

        With kind `auto` a Hessian solve that meets non-positive curvature is thrown away, paid for, and repeated
        with Gauss-Newton, which stays from then on.

        Raises:
            BudgetSpent: the budget has no room for it.
        """
        self._num_solves += 1
        solve = self._solve_by_terms if draws_terms(self.solver) else self._solve_whole
        solution = solve(params, weighted, rhs)
        if self.spec.kind == "auto" and self.kind == "hessian" and bool(solution.negative_curvature):
            self.kind = "gauss-newton"
            self._rhos = self._stated_damping()
            self._fell_back = f"solve {self._num_solves} met non-positive curvature of the damped Hessian"
            logger.info("Gauss-Newton from here on: %s.", self._fell_back)
            return self.solve(params, weighted, rhs)
        return solution

    def largest_cost(self, num_examples: int) -> float:
        """Gradient equivalents of a solve over so many examples that takes all of its iterations.

        Products are taken as cached where a memory budget is given; a solve that finds no room to cache asks for
        more. What measures a relative damping is left out.
        """
        kind, solver = CURVATURES[self.kind], self.solver
        if draws_terms(solver):
            return self._terms_cost + self._rate_cost
        cost = self._largest_products * (CACHED_PRODUCT_COST if self._caches else kind.gradient_equivalents)
        cost += kind.linearise_gradient_equivalents if self._caches else 0.0
        preconditioner = preconditioner_of(solver)
        cost += 0.0 if preconditioner is None else preconditioner.gradient_equivalents
        return cost * num_examples

    @property
    def _caches(self) -> bool:
        kronecker = isinstance(preconditioner_of(self.solver), KroneckerPreconditioner)
        return self.spec.memory_budget_bytes > 0 and not self.spec.stream and not kronecker

    @property
    def _largest_products(self) -> int:
        """Products of a solve that takes all of its iterations, its residuals among them."""
        solver = self._refined() if self.spec.matmul_precision == "bfloat16" else self.solver
        return solver.max_products

    def _refined(self, noise: float = 0.0) -> Refined:
        """The solver with bfloat16 products, of the whole to its tolerance, of them to no less than their noise."""
        solver: Any = self.solver
        inner = dataclasses.replace(solver, rtol=max(inner_tolerance(solver.rtol), noise))
        return Refined(solver=inner, approximation=Bfloat16Products, rtol=solver.rtol)

    @property
    def _terms_cost(self) -> float:
        """Mini-batch products. The residual, which the methods they are of do not look at, is a diagnostic."""
        solver: Any = self.solver
        return CURVATURES[self.kind].gradient_equivalents * solver.max_products * solver.batch_size

    @property
    def _rate_cost(self) -> float:
        """Products that estimate a step size."""
        solver: Any = self.solver
        if not solver.needs_eigenvalue:
            return 0.0
        return _TERMS * _PRODUCTS * CURVATURES[self.kind].gradient_equivalents * solver.batch_size

    def _solve_whole(self, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        """By products with all examples."""
        solver: Any = self.solver
        spec, kind, budget = self.spec, CURVATURES[self.kind], self.workspace.budget
        count = len(weighted.indices)
        if spec.stream:
            per_product = kind.gradient_equivalents
            budget.reserve(self._largest_products * per_product * count)
            solution = self._solve_streamed(solver, params, weighted, rhs)
        else:
            plain = DatasetCurvature(
                self.objective, params, self.workspace.stack(self.task.problem.examples, weighted), kind
            )
            rhos = self._damping(plain)
            preconditioner = self._make_preconditioner(params, plain.stack, weighted)
            operator = linearise(plain, spec.memory_budget_bytes if self._caches else 0)
            budget.spend("curvature", operator.setup_cost * count)
            per_product = operator.product_cost
            budget.reserve(self._largest_products * per_product * count)
            damped = Damped(operator, rhos)
            in_bfloat16 = spec.matmul_precision == "bfloat16"
            self._look_at_symmetry(Bfloat16Products(damped) if in_bfloat16 else damped, rhs, per_product * count)
            if in_bfloat16:
                solver = self._refined(self.asymmetry)
            if preconditioner is not None:
                solution = _solve_preconditioned(solver, damped, rhs, preconditioner)
            else:
                solution = _solve(solver, damped, rhs)
        budget.spend("curvature", int(solution.num_products) * per_product * count)
        return solution

    def _make_preconditioner(
        self, params: LoraParams, stack: ExampleStack, weighted: Weighted
    ) -> Preconditioner | None:
        wanted, count, seed = preconditioner_of(self.solver), len(weighted.indices), self.workspace.seed
        if wanted is None:
            return None
        if isinstance(wanted, RowPreconditioner):
            self.workspace.budget.spend("curvature", wanted.gradient_equivalents * count)
            key = jax.random.fold_in(jax.random.key(seed), self._num_solves)
            return _make_row_preconditioner(self.objective, params, stack, key, self.spec.damping, wanted.num_roots)
        mu = self.spec.damping + self.objective.l2 * float(weighted.weights.sum())
        path = wanted.directory
        if path is not None and from_primary(path.exists):
            return load_ekfac(path, params, stack, mu=mu)
        self.workspace.budget.spend("curvature", wanted.gradient_equivalents * count)
        keys = jax.random.split(jax.random.key(seed))
        factors = make_ekfac(self.objective, params, stack, *keys, self.spec.damping, wanted.num_roots)
        if path is not None:
            save_ekfac(path, factors, params, stack)
        return factors

    def _solve_streamed(
        self, solver: ConjugateGradients, params: LoraParams, weighted: Weighted, rhs: LoraParams
    ) -> Solution:
        """The solve with one micro-batch at a time on the device, its state saved as it goes."""
        workspace, objective, kind = self.workspace, self.objective, CURVATURES[self.kind]
        if workspace.directory is None:
            msg = "stream is set, but the workspace has no directory to save the solve's state in."
            raise ValueError(msg)
        stack = self.task.problem.examples.stack(
            weighted.indices, weighted.weights, chunk_size=workspace.chunk_size
        )
        operator = streamed_operator(objective, params, stack, kind, damping=self.spec.damping, mesh=workspace.mesh)
        self._look_at_symmetry(operator, rhs, kind.gradient_equivalents * len(weighted.indices), jitted=False)
        resumable = Resumable(
            solver=solver,
            directory=workspace.directory / f"solve_{self._num_solves}",
            description=f"{self.kind} {self.spec} {workspace.seed} {workspace.chunk_size}",
        )
        return resumable.solve(operator, rhs)

    def _look_at_symmetry(
        self, operator: Operator, like: LoraParams, product_cost: float, *, jitted: bool = True
    ) -> None:
        """Measures the first operator's asymmetry; its two products count as diagnostics."""
        if math.isnan(self.asymmetry):
            self.asymmetry = measure_asymmetry(operator, like, seed=self.workspace.seed, jitted=jitted)
            self.workspace.budget.spend("diagnostics", 2 * product_cost)

    def _solve_by_terms(self, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        """By products with mini-batches of the examples."""
        solver: Any = self.solver
        kind, budget, workspace = CURVATURES[self.kind], self.workspace.budget, self.workspace
        stack = workspace.stack(self.task.problem.examples, weighted, chunk_size=solver.batch_size)
        plain = DatasetCurvature(self.objective, params, stack, kind)
        operator = Damped(plain, self._damping(plain))
        budget.reserve(self._rate_cost + self._terms_cost)
        budget.spend("curvature", self._rate_cost)
        if solver.needs_eigenvalue:
            key = jax.random.key(workspace.seed)
            largest = float(_largest_term_eigenvalue(operator, key, rhs, num_terms=_TERMS, num_products=_PRODUCTS))
            solver = solver.for_eigenvalue(largest)
        if solver.seed is not None:
            solver = dataclasses.replace(solver, seed=(solver.seed + workspace.seed) % 2**32)
        budget.spend("curvature", self._terms_cost)
        solution = _solve(solver, operator, rhs)
        budget.spend("diagnostics", kind.gradient_equivalents * len(weighted.indices))
        return solution


def draws_terms(solver: Solver) -> bool:
    """Whether a solver multiplies by mini-batches of `batch_size` examples."""
    return hasattr(solver, "batch_size")


def check_solver(spec: CurvatureSpec, solver: Solver) -> None:
    """Refuses a solver that does not go with a curvature.

    Raises:
        ValueError: what does not go together.
    """
    preconditioner = preconditioner_of(solver)
    if preconditioner is not None and (
        spec.kind != "gauss-newton"
        or spec.stream
        or spec.damping_kind != "constant"
        or spec.matmul_precision != "float32"
    ):
        msg = (
            "A preconditioner goes with kind 'gauss-newton', damping_kind 'constant', matmul_precision "
            f"'float32' and no stream; got {spec.kind!r}, {spec.damping_kind!r}, {spec.matmul_precision!r}, "
            f"stream {spec.stream}."
        )
        raise ValueError(msg)
    if spec.stream and not isinstance(solver, ConjugateGradients):
        msg = f"stream goes with ConjugateGradients; the solver is {type(solver).__name__}."
        raise ValueError(msg)
    if spec.matmul_precision == "bfloat16" and not isinstance(solver, ConjugateGradients | Minres):
        msg = (
            "matmul_precision 'bfloat16' goes with ConjugateGradients or Minres; the solver is "
            f"{type(solver).__name__}."
        )
        raise ValueError(msg)


def check_moves(solver: Solver) -> None:
    """Refuses what is kept for one adapter, in a method that solves at several.

    Raises:
        ValueError: Kronecker factors with a directory.
    """
    preconditioner = preconditioner_of(solver)
    if isinstance(preconditioner, KroneckerPreconditioner) and preconditioner.directory is not None:
        msg = (
            f"The preconditioner is {preconditioner}; its directory keeps factors of one adapter, which serve Step "
            "alone. Leave it out."
        )
        raise ValueError(msg)


def preconditioner_of(solver: Solver) -> RowPreconditioner | KroneckerPreconditioner | None:
    """What conjugate gradients state; None of other solvers."""
    return solver.preconditioner if isinstance(solver, ConjugateGradients) else None


def half_samples(weighted: Weighted, sampled: np.ndarray) -> tuple[Weighted, Weighted]:
    """Two halves of a sample that stand for the whole of it, each beside everything else.

    Args:
        weighted: a curvature's examples.
        sampled: places in it of the sample's rows, at least two.

    Returns:
        The same examples with other coefficients, so that the programs are those of the whole sample.
    """
    halves = []
    for chosen, other in ((sampled[::2], sampled[1::2]), (sampled[1::2], sampled[::2])):
        weights = weighted.weights.copy()
        weights[chosen] *= len(sampled) / len(chosen)
        weights[other] = 0.0
        halves.append(Weighted(weighted.indices, weights))
    return halves[0], halves[1]
