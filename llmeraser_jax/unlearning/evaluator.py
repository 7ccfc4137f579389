"""An objective with its data and configuration, as a thing that answers: gradients, operators, solves, losses."""

from __future__ import annotations

import dataclasses
import logging
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmeraser_jax import trees
from llmeraser_jax.curvature import (
    CACHED_PRODUCT_COST,
    CURVATURES,
    Bfloat16Products,
    Damped,
    DatasetCurvature,
    block_mean_eigenvalues,
    damping_product,
    largest_term_eigenvalue,
    linearise,
    mean_eigenvalue,
    product_asymmetry,
    relative_damping,
    streamed_operator,
)
from llmeraser_jax.curvature.factor import factored_curvature
from llmeraser_jax.curvature.kfac import EkFac, ekfac, example_factors, load_ekfac, save_ekfac
from llmeraser_jax.losses import Objective, gradient_sum, real_rows, stacking_order
from llmeraser_jax.parallel import place_stack, to_host
from llmeraser_jax.solvers import (
    MAX_CORRECTIONS,
    ConjugateGradients,
    Lissa,
    Minres,
    QuadraticDescent,
    ReferenceCompat,
    Refined,
    Resumable,
    SpectralPreconditioner,
    factored_preconditioner,
    inner_tolerance,
)
from llmeraser_jax.types import (
    ExampleSet,
    ExampleStack,
    LoraParams,
    Operator,
    Preconditioner,
    PyTree,
    Solution,
    Solver,
)
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.cost import BACKWARD, FORWARD, CostMeter
from llmeraser_jax.unlearning.problem import EditProblem, Weighted

logger = logging.getLogger(__name__)

_EIGENVALUE_PROBES = 4  # products behind a relative damping
_LEAST_DAMPING = 1e-5  # memorised data shrink eigenvalues; a relative damping stays above this
_TERMS, _PRODUCTS = 4, 5  # behind the step size of stochastic solvers
_PRECONDITIONER_ROOTS = 8  # fewer are too noisy to help, see experiments/preconditioners
_LISSA_MARGIN = 1.5  # of LiSSA's scale over the eigenvalue estimated, which is a lower one


@partial(jax.jit, static_argnames="solver")
def _solve(solver: Solver, operator: Operator, rhs: LoraParams) -> Solution:
    return solver.solve(operator, rhs)


@partial(jax.jit, static_argnames="solver")
def _solve_preconditioned(
    solver: ConjugateGradients, operator: Operator, rhs: LoraParams, preconditioner: Preconditioner
) -> Solution:
    return solver.solve(operator, rhs, preconditioner)


@partial(jax.jit, static_argnames=("solver", "rtol"))
def _solve_with_narrow_products(
    solver: ConjugateGradients | Minres, operator: Operator, rhs: LoraParams, rtol: float
) -> tuple[Solution, jax.Array]:
    solution = Refined(solver=solver, approximation=Bfloat16Products, rtol=rtol).solve(operator, rhs)
    return solution, solution.num_exact_products


@partial(jax.jit, static_argnames="num_roots")
def _make_factored(objective, params, stack, key, damping, num_roots: int) -> SpectralPreconditioner:
    curvature = factored_curvature(objective, params, stack, key, damping=damping, num_roots=num_roots)
    return factored_preconditioner(curvature)


@partial(jax.jit, static_argnames="num_roots")
def _make_ekfac(objective, params, stack, basis_key, eigenvalue_key, damping, num_roots: int) -> EkFac:
    factors = example_factors(objective, params, stack, basis_key, num_roots=num_roots)
    return ekfac(objective, params, stack, eigenvalue_key, factors=factors, damping=damping, num_roots=num_roots)


@partial(jax.jit, static_argnames="num_probes")
def _mean_eigenvalue(operator: Operator, key, like: LoraParams, num_probes: int):
    return mean_eigenvalue(operator, key, like, num_probes)


@partial(jax.jit, static_argnames="num_probes")
def _matrix_eigenvalues(operator: Operator, key, like: LoraParams, num_probes: int):
    return block_mean_eigenvalues(operator, key, like, num_probes)


_largest_term_eigenvalue = jax.jit(largest_term_eigenvalue, static_argnames=("num_terms", "num_products"))
_asymmetry = jax.jit(product_asymmetry)
# A program of its own: inside of another, XLA draws again in every operation that reads a leaf.
_random_normal = jax.jit(trees.tree_random_normal)


@jax.jit
def losses_by_bucket(objective: Objective, params: LoraParams, stack: ExampleStack):
    return tuple(jax.lax.map(partial(objective.data_losses, params), batches) for batches in stack.batches)


@jax.jit
def _losses_and_log_odds(objective: Objective, params: LoraParams, stack: ExampleStack):
    def of_batch(batch):
        outputs = objective.outputs(params, batch)
        return objective.output_loss_fn(outputs, batch), objective.output_log_odds(outputs, batch)

    return tuple(jax.lax.map(of_batch, batches) for batches in stack.batches)


@jax.jit
def _token_losses(objective: Objective, params: LoraParams, stack: ExampleStack):
    token_losses = objective.token_losses_fn
    assert token_losses is not None  # asked for objectives of tokens only

    def of_batch(batch, token_losses=token_losses):
        return token_losses(objective.outputs(params, batch), batch)

    return tuple(jax.lax.map(of_batch, batches) for batches in stack.batches)


class RowValues(NamedTuple):
    """Of some rows in the order asked for: data losses, and their log-odds `log(exp(l) - 1)`."""

    losses: np.ndarray
    log_odds: np.ndarray


class Evaluator:
    """An objective, its data and a mesh: turns coefficient vectors into gradients, operators and losses.

    Host-side; counts what it computes. Stacks are laid out once per set of indices and reweighted afterwards.
    """

    def __init__(
        self,
        objective: Objective,
        problem: EditProblem,
        config: EraseConfig,
        mesh: Mesh | None = None,
        *,
        cost: CostMeter | None = None,
        checkpoint_directory: Path | None = None,
        factors_directory: Path | None = None,
    ):
        self.objective = objective
        self.problem = problem
        self.config = config
        self.mesh = mesh
        self.cost = CostMeter() if cost is None else cost
        self.asymmetry = math.nan  # of the first operator that was solved with
        self._kind = "hessian" if config.curvature == "auto" else config.curvature
        self._fell_back = ""
        self._rhos = self._stated_damping()
        self._num_solves = 0
        self._sample_factor = 1
        self._checkpoint_directory = checkpoint_directory
        self._factors_directory = factors_directory

    @property
    def sample_size(self) -> int:
        """Examples in a sample of the retained ones."""
        if self.config.sample_size is not None:
            return self.config.sample_size
        if self.config.method in ("path", "step"):
            return 64 * self._sample_factor
        return int(np.clip(len(self.problem.named), 96, 256))

    def grow_sample(self, factor: int) -> None:
        """Multiplies the default sample of step and path from here on."""
        self._sample_factor *= factor

    @property
    def repair_size(self) -> int:
        """Retained rows that each repair of a matched move draws."""
        if self.config.repair_size is not None:
            return self.config.repair_size
        return int(np.clip(len(self.problem.named), 128, 256))

    @property
    def curvature_sample(self) -> int | None:
        """The same for the curvature: None where all examples are asked for."""
        return self.sample_size if self.config.curvature_data == "sample" else None

    @property
    def without_named(self) -> bool:
        """Whether steps look at the retained rows alone, in their curvature and in the trust region."""
        return self.config.curvature_data == "retained"

    @property
    def num_sampled(self) -> int:
        """Retained examples behind the curvature."""
        retained = len(self.problem.retained)
        return retained if self.curvature_sample is None else min(self.curvature_sample, retained)

    @property
    def num_steps(self) -> int:
        """K."""
        return self.config.num_steps or {"step": 1, "path": 8}.get(self.config.method, 4)

    def example_losses(self, params: LoraParams, stack: ExampleStack) -> np.ndarray:
        """Data loss of every example of a stack, in stacking order; counted as a check.

        Raises:
            BudgetSpent: it cannot be paid; nothing was computed.
        """
        keep = real_rows(stack)
        self.cost.spend("trust_region", FORWARD * int(keep.sum()))
        losses = to_host(losses_by_bucket(self.objective, params, stack))
        return np.concatenate([l.astype(np.float64).reshape(-1) for l in losses])[keep]

    def row_values(self, params: LoraParams, examples: ExampleSet, indices: np.ndarray) -> RowValues:
        """Losses and log-odds of some examples, in the order of `indices`; the caller books the cost."""
        if len(indices) == 0:
            return RowValues(np.zeros(0), np.zeros(0))
        stack = self.place(examples, Weighted(indices, np.ones(len(indices))))
        back = np.argsort(stacking_order(examples, indices))
        return RowValues(*(values[back] for values in self.stack_values(params, stack)))

    def stack_values(self, params: LoraParams, stack: ExampleStack) -> RowValues:
        """Losses and log-odds of the examples of a stack, in stacking order; the caller books the cost."""
        found, keep = to_host(_losses_and_log_odds(self.objective, params, stack)), real_rows(stack)
        return RowValues(
            *(
                np.concatenate([part.astype(np.float64).reshape(-1) for part in parts])[keep]
                for parts in zip(*found, strict=True)
            )
        )

    def token_values(self, params: LoraParams, indices: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids and losses of the response tokens of some of the problem's examples, in the order asked for."""
        examples = self.problem.examples
        stack = self.place(examples, Weighted(indices, np.ones(len(indices))))
        rows = []
        found = to_host(_token_losses(self.objective, params, stack))
        for batch, losses in zip(stack.batches, found, strict=True):
            tokens, width = to_host(batch.targets), losses.shape[-1]
            losses = losses.reshape(-1, width).astype(np.float64)
            rows += list(zip(tokens.reshape(-1, width), losses, strict=True))
        rows = [row for row, real in zip(rows, real_rows(stack), strict=True) if real]
        ordered = [(np.zeros(0, np.int64), np.zeros(0))] * len(indices)
        for place, (tokens, losses) in zip(stacking_order(examples, indices), rows, strict=True):
            there = ~np.isnan(losses)
            ordered[place] = (tokens[there], losses[there])
        return ordered

    def stack(self, weighted: Weighted) -> ExampleStack:
        """The problem's examples on the device(s), in micro-batches."""
        return self.place(self.problem.examples, weighted)

    def place(self, examples: ExampleSet, weighted: Weighted) -> ExampleStack:
        """Examples of any set on the device(s), in micro-batches."""
        stack = examples.stack(weighted.indices, weighted.weights, chunk_size=self.config.chunk_size)
        return place_stack(stack, self.mesh)

    def gradient(self, params: LoraParams, weighted: Weighted) -> LoraParams:
        """`sum_i c_i grad l_i`."""
        return gradient_sum(self.objective, params, self.stack(weighted))

    @property
    def kind(self) -> str:
        """Which curvature; with `auto`, the Hessian until a solve has met non-positive curvature."""
        return self._kind

    @property
    def curvature_reason(self) -> str:
        """Why it is that one."""
        if self.config.method == "matched":
            return "gauss-newton: the matched way factors it"
        if self.config.curvature != "auto":
            return f"{self.kind}: as asked for"
        if self._fell_back:
            return f"gauss-newton: {self._fell_back}"
        return "hessian: no solve met non-positive curvature on the Krylov space that it explored"

    def _stated_damping(self) -> PyTree:
        """rho where no measurement enters it, else None; the public script adds none."""
        if self.config.solver == "reference-compat":
            return 0.0
        return self.config.damping if self.config.damping_kind == "constant" else None

    def damping(self, operator: DatasetCurvature) -> PyTree:
        """rho: one number, or one for each LoRA matrix; relative ones are measured at the first solve of a kind."""
        config = self.config
        if self._rhos is None:
            price = _EIGENVALUE_PROBES * CURVATURES[self.kind].gradient_equivalents
            self.cost.spend("curvature", price * _rows(operator.stack))
            estimate = _mean_eigenvalue if config.damping_kind == "mean-eigenvalue" else _matrix_eigenvalues
            key = jax.random.key(config.seed)
            means = estimate(operator, key, operator.params, _EIGENVALUE_PROBES)
            self._rhos = relative_damping(means, config.damping, floor=_LEAST_DAMPING)
        return self._rhos

    def damping_energy(self, delta: LoraParams) -> float:
        """`delta' D delta` with the damping matrix D; after the first solve."""
        return float(trees.tree_vdot(delta, damping_product(self._rhos, delta)))

    @property
    def least_damping(self) -> float:
        """The smallest rho of any block; after the first solve."""
        return min(float(jnp.min(rho)) for rho in jax.tree.leaves(self._rhos))

    def solve(self, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        """`(sum_i c_i C(z_i) + rho I)^-1 rhs` by the configured solver.

        With `curvature="auto"` a Hessian solve that meets non-positive curvature is thrown away, paid for, and
        repeated with Gauss-Newton, which stays from then on.
        """
        if self.config.solver in ("cg", "minres"):
            solution = self._solve_krylov(params, weighted, rhs)
        elif self.config.solver == "ekfac":
            solution = self._solve_by_factors(params, weighted, rhs)
        else:
            solution = self._solve_stochastic(params, weighted, rhs)
        if self.config.curvature == "auto" and self.kind == "hessian" and bool(solution.negative_curvature):
            self._kind = "gauss-newton"
            self._rhos = self._stated_damping()
            self._fell_back = f"solve {self._num_solves} met non-positive curvature of the damped Hessian"
            logger.info("Gauss-Newton from here on: %s.", self._fell_back)
            return self.solve(params, weighted, rhs)
        return solution

    def largest_solve_cost(self, num_examples: int) -> float:
        """Gradient equivalents of a solve over so many examples that takes all of its iterations.

        Products are taken as cached where a memory budget is given; a solve that finds no room to cache asks for
        more. What measures a relative damping is left out.
        """
        config, kind = self.config, CURVATURES[self.kind]
        if config.solver in ("cg", "minres"):
            cached = config.memory_budget_bytes > 0 and not config.stream
            cost = self._largest_products * (CACHED_PRODUCT_COST if cached else kind.gradient_equivalents)
            cost += kind.linearise_gradient_equivalents if cached else 0.0
            cost += self._preconditioner_cost if config.preconditioner == "factored" else 0.0
            return cost * num_examples
        if config.solver == "ekfac":
            return (self._factors_cost + 2 * kind.gradient_equivalents) * num_examples
        step_size = 0.0
        if config.solver != "reference-compat":
            step_size = _TERMS * _PRODUCTS * kind.gradient_equivalents * self._draws[1]
        return self._stochastic_cost + step_size

    @property
    def _largest_products(self) -> int:
        """Products of a Krylov solve that takes all of its iterations, its residuals among them."""
        config = self.config
        if config.operands == "bfloat16":
            return (1 + MAX_CORRECTIONS) * (config.cg_max_steps + 2)
        return config.cg_max_steps + 1

    @property
    def _preconditioner_cost(self) -> float:
        """Gradient equivalents per example of factoring the preconditioner."""
        return FORWARD + _PRECONDITIONER_ROOTS * BACKWARD

    @property
    def _stochastic_cost(self) -> float:
        """Mini-batch products. The residual, which the methods they are of do not look at, is a diagnostic."""
        num_drawn, batch_size = self._draws
        return CURVATURES[self.kind].gradient_equivalents * num_drawn * batch_size

    @property
    def _factors_cost(self) -> float:
        """Gradient equivalents per example of making Kronecker factors: one pass for bases, one for eigenvalues."""
        return 2 * (FORWARD + self.config.draws * BACKWARD)

    @property
    def _draws(self) -> tuple[int, int]:
        """Products of a stochastic solve, and the examples in each: the public script draws single ones."""
        if self.config.solver == "reference-compat":
            return ReferenceCompat().num_steps, 1
        return self.config.solver_steps, self.config.solver_batch_size

    def _solve_krylov(self, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        config, kind = self.config, CURVATURES[self.kind]
        self._num_solves += 1
        solvers = {"cg": ConjugateGradients, "minres": Minres}
        solver = solvers[config.solver](rtol=config.cg_rtol, max_steps=config.cg_max_steps)
        per_product = kind.gradient_equivalents
        num_residuals = 1
        if config.stream:
            self.cost.reserve(self._largest_products * per_product * len(weighted.indices))
            solution = self._solve_streamed(solver, params, weighted, rhs)
        else:
            plain = DatasetCurvature(self.objective, params, self.stack(weighted), kind)
            rhos = self.damping(plain)
            operator = linearise(plain, config.memory_budget_bytes)
            self.cost.spend("curvature", operator.setup_cost * len(weighted.indices))
            per_product = operator.product_cost
            if config.preconditioner == "factored":
                self.cost.spend("curvature", self._preconditioner_cost * len(weighted.indices))
            self.cost.reserve(self._largest_products * per_product * len(weighted.indices))
            damped = Damped(operator, rhos)
            multiplied = Bfloat16Products(damped) if config.operands == "bfloat16" else damped
            self.measure_asymmetry(multiplied, rhs, per_product * len(weighted.indices))
            if config.operands == "bfloat16":
                solver = dataclasses.replace(solver, rtol=max(inner_tolerance(config.cg_rtol), self.asymmetry))
                solution, num_solves = _solve_with_narrow_products(solver, damped, rhs, config.cg_rtol)
                num_residuals = 2 * int(num_solves)  # of the rounded operator and of the exact one
            elif config.preconditioner == "factored":
                key = jax.random.fold_in(jax.random.key(config.seed), self._num_solves)
                preconditioner = _make_factored(
                    self.objective, params, plain.stack, key, config.damping, _PRECONDITIONER_ROOTS
                )
                solution = _solve_preconditioned(solver, damped, rhs, preconditioner)
            else:
                solution = _solve(solver, damped, rhs)
        # Besides the steps the residuals, and the product that met negative curvature.
        products = (
            int(solution.num_steps)
            + num_residuals
            + int(config.solver == "cg" and bool(solution.negative_curvature))
        )
        self.cost.spend("curvature", products * per_product * len(weighted.indices))
        return solution

    def _solve_streamed(self, solver, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        """The solve with one micro-batch at a time on the device, its state saved as it goes."""
        config, objective = self.config, self.objective
        stack = self.problem.examples.stack(weighted.indices, weighted.weights, chunk_size=config.chunk_size)

        operator = streamed_operator(
            objective, params, stack, CURVATURES[self.kind], damping=config.damping, mesh=self.mesh
        )
        product = CURVATURES[self.kind].gradient_equivalents * len(weighted.indices)
        self.measure_asymmetry(operator, rhs, product, jitted=False)
        if self._checkpoint_directory is None:
            msg = "stream is set, but there is no checkpoint_directory to save the solve's state in."
            raise ValueError(msg)
        resumable = Resumable(
            solver=solver,
            directory=self._checkpoint_directory / f"solve_{self._num_solves}",
            description=f"{self.kind} {config}",
        )
        return resumable.solve(operator, rhs)

    def measure_asymmetry(self, operator, like: LoraParams, product_cost: float, *, jitted: bool = True) -> None:
        """`|u'Av - v'Au| / (||u|| ||Av||)` of the first operator for random u and v.

        Costs two products, which count as diagnostics.
        """
        if math.isnan(self.asymmetry):
            measure = _asymmetry if jitted else product_asymmetry
            u, v = (_random_normal(key, like) for key in jax.random.split(jax.random.key(self.config.seed)))
            self.asymmetry = float(measure(operator, u, v))
            self.cost.spend("diagnostics", 2 * product_cost)

    def _solve_by_factors(self, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        """One conjugate-gradient step preconditioned with Kronecker factors, read where they were cached.

        The factors alone give a direction and no length: their step can be so long that it raises the quadratic.
        One step of the recurrence is that direction at its best length, for one product.
        """
        self._num_solves += 1
        stack, kind = self.stack(weighted), CURVATURES["gauss-newton"]
        mu = self.config.damping + self.objective.l2 * float(weighted.weights.sum())
        path = self._factors_directory
        if path is not None and path.exists():
            factors = load_ekfac(path, params, stack, mu=mu)
        else:
            self.cost.spend("curvature", self._factors_cost * len(weighted.indices))
            keys = jax.random.split(jax.random.key(self.config.seed))
            factors = _make_ekfac(self.objective, params, stack, *keys, self.config.damping, self.config.draws)
            if path is not None:
                save_ekfac(path, factors, params, stack)
        operator = Damped(DatasetCurvature(self.objective, params, stack, kind), self.config.damping)
        per_product = kind.gradient_equivalents * len(weighted.indices)
        self.measure_asymmetry(operator, rhs, per_product)
        solver = ConjugateGradients(rtol=self.config.cg_rtol, max_steps=1)
        self.cost.spend("curvature", 2 * per_product)  # the step's, and the true residual's
        solution = _solve_preconditioned(solver, operator, rhs, factors)
        return solution

    def _solve_stochastic(self, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        config, kind = self.config, CURVATURES[self.kind]
        self._num_solves += 1
        _, batch_size = self._draws
        stack = self.problem.examples.stack(weighted.indices, weighted.weights, chunk_size=batch_size)
        plain = DatasetCurvature(self.objective, params, place_stack(stack, self.mesh), kind)
        operator = Damped(plain, self.damping(plain))
        if config.solver == "reference-compat":
            solver: Solver = ReferenceCompat(seed=config.seed)
        else:
            key = jax.random.key(config.seed)
            self.cost.spend("curvature", _TERMS * _PRODUCTS * kind.gradient_equivalents * batch_size)
            largest = float(_largest_term_eigenvalue(operator, key, rhs, num_terms=_TERMS, num_products=_PRODUCTS))
            if config.solver == "descent":
                solver = QuadraticDescent(
                    learning_rate=config.learning_rate / largest,
                    num_steps=config.solver_steps,
                    seed=config.seed,
                    rtol=config.cg_rtol,
                )
            else:
                solver = Lissa(
                    scale=_LISSA_MARGIN * largest,
                    num_steps=config.solver_steps,
                    seed=config.seed,
                    rtol=config.cg_rtol,
                )
        self.cost.spend("curvature", self._stochastic_cost)
        solution = _solve(solver, operator, rhs)
        self.cost.spend("diagnostics", kind.gradient_equivalents * len(weighted.indices))
        return solution


def _rows(stack: ExampleStack) -> int:
    return int(np.count_nonzero(real_rows(stack)))
