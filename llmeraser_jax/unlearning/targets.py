"""Where every forget row should end, without an oracle.

A removed pair should look like one that was never trained on: its target is the mean loss of calibration rows.
A replacement should look like a trained pair: its target is the mean loss of retained rows. An edit is an
exchange: after it the pair as it was trained is to the model what its replacement is now, a variation of a trained
pair that was not trained itself. So its target is the mean loss of the replacements now, and where pairs that are
hard before the exchange are hard after it, each row's target follows its own partner. Where an exchange would
change nothing, its rows stay where they are.

An edit's targets are for the tokens that differ. Tokens that old and new response share, and that the model
predicts as well in either, stay.

Some rows are harder than others, whoever was trained on them. Where the model that training started from predicts
which calibration rows are hard, each removed row's target follows its own loss under that model.

A removed row does not become unknown where the retain set says the same. The model at hand tells how much the
retained row j says about row i: the cosine of their gradients. It enters as the correlation in a regression of
log-odds (a Gaussian process whose mean is the target of an unseen row): a verbatim copy leaves a row as known as
the copy is, an unrelated row changes nothing.

Log-odds of a loss `l` (nats per token) are `log(exp(l) - 1)`, those against a token of probability `exp(-l)`: on
the way from memorised to unknown they move evenly, where the loss first does not move at all and then runs.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from llmeraser_jax.curvature.row_sets import SKETCH_WIDTH, RowSet, rows_fit
from llmeraser_jax.data.token_subsets import TokenSubsets, align_tokens
from llmeraser_jax.losses import example_places, forward_values, per_example
from llmeraser_jax.parallel import replicate, to_host
from llmeraser_jax.types import ExampleSet
from llmeraser_jax.unlearning.budget import FORWARD, GRADIENT
from llmeraser_jax.unlearning.matching_rows import sketch_rows, stored_rows
from llmeraser_jax.unlearning.problem import EditProblem
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import RowValues, Workspace

_NUM_CALIBRATION = 128  # rows behind the target of removed rows
_NUM_DIFFICULTY = 64  # of them, behind what their difficulty says
_LEAST_DIFFICULTY = 16  # fewer show nothing
_LEAST_EXPLAINED = 0.2  # share of the variance of calibration rows' losses; below it the mean does as well
_NUM_KNOWN = 64  # retained rows behind the target of replacements
_LEAST_PAIRS = 3  # fewer show no correlation and no spread
_NEGLIGIBLE_WAY = 0.1  # log-odds that edited pairs may be from their ends on average and count as there already
_SENSITIVE_ABOVE = 0.1  # nats by which a shared token is harder in the other response before it counts as different
_LEAST_COSINE = 0.2  # below it gradients of unrelated rows lie
_KERNEL_RIDGE = 1e-2
_LEAST_SPREAD = 0.5
_DEFAULT_SPREAD = 1.0  # log-odds; calibration rows of the demo have 1.02


class Role(enum.IntEnum):
    """What is asked of a row."""

    GOES = 0  # its loss is to rise
    WANTED = 1  # its loss is to fall
    STAYS = 2  # its loss is not to rise: a copy in the retain set, or the shared tokens of an edit


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetLosses:
    """Mean losses that targets come from, in nats per token.

    Attributes:
        unknown: of rows that were not trained on; None where nothing is known of them.
        known: of retained rows; None where no row is wanted, or none is retained.
        explained: share of the variance of calibration rows' losses that their losses under the untrained model
            predict, each row predicted from the others. Removed rows have targets of their own where it is at least
            0.2, and may be below 0. None where nothing was predicted.
    """

    unknown: float | None
    known: float | None
    explained: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """A retained row that says what a forget row says.

    Attributes:
        named: place of the forget row in `EditProblem.named`.
        retained: index of the retained row.
        cosine: of their gradients.
    """

    named: int
    retained: int
    cosine: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTargets:
    """The rows of a request, in the order of a stack of them, and where they should end.

    Attributes:
        examples: where the rows are; those of the problem, or a view of them whose loss is at some tokens.
        indices: [m] into `examples`.
        rows: [m] indices into the problem's examples.
        owners: [m] places in `EditProblem.named` of the forget rows that they belong to.
        roles: [m] `Role` of each.
        start: [m] log-odds under the adapter as trained.
        ends: [m] log-odds that they are moved to; nan where nobody knows.
        centres: [m] mean log-odds of rows of their kind. `ends` are the log-odds of a mean loss: where
            rows differ, above the mean of log-odds.
        spreads: [m] standard deviation of the log-odds of rows of their kind.
        losses: what the ends come from.
        unknown_spread: standard deviation of calibration rows' losses, in nats; None without them.
        copies: retained rows that say the same as a forget row.
    """

    examples: ExampleSet
    indices: np.ndarray
    rows: np.ndarray
    owners: np.ndarray
    roles: np.ndarray
    start: np.ndarray
    ends: np.ndarray
    centres: np.ndarray
    spreads: np.ndarray
    losses: TargetLosses
    unknown_spread: float | None
    copies: tuple[Copy, ...]

    @property
    def known(self) -> bool:
        """Whether every row has a target."""
        return not bool(np.isnan(self.ends).any())

    @property
    def way(self) -> np.ndarray:
        """[m] how far every row is to go, in log-odds: above 0 up, below 0 down, 0 where it is past its end."""
        return self.left(self.start)

    def left(self, here: np.ndarray) -> np.ndarray:
        """[m] what is left of every row's way from `here`; 0 for a row that is past its end."""
        left = np.nan_to_num(self.ends - here)
        return np.where(self.roles == Role.GOES, np.maximum(left, 0), np.minimum(left, 0))


@dataclasses.dataclass(frozen=True)
class _Part:
    """A row, or some tokens of one."""

    row: int
    mask: np.ndarray | None
    owner: int
    role: Role


def find_targets(task: UnlearningTask, workspace: Workspace, *, diagnostic: bool = False) -> RowTargets:
    """Measures the rows under the adapter as trained and works out where each should end.

    Args:
        task: its calibration rows or its `target_loss` show where removed rows should end. The two kinds of edits
            have correlations and means of their own.
        workspace: where to compute.
        diagnostic: whether the cost counts as a diagnostic, for a method that does not use targets.

    Raises:
        ValueError: no calibration rows in the set given; a row whose loss is not finite.
        BudgetSpent: it cannot be paid.
    """
    problem, objective, params = task.problem, task.objective, task.adapter
    on = "diagnostics" if diagnostic else "rhs"
    known, unknown = _references(task, workspace, on)
    parts = _parts(task, workspace, on)
    copies = _find_copies(task, workspace, on)
    parts += [
        _Part(row, None, owner, Role.STAYS) for row, owner in {copy.retained: copy.named for copy in copies}.items()
    ]
    examples, indices = _examples_of(problem, parts)
    values = workspace.trained_values(objective, params, examples, indices, on)
    rows = np.array([p.row for p in parts], np.int64)
    check_finite(values.losses, problem.examples, rows, "named")
    start = values.log_odds
    roles = np.array([p.role for p in parts])
    owners = np.array([p.owner for p in parts])
    ends = np.where(roles == Role.GOES, unknown.end, start)
    centres = np.where(roles == Role.GOES, unknown.centre, start)
    spreads = np.full(len(parts), unknown.spread)
    removed = np.flatnonzero((roles == Role.GOES) & (problem.replacements[owners] < 0))
    difficulty = _difficulty(task, workspace, unknown, rows[removed], on)
    if difficulty is not None and difficulty.explained >= _LEAST_EXPLAINED:
        ends[removed], centres[removed] = difficulty.ends, difficulty.centres
        spreads[removed] = difficulty.spread
    for kind in (task.query_changes, ~task.query_changes):
        of_kind = np.flatnonzero(kind & (problem.replacements >= 0))
        old = np.flatnonzero(np.isin(owners, of_kind) & (roles == Role.GOES))
        new = np.flatnonzero(np.isin(owners, of_kind) & (roles == Role.WANTED))
        if len(old) == 0:
            continue
        old = old[np.argsort(owners[old])]
        new = new[np.argsort(owners[new])]
        ends[old], ends[new] = _exchange(start[old], start[new], start[old].mean() if known.none else known.end)
        centres[old], centres[new] = ends[old], ends[new]
        spreads[old] = _spread(float(start[new].std())) if len(new) >= _LEAST_PAIRS else unknown.spread
        spreads[new] = known.spread
    ends = _with_copies(start, ends, roles, owners, rows, copies)
    centres = _with_copies(start, centres, roles, owners, rows, copies)
    if objective.log_odds_fn is None:
        # A loss that is no negative log-likelihood has no log-odds.
        ends = centres = np.where(roles == Role.STAYS, start, np.nan)
    return RowTargets(
        examples=examples,
        indices=indices,
        rows=rows,
        owners=owners,
        roles=roles,
        start=start,
        ends=ends,
        centres=centres,
        spreads=spreads,
        losses=TargetLosses(
            unknown=unknown.mean_loss,
            known=known.mean_loss,
            explained=None if difficulty is None else difficulty.explained,
        ),
        unknown_spread=unknown.loss_spread,
        copies=copies,
    )


def log_odds(losses: np.ndarray | float) -> np.ndarray:
    """`log(exp(l) - 1)` of losses in nats."""
    return np.asarray(np.log(np.expm1(np.maximum(losses, np.finfo(np.float64).tiny))))


def loss_of(log_odds: np.ndarray | float) -> np.ndarray:
    """The loss in nats that has these log-odds; nan where they are nan."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.logaddexp(0, log_odds))


def row_id(examples: ExampleSet, row: int) -> str:
    """The id of a row, where examples have ids, else its number; a replacement has its original's."""
    ids = getattr(examples, "ids", None)
    return str(row) if ids is None else ids[row]


def check_finite(losses: np.ndarray, examples: ExampleSet, rows: np.ndarray, kind: str) -> None:
    """Refuses rows whose loss is not finite under the adapter as trained.

    Raises:
        ValueError: names the first.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        msg = (
            f"The loss of {kind} row {row_id(examples, int(rows[bad[0]]))!r}{more} is {losses[bad[0]]} under the "
            "adapter as trained; look for a nan in base, adapter or data."
        )
        raise ValueError(msg)


def _spread(spread: float | None) -> float:
    return max(_DEFAULT_SPREAD if spread is None else float(spread), _LEAST_SPREAD)


@dataclasses.dataclass(frozen=True)
class _Reference:
    """Rows of a kind, which others should become like."""

    mean_loss: float | None = None
    loss_spread: float | None = None
    centre: float = math.nan  # mean log-odds
    spread: float = _DEFAULT_SPREAD  # of log-odds
    rows: np.ndarray | None = None  # where they are in their set, and their losses and log-odds
    values: RowValues | None = None

    @property
    def none(self) -> bool:
        """Whether nothing is known of them."""
        return self.mean_loss is None

    @property
    def end(self) -> float:
        """Log-odds of the mean loss."""
        return math.nan if self.mean_loss is None else float(log_odds(self.mean_loss))

    @classmethod
    def of(cls, rows: np.ndarray, values: RowValues) -> _Reference:
        """Of at least one row."""
        several = len(rows) >= _LEAST_PAIRS
        return cls(
            mean_loss=float(values.losses.mean()),
            loss_spread=float(values.losses.std()) if several else None,
            centre=float(values.log_odds.mean()),
            spread=_spread(float(values.log_odds.std()) if several else None),
            rows=rows,
            values=values,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Difficulty:
    """What the untrained model says of unseen rows.

    Attributes:
        explained: share of the variance of calibration rows' losses, each row predicted from the others.
        ends: [m] log-odds of the predicted losses of removed rows.
        centres: [m] their predicted log-odds.
        spread: standard deviation of log-odds around the prediction.
    """

    explained: float
    ends: np.ndarray
    centres: np.ndarray
    spread: float


def _difficulty(
    task: UnlearningTask,
    workspace: Workspace,
    unknown: _Reference,
    removed: np.ndarray,
    on: Literal["rhs", "diagnostics"],
) -> _Difficulty | None:
    """Predicts unseen rows' losses from those under the model before training, by regression on calibration rows.

    None without a language model, enough calibration rows or removals, and where the user states the target.
    """
    calibration, rows, values = task.calibration, unknown.rows, unknown.values
    if calibration is None or rows is None or values is None or task.data is None or task.target_loss is not None:
        return None
    if len(rows) < _LEAST_DIFFICULTY or not len(removed):
        return None
    chosen = np.sort(workspace.rng(5).permutation(len(rows))[:_NUM_DIFFICULTY])
    workspace.budget.spend(on, FORWARD * (len(chosen) + len(removed)))
    untrained = replicate(task.initial_adapter(workspace.seed), workspace.mesh)
    shown = workspace.row_values(task.objective, untrained, calibration, rows[chosen])
    asked = workspace.row_values(task.objective, untrained, task.problem.examples, removed)
    if not (np.isfinite(shown.losses).all() and np.isfinite(asked.losses).all()):
        return None
    seen = values.losses[chosen]
    losses, explained, _ = regress_on_difficulty(shown.losses, seen, asked.losses)
    centres, _, spread = regress_on_difficulty(shown.log_odds, values.log_odds[chosen], asked.log_odds)
    # Nothing is extrapolated beyond what calibration rows show.
    ends = log_odds(np.clip(losses, seen.min(), seen.max()))
    bounds = values.log_odds[chosen].min(), values.log_odds[chosen].max()
    return _Difficulty(
        explained=explained, ends=ends, centres=np.clip(centres, *bounds), spread=_spread(spread)
    )  # fmt: skip


def regress_on_difficulty(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, float, float]:
    """A least squares line through [n] points at other places.

    Args:
        x: [n] losses or log-odds of rows under the model before training.
        y: [n] the same under the adapter as trained, which was not trained on them.
        at: [m] values of other rows under the model before training.

    Returns:
        Its values at `at`; 1 - (squared residuals of points that the line was not fitted to) / (squared deviations
        from the mean); the standard deviation of the residuals.
    """
    design = np.stack([np.ones_like(x), x], axis=1)
    inverse = np.linalg.pinv(design)
    line = inverse @ y
    residuals = y - design @ line
    left_out = residuals / np.maximum(1 - np.einsum("ij,ji->i", design, inverse), np.finfo(np.float64).eps)
    around = y - y.mean()
    explained = 1 - float((left_out @ left_out) / max(around @ around, np.finfo(np.float64).tiny))
    return line[0] + line[1] * at, explained, float(residuals.std())


def _references(task: UnlearningTask, workspace: Workspace, on: Literal["rhs", "diagnostics"]):
    """What rows are like that the model knows (where some row is to be known), and that it does not."""
    problem, calibration = task.problem, task.calibration
    rng = workspace.rng(4)
    unknown, known = _Reference(), _Reference()

    def measure(examples: ExampleSet, rows: np.ndarray, kind: str) -> _Reference:
        values = workspace.trained_values(task.objective, task.adapter, examples, rows, on)
        check_finite(values.losses, examples, rows, kind)
        return _Reference.of(rows, values)

    if calibration is not None:
        if len(calibration) == 0:
            msg = "The set of calibration rows is empty; it has to show where removed rows should end."
            raise ValueError(msg)
        size = min(_NUM_CALIBRATION, len(calibration))
        unknown = measure(
            calibration, np.sort(rng.choice(len(calibration), size=size, replace=False)), "calibration"
        )
    if task.target_loss is not None:
        centre = float(log_odds(task.target_loss)) if unknown.none else unknown.centre
        unknown = dataclasses.replace(unknown, mean_loss=task.target_loss, centre=centre)
    rows = problem.retained
    if len(problem.wanted) and len(rows):
        if len(rows) > _NUM_KNOWN:
            rows = np.sort(rng.choice(rows, size=_NUM_KNOWN, replace=False))
        known = measure(problem.examples, rows, "retained")
    return known, unknown


def _parts(task: UnlearningTask, workspace: Workspace, on: Literal["rhs", "diagnostics"]) -> list[_Part]:
    """Named rows and replacements; of an edit the tokens that differ, and those that stay."""
    problem, objective = task.problem, task.objective
    parts = []
    by_tokens = objective.token_losses_fn is not None and len(problem.wanted) > 0
    tokens: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if by_tokens:
        pairs = np.concatenate([problem.edited, problem.wanted])
        workspace.budget.spend(on, FORWARD * len(pairs))
        stack = workspace.micro_batches(problem.examples, pairs)
        found = per_example(forward_values, stack, objective, task.adapter).tokens
        for row, ids, losses in zip(pairs.tolist(), *found, strict=True):
            tokens[row] = (ids[~np.isnan(losses)], losses[~np.isnan(losses)])
    for owner, (old, new) in enumerate(zip(problem.named.tolist(), problem.replacements.tolist(), strict=True)):
        if new < 0:
            parts.append(_Part(old, None, owner, Role.GOES))
            continue
        goes, wanted = differing_tokens(*tokens[old], *tokens[new]) if by_tokens else (None, None)
        parts += [_Part(old, goes, owner, Role.GOES), _Part(new, wanted, owner, Role.WANTED)]
        if goes is not None and not goes.all():
            parts.append(_Part(old, ~goes, owner, Role.STAYS))
    return parts


def differing_tokens(
    old_tokens: np.ndarray, old_losses: np.ndarray, new_tokens: np.ndarray, new_losses: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The loss tokens of two responses that an exchange is about.

    Those that the other response does not have, and shared ones that the model predicts worse in the new pair by
    more than 0.1 nats. Where there are none on either side the exchange is about all tokens.

    Args:
        old_tokens: [t] token ids as trained.
        old_losses: [t] their losses in nats.
        new_tokens: [u] token ids of the replacement.
        new_losses: [u] their losses in nats.

    Returns:
        Masks [t] and [u]; None for all tokens.
    """
    in_old, in_new = align_tokens(old_tokens, new_tokens)
    goes, wanted = np.ones(len(old_tokens), bool), np.ones(len(new_tokens), bool)
    sensitive = new_losses[in_new] - old_losses[in_old] > _SENSITIVE_ABOVE
    goes[in_old[~sensitive]] = False
    wanted[in_new[~sensitive]] = False
    if not goes.any() or not wanted.any():
        return None, None
    return goes, wanted


def _examples_of(problem: EditProblem, parts: list[_Part]) -> tuple[ExampleSet, np.ndarray]:
    """The set that holds the parts as rows, and their indices in it."""
    rows = np.array([part.row for part in parts], np.int64)
    if all(part.mask is None for part in parts):
        return problem.examples, rows
    view = TokenSubsets(problem.examples, rows, tuple(part.mask for part in parts))
    return view, np.arange(len(parts))


def _exchange(old: np.ndarray, new: np.ndarray, known: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of edited pairs and of their replacements, from the log-odds of both now."""
    persistence = 0.0
    if len(old) >= _LEAST_PAIRS and np.ptp(old) > 0 and np.ptp(new) > 0:
        persistence = max(float(np.corrcoef(old, new)[0, 1]), 0.0)
    new_ends = known + persistence * (old - known)
    old_ends = new.mean() + persistence * (new - new.mean())
    if max((old_ends - old).mean(), (new - new_ends).mean()) <= _NEGLIGIBLE_WAY:
        return old, new
    return old_ends, new_ends


def _gradient_gram(task: UnlearningTask, workspace: Workspace, rows: np.ndarray) -> Float[np.ndarray, "rows rows"]:
    """Inner products of the gradients of examples, or of their sketches where gradients do not fit."""
    objective, params, examples = task.objective, task.adapter, task.problem.examples
    key = jax.random.key(0)
    if rows_fit(len(rows), params, workspace.mesh):
        _, found = stored_rows(objective, params, workspace.micro_batches(examples, rows), "loss", key)
        return found.gram(found)
    stack = workspace.stack(examples, rows)
    _, sketches = sketch_rows(RowSet(objective, params, stack, key, "loss"), key, width=SKETCH_WIDTH)
    sketches = to_host(sketches).astype(np.float64)[example_places(stack)]
    return sketches @ sketches.T


def _find_copies(task: UnlearningTask, workspace: Workspace, on: Literal["rhs", "diagnostics"]) -> tuple[Copy, ...]:
    """The look-alikes of named rows whose gradients point the same way."""
    problem = task.problem
    pairs = [(s, int(j)) for s, found in enumerate(task.look_alikes or ()) for j in found]
    if not pairs:
        return ()
    rows = np.unique([*(int(problem.named[s]) for s, _ in pairs), *(j for _, j in pairs)])
    workspace.budget.spend(on, GRADIENT * len(rows))
    place = {row: number for number, row in enumerate(rows.tolist())}
    gram = _gradient_gram(task, workspace, rows)
    length = np.sqrt(np.maximum(np.diag(gram), np.finfo(np.float64).tiny))
    copies = []
    for s, j in pairs:
        a, b = place[int(problem.named[s])], place[j]
        cosine = float(gram[a, b] / (length[a] * length[b]))
        if cosine >= _LEAST_COSINE:
            copies.append(Copy(named=s, retained=j, cosine=cosine))
    return tuple(copies)


def _with_copies(
    start: np.ndarray,
    ends: np.ndarray,
    roles: np.ndarray,
    owners: np.ndarray,
    rows: np.ndarray,
    copies: tuple[Copy, ...],
) -> np.ndarray:
    """Ends of rows that go, where retained rows say the same.

    The regression has one regressor, the nearest copy: copies of one row say the same as each other.
    """
    ends = ends.copy()
    for owner in {copy.named for copy in copies}:
        nearest = max((copy for copy in copies if copy.named == owner), key=lambda copy: copy.cosine)
        held = start[np.flatnonzero((rows == nearest.retained) & (roles == Role.STAYS))[0]]
        weight = nearest.cosine / (1 + _KERNEL_RIDGE)
        for k in np.flatnonzero((owners == owner) & (roles == Role.GOES)):
            ends[k] = np.minimum(ends[k], ends[k] + weight * (held - ends[k]))
    return ends
