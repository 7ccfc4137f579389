"""The constrained solve of target matching: with rows that are stored, or with rows that are computed when needed.

Both solve `minimise 1/2 d'(C + mu I) d` subject to softly constrained rows `h_i . d = t_i`, with C the factored
Gauss-Newton matrix `U'WU` of sampled retained rows, shrunk towards its diagonal as covariances of few samples are
(Ledoit and Wolf 2004): `C = (1 - s) U'WU + s diag(U'WU)`. A row per example says nothing of the directions that it
leaves out; the diagonal does. With `D = s diag(U'WU) + mu I` and all rows multiplied by `D^-1/2`, the problem has
C = (1 - s) U'WU and mu = 1. D is the first sample's.

`StoredRows` inverts C in the space of its rows, exactly. `SketchedRows` never holds a row. With
`X = [H; -sqrt(W) U]`, the solution is `d = X'z / mu` where

    (X X' / mu + diag(K, I)) z = (t, 0),     K the softness of the constraints.

The matrix is taken of the rows' sketches, so that `z` is approximate; `X'z` is one backward pass. A forward pass
with a tangent then gives `H d` exactly, and what the constraints lack is solved for again, as in flexible GMRES
(Saad 1993): the step is the combination of the directions so far that meets the constraints best. C itself is a
sample's estimate, and its sketch changes which of the steps that meet the constraints is taken, not whether they
are met.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.sharding import Mesh

from llmeraser_jax import trees
from llmeraser_jax.curvature import BlockCurvature, DualInverse, RowBlocks, example_rows, factorise
from llmeraser_jax.curvature.factor import ROW_KINDS, RowKind
from llmeraser_jax.curvature.row_blocks import multiply
from llmeraser_jax.curvature.row_sets import SKETCH_WIDTH, RowSet
from llmeraser_jax.losses import Objective, example_places
from llmeraser_jax.parallel import replicate, to_host
from llmeraser_jax.types import ExampleStack, LoraParams
from llmeraser_jax.unlearning.budget import BACKWARD, FORWARD, FORWARD_WITH_TANGENT, GRADIENT, Budget
from llmeraser_jax.unlearning.records import NoStepError

_RETAIN_RIDGE = 0.1  # how softly retained rows are constrained, relative to their mean influence on themselves
_SKETCHED_RTOL = 0.1  # of the constraints; rows count as arrived within this share of their way
_MAX_DIRECTIONS = 3


@dataclasses.dataclass(frozen=True)
class MatchingStep:
    """A solved step and what it should do.

    Attributes:
        delta: the step.
        predicted: change of the rows' values, constraints on retained rows not among them.
        rhs_norm: of the constraint combination `D^-1/2 H'a`; of sketched rows that of the demand.
        relative_residual: of the solve, of rows times `D^-1/2`.
        error_bound: on the step's relative error in the norm that D gives; nan where there is none.
        standard_error: of the step over its norm, from two halves of the curvature's sample.
    """

    delta: LoraParams
    predicted: np.ndarray
    rhs_norm: float
    relative_residual: float
    error_bound: float
    standard_error: float = math.nan


class MatchingRows(Protocol):
    """Rows of the targets, of retained constraints and of the curvature, and the solve with them."""

    def measure(self, params: LoraParams, stack: ExampleStack, kind: RowKind) -> tuple[np.ndarray, Any]:
        """Values of a stack's examples in the order asked for, and their rows; after the first curvature."""
        ...

    def add_curvature(self, params: LoraParams, stack: ExampleStack | None, key: jax.Array) -> None:
        """Joins curvature rows of a weighted sample to those there; without a sample C is damping alone."""
        ...

    def solve(self, rows: Any, demand: np.ndarray, constraints: tuple[Any, np.ndarray] | None) -> MatchingStep:
        """The least step that moves the rows as demanded, and constraints by what they lost."""
        ...

    def standard_error(self, rows: Any, demand: np.ndarray, step: MatchingStep) -> float:
        """The step's standard error over its norm; nan where the sample has no halves."""
        ...

    def solve_cost(self, num_examples: int, num_sampled: int) -> float:
        """Gradient equivalents of a solve besides the rows' own, at most.

        Args:
            num_examples: behind the constraints.
            num_sampled: behind the curvature, where there is none yet.
        """
        ...


_rows = jax.jit(example_rows, static_argnames="num_roots")


def stored_rows(
    objective: Objective,
    params: LoraParams,
    stack: ExampleStack,
    kind: RowKind,
    key: jax.Array,
    *,
    num_roots: int = 1,
    scale: LoraParams | None = None,
) -> tuple[np.ndarray, RowBlocks]:
    """Values of a stack's examples in the order asked for, and their rows times `scale`, a block an entry."""
    which = np.asarray(ROW_KINDS.index(kind), np.int32)
    values, blocks = [], []
    for entry in stack.entries:
        found = _rows(objective, params, entry, key, which, num_roots)
        values.append(found.values)
        blocks.append(found.rows if scale is None else multiply(found.rows, scale))
    places = example_places(stack)
    joined = np.concatenate(to_host(values)).astype(np.float64)
    return joined[places], RowBlocks(tuple(blocks), root_places(places, num_roots))


@jax.jit
def _norms(product: LoraParams, rhs: LoraParams, delta: LoraParams) -> tuple[jax.Array, ...]:
    """Of `b`, `C delta - b` and `delta`."""
    return tuple(trees.tree_norm(tree) for tree in (rhs, trees.tree_sub(product, rhs), delta))


@jax.jit
def _inverse_root(squares: LoraParams, shrinkage: jax.Array, mu: jax.Array) -> LoraParams:
    """`D^-1/2`."""
    return jax.tree.map(lambda x: jax.lax.rsqrt((shrinkage * x + mu).astype(x.dtype)), squares)


def root_places(examples: np.ndarray, num_roots: int) -> np.ndarray:
    """Where the roots of examples at these places are, several for each."""
    return (examples[:, None] * num_roots + np.arange(num_roots)).reshape(-1)


def _combined(rows: RowBlocks, own: np.ndarray, curvature_rows: RowBlocks, others: np.ndarray) -> LoraParams:
    return curvature_rows.combine(others, rows.combine(own))


class _ShrunkRows:
    """What both kinds of rows are solved with, and the scale that shrinkage gives them.

    Attributes:
        scale: `D^-1/2`, which all rows are multiplied by; None is 1.
    """

    def __init__(self, objective: Objective, *, damping: float, shrinkage: float, row_ridge: float, num_roots: int):
        self.objective = objective
        self.damping, self.shrinkage, self.row_ridge, self.num_roots = damping, shrinkage, row_ridge, num_roots
        self.scale: LoraParams | None = None

    def shrunk(
        self, weights: np.ndarray, total: float, squares: Callable[[], LoraParams]
    ) -> tuple[np.ndarray, float]:
        """The weights W and mu of the scaled problem; the first call with shrinkage sets the scale.

        Args:
            weights: of a sample's rows, before.
            total: of its examples, which the L2 term counts by.
            squares: computes `diag(U'WU)`.
        """
        mu = self.damping + self.objective.l2 * total
        if self.shrinkage == 0:
            return weights, mu
        if self.scale is None:
            self.scale = _inverse_root(squares(), self.shrinkage, mu)
        return (1 - self.shrinkage) * weights, 1.0


class StoredRows(_ShrunkRows):
    """Rows held on the device(s), each with a share of their numbers, and C inverted in their space."""

    def __init__(self, objective: Objective, mesh: Mesh | None, **options: Any):
        super().__init__(objective, **options)
        self.mesh = mesh
        self.inverse: DualInverse | None = None

    def measure(self, params: LoraParams, stack: ExampleStack, kind: RowKind) -> tuple[np.ndarray, RowBlocks]:
        """See `MatchingRows`; one backward pass each."""
        assert self.inverse is not None  # the curvature scales rows
        return stored_rows(self.objective, params, stack, kind, jax.random.key(0), scale=self.scale)

    def add_curvature(self, params: LoraParams, stack: ExampleStack | None, key: jax.Array) -> None:
        """See `MatchingRows`.

        Raises:
            NoStepError: the damping is too small for float32.
        """
        if stack is None:
            none = jax.tree.map(lambda x: np.zeros((1, *x.shape), x.dtype), params)
            rows, weights, mu = RowBlocks.whole(none), np.zeros(1), self.damping + self.objective.l2
        else:
            unscaled = self.scale is None
            options = {"num_roots": self.num_roots, "scale": self.scale}
            _, rows = stored_rows(self.objective, params, stack, "roots", key, **options)
            weights = np.concatenate([w.reshape(-1) for w in to_host(stack.weights)]).astype(np.float64)
            own = np.repeat(weights[example_places(stack)], self.num_roots) / self.num_roots
            weights, mu = self.shrunk(own, float(weights.sum()), lambda: rows.squares(own))
            if unscaled and self.scale is not None:
                rows = rows.scaled(self.scale)
        curvature = BlockCurvature.of(rows, weights, mu)
        if self.inverse is not None:
            curvature = self.inverse.curvature.joined(curvature)
        try:
            self.inverse = factorise(curvature)
        except np.linalg.LinAlgError as error:
            msg = f"Rounding made the damped curvature indefinite ({error}); raise damping."
            raise NoStepError(msg) from error

    def _coefficients(
        self, inverse: DualInverse, inner: np.ndarray, plain: np.ndarray, demand: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of the constrained rows and of the curvature's in the step, and the moves that they predict.

        Args:
            inverse: of the curvature.
            inner: inner products of curvature rows and constrained rows.
            plain: of constrained rows with each other.
            demand: of the constrained rows.
            count: how many of them are targets.
        """
        metric, solved = inverse.metric(inner, plain)
        ridge = _softness(np.diag(metric), count, self.row_ridge)
        try:
            coefficients = np.linalg.solve(metric + np.diag(ridge), demand)
        except np.linalg.LinAlgError as error:
            msg = f"The rows' gradients depend on each other ({error}); give them a row_ridge above 0."
            raise NoStepError(msg) from error
        return coefficients, -(solved @ coefficients), metric @ coefficients

    def solve(
        self, rows: RowBlocks, demand: np.ndarray, constraints: tuple[RowBlocks, np.ndarray] | None
    ) -> MatchingStep:
        """See `MatchingRows`.

        Raises:
            NoStepError: the rows depend on each other.
        """
        assert self.inverse is not None  # made before
        curvature, count = self.inverse.curvature, len(demand)
        if constraints is not None:
            rows = rows.joined(constraints[0])
            demand = np.concatenate([demand, constraints[1]])
        inner, plain = curvature.rows.gram(rows), rows.gram(rows)
        own, others, moves = self._coefficients(self.inverse, inner, plain, demand, count)
        delta = _combined(rows, own / curvature.mu, curvature.rows, others / curvature.mu)
        rhs_norm, residual, norm = map(float, _norms(curvature.mv(delta), rows.combine(own), delta))
        return MatchingStep(
            delta=replicate(self._unscaled(delta), self.mesh),
            predicted=moves[:count],
            rhs_norm=rhs_norm,
            relative_residual=residual / rhs_norm,
            error_bound=residual / curvature.mu / norm,
        )

    def _unscaled(self, delta: LoraParams) -> LoraParams:
        return delta if self.scale is None else multiply(delta, self.scale)

    def standard_error(self, rows: RowBlocks, demand: np.ndarray, step: MatchingStep) -> float:
        """Half the distance of the steps that two half samples give, over the step's norm."""
        assert self.inverse is not None  # made before
        curvature = self.inverse.curvature
        half = np.arange(len(curvature.rows)) // self.num_roots % 2 == 0
        if half.all():
            return math.nan
        inner, plain = curvature.rows.gram(rows), rows.gram(rows)
        steps = [
            self._coefficients(factorise(curvature, chosen), inner, plain, demand, len(demand))
            for chosen in (half, ~half)
        ]
        own, others = ((one - other) / curvature.mu for one, other in zip(*(s[:2] for s in steps), strict=True))
        distance = float(trees.tree_norm(self._unscaled(_combined(rows, own, curvature.rows, others))))
        return 0.5 * distance / float(trees.tree_norm(step.delta))

    def solve_cost(self, num_examples: int, num_sampled: int) -> float:
        """None: the rows are there."""
        return 0.0


@dataclasses.dataclass(frozen=True)
class _Sketched:
    """Rows of some examples, in the order asked for.

    Attributes:
        rows: what they are computed from.
        places: [m] where each is among all rows of the set, padding included.
        sketches: of the rows times `D^-1/2` [m, size], float64.
        scale: `D^-1/2`; None is 1.
    """

    rows: RowSet
    places: np.ndarray
    sketches: np.ndarray
    scale: LoraParams | None

    @property
    def num_examples(self) -> int:
        """Examples behind the rows."""
        return len(self.places) // self.rows.num_roots

    def combine(self, coefficients: np.ndarray) -> LoraParams:
        """`D^-1 sum_i a_i row_i`; without D the sum."""
        whole = np.zeros(self.rows.num_rows)
        whole[self.places] = coefficients
        dtype = jax.tree.leaves(self.rows.params)[0].dtype
        combined = _combine(self.rows, jnp.asarray(whole, dtype))
        return combined if self.scale is None else multiply(multiply(combined, self.scale), self.scale)

    def products(self, v: LoraParams) -> np.ndarray:
        """`row_i . v`."""
        return to_host(_products(self.rows, v)).astype(np.float64)[self.places]


_combine = jax.jit(RowSet.combine)
_products = jax.jit(RowSet.products)
_squares = jax.jit(RowSet.squares)
sketch_rows = jax.jit(RowSet.sketch, static_argnames="width")


class SketchedRows(_ShrunkRows):
    """Rows that are never stored."""

    def __init__(self, objective: Objective, budget: Budget, *, seed: int, **options: Any):
        super().__init__(objective, **options)
        self.budget = budget
        self.sketch_key = jax.random.fold_in(jax.random.key(seed), 7)
        self.mu = self.damping + objective.l2
        self.samples: list[_Sketched] = []
        self.weights: list[np.ndarray] = []
        self.has_curvature = False

    def _rows(
        self, params: LoraParams, stack: ExampleStack, kind: RowKind, key: jax.Array, num_roots: int = 1
    ) -> tuple[np.ndarray, _Sketched]:
        rows = RowSet(self.objective, params, stack, key, kind, num_roots)
        values, sketches = sketch_rows(rows, self.sketch_key, width=SKETCH_WIDTH, scale=self.scale)
        examples = example_places(stack)
        places = root_places(examples, num_roots)
        values = to_host(values).astype(np.float64)[examples]
        return values, _Sketched(rows, places, to_host(sketches).astype(np.float64)[places], self.scale)

    def measure(self, params: LoraParams, stack: ExampleStack, kind: RowKind) -> tuple[np.ndarray, _Sketched]:
        """See `MatchingRows`; one backward pass each."""
        assert self.has_curvature  # which scales rows
        return self._rows(params, stack, kind, jax.random.key(0))

    def add_curvature(self, params: LoraParams, stack: ExampleStack | None, key: jax.Array) -> None:
        """See `MatchingRows`; the diagonal of the first sample takes its passes once more.

        Raises:
            BudgetSpent: those cannot be paid.
        """
        if stack is None:
            self.has_curvature = True
            return

        def squares() -> LoraParams:
            self.budget.spend("curvature", (FORWARD + self.num_roots * BACKWARD) * len(examples))
            return _squares(RowSet(self.objective, params, stack, key, "roots", self.num_roots))

        examples = example_places(stack)
        weights = np.concatenate([w.reshape(-1) for w in to_host(stack.weights)]).astype(np.float64)
        own = np.repeat(weights[examples], self.num_roots) / self.num_roots
        own, self.mu = self.shrunk(own, float(weights.sum()), squares)
        self.has_curvature = True
        _, sample = self._rows(params, stack, "roots", key, self.num_roots)
        before = sum(map(len, self.weights))
        share = len(own) / (len(own) + before)
        self.weights = [*((1 - share) * w for w in self.weights), share * own]
        self.samples.append(sample)

    def solve(
        self, rows: _Sketched, demand: np.ndarray, constraints: tuple[_Sketched, np.ndarray] | None
    ) -> MatchingStep:
        """See `MatchingRows`.

        Raises:
            NoStepError: the sketched system is not positive definite.
            BudgetSpent: an iteration cannot be paid.
        """
        system = _System.of(self, rows, demand, constraints)
        factor = system.factor()
        asked = system.rhs[: len(system.softness)]
        residual, directions, images, moves = asked, [], [], []
        for _ in range(_MAX_DIRECTIONS):
            self.budget.spend("curvature", system.cost)
            z = scipy.linalg.cho_solve(factor, np.concatenate([residual, np.zeros(len(system.rhs) - len(asked))]))
            direction, moved = system.direction(z)
            directions.append(direction)
            moves.append(moved)
            images.append(moved + system.softness * z[: len(asked)])
            coefficients = np.linalg.lstsq(np.stack(images, axis=1), asked, rcond=None)[0]
            residual = asked - np.stack(images, axis=1) @ coefficients
            if float(np.linalg.norm(residual)) <= _SKETCHED_RTOL * float(np.linalg.norm(asked)):
                break
        delta: LoraParams = trees.tree_zeros_like(rows.rows.params)
        for coefficient, direction in zip(coefficients, directions, strict=True):
            delta = trees.tree_axpy(float(coefficient), direction, delta)
        return MatchingStep(
            delta=delta,
            predicted=(np.stack(moves, axis=1) @ coefficients)[: len(demand)],
            rhs_norm=float(np.linalg.norm(asked)),
            relative_residual=float(np.linalg.norm(residual) / np.linalg.norm(asked)),
            error_bound=math.nan,
        )

    def standard_error(self, rows: _Sketched, demand: np.ndarray, step: MatchingStep) -> float:
        """By the sketches: half the distance of the steps that two half samples give, over the step's norm."""
        if sum(map(len, self.weights)) // self.num_roots < 2:
            return math.nan
        system = _System.of(self, rows, demand, None)
        sampled = np.arange(len(system.rhs) - len(demand)) // self.num_roots % 2 == 0
        moves = []
        for chosen in (sampled, ~sampled):
            half = system.at(np.concatenate([np.ones(len(demand), bool), chosen]), len(demand))
            z = scipy.linalg.cho_solve(half.factor(), half.rhs)
            moves.append(half.sketches.T @ z / self.mu)
        whole = system.sketches.T @ scipy.linalg.cho_solve(system.factor(), system.rhs) / self.mu
        return 0.5 * float(np.linalg.norm(moves[0] - moves[1]) / np.linalg.norm(whole))

    def solve_cost(self, num_examples: int, num_sampled: int) -> float:
        """Passes of all directions over so many examples and the curvature's."""
        sampled = sum(sample.num_examples for sample in self.samples) or num_sampled
        return _MAX_DIRECTIONS * ((GRADIENT + FORWARD_WITH_TANGENT) * num_examples + GRADIENT * sampled)


@dataclasses.dataclass(frozen=True)
class _System:
    """`(X X' / mu + diag(K, I)) z = (t, 0)`, and the same of the rows' sketches.

    Attributes:
        blocks: the rows of X with the factors that they are multiplied by: 1, or `-sqrt(w)` of curvature rows.
        sketches: of X [m, size].
        softness: K.
        rhs: (t, 0).
        mu: damping.
    """

    blocks: tuple[tuple[_Sketched, np.ndarray], ...]
    sketches: np.ndarray
    softness: np.ndarray
    rhs: np.ndarray
    mu: float

    @classmethod
    def of(
        cls,
        rows: SketchedRows,
        targets: _Sketched,
        demand: np.ndarray,
        constraints: tuple[_Sketched, np.ndarray] | None,
    ) -> _System:
        """The system of a solve."""
        blocks = [(targets, np.ones(len(demand)))]
        if constraints is not None:
            blocks.append((constraints[0], np.ones(len(constraints[1]))))
            demand = np.concatenate([demand, constraints[1]])
        count, constrained = len(targets.places), len(demand)
        blocks += [(sample, -np.sqrt(w)) for sample, w in zip(rows.samples, rows.weights, strict=True)]
        sketches = np.concatenate([scale[:, None] * block.sketches for block, scale in blocks])
        own, others = sketches[:constrained], sketches[constrained:]
        # The diagonal of `H C^-1 H'`, by the Woodbury identity.
        inner = own @ others.T
        small = others @ others.T + rows.mu * np.eye(len(others))
        diagonal = np.sum(own**2, axis=1) - np.sum(inner * np.linalg.solve(small, inner.T).T, axis=1)
        softness = _softness(diagonal / rows.mu, count, rows.row_ridge)
        rhs = np.concatenate([demand, np.zeros(len(others))])
        return cls(tuple(blocks), sketches, softness, rhs, rows.mu)

    @property
    def _constraints(self) -> list[_Sketched]:
        blocks, start = [], 0
        for block, scale in self.blocks:
            if start < len(self.softness):
                blocks.append(block)
            start += len(scale)
        return blocks

    @property
    def cost(self) -> float:
        """Gradient equivalents of a direction and its moves."""
        behind = sum(block.num_examples for block, _ in self.blocks)
        constrained = sum(block.num_examples for block in self._constraints)
        return GRADIENT * behind + FORWARD_WITH_TANGENT * constrained

    @property
    def _diagonal(self) -> np.ndarray:
        return np.concatenate([self.softness, np.ones(len(self.rhs) - len(self.softness))])

    def factor(self) -> tuple[np.ndarray, bool]:
        """The Cholesky factor of the sketched matrix.

        Raises:
            NoStepError: it is not positive definite.
        """
        matrix = self.sketches @ self.sketches.T / self.mu + np.diag(self._diagonal)
        try:
            return scipy.linalg.cho_factor(matrix, lower=True)
        except np.linalg.LinAlgError as error:
            msg = f"The rows' gradients depend on each other ({error}); give them a row_ridge above 0."
            raise NoStepError(msg) from error

    def direction(self, z: np.ndarray) -> tuple[LoraParams, np.ndarray]:
        """`X'z / mu`, and exactly how far it moves the constraints."""
        moved, start = None, 0
        for block, scale in self.blocks:
            part = block.combine(scale * z[start : start + len(scale)] / self.mu)
            moved = part if moved is None else trees.tree_add(moved, part)
            start += len(scale)
        return moved, np.concatenate([block.products(moved) for block in self._constraints])

    def at(self, which: np.ndarray, count: int) -> _System:
        """The sketched system with some of the curvature rows, which then count twice."""
        scale = np.where(np.arange(len(which)) < count, 1.0, math.sqrt(2))
        sketches = (scale[:, None] * self.sketches)[which]
        return dataclasses.replace(self, sketches=sketches, rhs=self.rhs[which])


def _softness(influence: np.ndarray, count: int, row_ridge: float) -> np.ndarray:
    """K: ridges relative to the mean influence of the rows on themselves.

    Constraints on retained rows are soft: only what they lost is demanded back, and a ridge keeps rows of tiny
    gradient from asking much.

    Args:
        influence: the diagonal of `H C^-1 H'`.
        count: how many of the rows are targets; the others are constraints on retained rows.
        row_ridge: of the targets.
    """
    ridge = np.full(len(influence), row_ridge * float(influence[:count].sum()) / count)
    if len(influence) > count:
        ridge[count:] = _RETAIN_RIDGE * float(influence[count:].mean())
    return ridge
