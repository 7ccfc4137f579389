"""The validity check: what a finished change did, row by row, and whether that is what was asked.

A mean hides a row. So every forget row is compared with its own target, removals, edited pairs and replacements
apart; and retained rows, drawn apart from those that any step protected, have bounds of their own that do not grow
with what was moved. Distances are in log-odds, in units of the spread of rows of their kind.

A row has arrived when it lies within three spreads of the mean of its kind, and has gone a quarter of its way if it
was further than 1.5 spreads from that mean. A group has arrived when

* its mean went at least half of its way, and is short of it by no more than a quarter or one unit, or two standard
  errors, or three tenths of its nats;
* no more rows lag by 1.5 spreads than chance allows among rows that arrived (99 %);
* all rows have arrived, or all but one in twenty where there are at least twenty.

A group that did not move, and is no further from its target than two standard errors, is not judged.

Bounds on harm are in units of the calibration rows' standard deviation in nats (1 where there are none): a retained
row may lose a tenth of it on average, and no more than one in twenty may lose all of it.
"""

from __future__ import annotations

import dataclasses
import enum
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import bdtr, ndtr

from llmeraser_jax import trees
from llmeraser_jax.losses import Objective, per_example
from llmeraser_jax.types import Batch, LoraParams
from llmeraser_jax.unlearning.budget import FORWARD, FORWARD_WITH_TANGENT
from llmeraser_jax.unlearning.targets import Role, RowTargets, check_finite, loss_of, row_id
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import Workspace

ROWS_PER_LAGGARD = 20  # of so many forget rows one may stay behind; none of fewer
_ARRIVED_SPREADS = 3.0
_LAGGING_SPREADS = 1.5
_CHANCE = 0.99
_LEAST_NATS = 0.1  # a row this close to its target has arrived, whatever its log-odds say
_ROW_SHARE = 0.25  # of its way that a row has to go
_LEAST_SHARE = 0.5  # of its way that a group has to go
_SHORT_SHARE, _SHORT_LOG_ODDS = 0.25, 1.0  # of its way, and log-odds, that a group's mean may be short
_ENOUGH_SHARE = 0.7  # of its target in nats, from which a group that goes is not short
_NEGLIGIBLE_WAY = 0.25  # log-odds; a group with less to go need not have moved
_OVERSHOOT_LOG_ODDS = 1.0  # that a group's mean may be beyond its target
_HARM_SHARE = 0.1  # of the calibration rows' standard deviation: what retained rows may lose on average
_LEAST_HARM = 0.05  # nats
_HARMED_SHARE = 0.05  # of retained rows that may lose more than a standard deviation
_UNSEEN_HARM_SHARE = 0.25  # of the standard deviation: what calibration rows may lose on average
_STAYS_FACTOR = 2.5  # copies and shared tokens of edits may lose so many times what retained rows may
_COPY_COSINE = 0.5  # of gradients, from which a retained row is named as saying the same
_PROBE_SIZE = 128


class Verdict(enum.StrEnum):
    """What the check says of a change."""

    COMPLETE = "complete"
    INCOMPLETE = "incomplete"
    HARMFUL = "harmful"
    NOT_JUDGED = "not judged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOutcome:
    """One forget row. Losses are means over the tokens that the request is about, in nats.

    Attributes:
        id: of the training example.
        part: `removed`, `as trained` (an edited pair) or `replacement`.
        before, target, after: losses; the target is None where nobody knows it.
        arrived: whether it is where it should be; None where there is no target.
        whole_before, whole_after: losses over the whole response; those above where the request is about all of it.
        copies: ids of retained rows that say the same, and so hold the row where it is.
    """

    id: str
    part: str
    before: float
    target: float | None
    after: float
    arrived: bool | None
    whole_before: float
    whole_after: float
    copies: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """Losses of a group of rows, nats per token."""

    mean: float
    median: float
    percentile_95: float
    worst: float

    @classmethod
    def of(cls, losses: np.ndarray) -> Distribution:
        """Of at least one row."""
        return cls(
            mean=float(losses.mean()),
            median=float(np.median(losses)),
            percentile_95=float(np.quantile(losses, 0.95)),
            worst=float(losses.max()),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupChange:
    """What happened to rows that should have stayed.

    Attributes:
        num_rows: how many were looked at.
        before, after: their losses.
        rise: of their losses, row by row.
        predicted: mean loss after the change by the quadratic model at the adapter before it (slope and
            Gauss-Newton curvature along the change); nan where it was not computed.
    """

    num_rows: int
    before: Distribution
    after: Distribution
    rise: Distribution
    predicted: float = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidityCheck:
    """What the whole change did.

    Attributes:
        verdict: one word.
        reasons: in words; why the verdict is no better, or what it rests on.
        rows: every forget row.
        retained: a seeded sample of retained rows; None where there are none.
        calibration: rows that were not trained on; None where none were given.
        harm_bound: nats per token that retained rows may lose on average.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    rows: tuple[RowOutcome, ...]
    retained: GroupChange | None
    calibration: GroupChange | None
    harm_bound: float

    @property
    def passed(self) -> bool:
        """Whether the change did what was asked and harmed nothing."""
        return self.verdict is Verdict.COMPLETE

    @property
    def failed(self) -> bool:
        """Whether the change is known to fall short or to harm."""
        return self.verdict in (Verdict.INCOMPLETE, Verdict.HARMFUL)

    @property
    def words(self) -> str:
        """Verdict and reasons."""
        return f"{self.verdict}: {'; '.join(self.reasons)}" if self.reasons else str(self.verdict)

    def mean_loss(self, part: str, when: str) -> float:
        """Mean of `before` or `after` over the rows of one part; nan where there are none."""
        losses = [getattr(row, when) for row in self.rows if row.part == part]
        return float(np.mean(losses)) if losses else math.nan


def _quadratic(objective: Objective, params: LoraParams, delta: LoraParams, batch: Batch):
    """Second-order prediction of the losses at `params + delta`, [batch]."""
    outputs, tangent = jax.jvp(lambda p: objective.outputs(p, batch), (params,), (delta,))

    def along(t):
        return objective.output_loss_fn(jax.tree.map(lambda o, d: o + t * d, outputs, tangent), batch)

    zero, one = jnp.zeros(()), jnp.ones(())
    slope_at = lambda t: jax.jvp(along, (t,), (one,))[1]  # noqa: E731
    slope, curvature = jax.jvp(slope_at, (zero,), (one,))
    return along(zero) + slope + 0.5 * curvature


class Validity:
    """Looks at the rows before a method moves; `check` looks again afterwards. Costs count as diagnostics."""

    def __init__(self, task: UnlearningTask, workspace: Workspace, targets: RowTargets):
        """Measures what should not move.

        Raises:
            ValueError: a retained row whose loss is not finite.
        """
        self.task, self.workspace, self.targets = task, workspace, targets
        # Apart from the streams of the methods' samples: what a step protects cannot show its harm.
        rng = workspace.rng(2**31 + 1)
        probe = task.problem.retained
        if len(probe) > _PROBE_SIZE:
            probe = np.sort(rng.choice(probe, size=_PROBE_SIZE, replace=False))
        self._probe = probe
        self._unseen = np.zeros(0, np.int64)
        if task.calibration is not None:
            size = min(_PROBE_SIZE, len(task.calibration))
            self._unseen = np.sort(rng.choice(len(task.calibration), size=size, replace=False))
        self._before = self._losses(task.adapter)
        check_finite(self._before[0], task.problem.examples, probe, "retained")
        self._whole_before = self._whole(task.adapter)

    def _row_losses(self, params: LoraParams, examples, rows: np.ndarray) -> np.ndarray:
        if params is self.task.adapter:
            return self.workspace.trained_values(self.task.objective, params, examples, rows, "diagnostics").losses
        self.workspace.budget.spend("diagnostics", FORWARD * len(rows))
        return self.workspace.row_values(self.task.objective, params, examples, rows).losses

    def _losses(self, params: LoraParams) -> tuple[np.ndarray, np.ndarray]:
        retained = self._row_losses(params, self.task.problem.examples, self._probe)
        if self.task.calibration is None:
            return retained, np.zeros(0)
        return retained, self._row_losses(params, self.task.calibration, self._unseen)

    def _whole(self, params: LoraParams) -> np.ndarray:
        """Losses of the targeted rows over their whole responses; nan where they are those already."""
        targets, examples = self.targets, self.task.problem.examples
        if targets.examples is examples:
            return np.full(len(targets.rows), math.nan)
        return self._row_losses(params, examples, targets.rows)

    def check(self, moved: LoraParams) -> ValidityCheck:
        """What a change from the adapter before to `moved` did."""
        targets, workspace = self.targets, self.workspace
        workspace.budget.spend("diagnostics", FORWARD * len(targets.indices))
        here = workspace.row_values(self.task.objective, moved, targets.examples, targets.indices)
        retained, unseen = self._losses(moved)
        unit = 1.0 if targets.unknown_spread is None else targets.unknown_spread
        bound = max(_HARM_SHARE * unit, _LEAST_HARM)
        finite = all(bool(np.all(np.isfinite(v))) for v in (here.log_odds, retained, unseen))
        if not finite:
            verdict, reasons = Verdict.HARMFUL, ["a loss is not finite after the change"]
            arrived = np.zeros(len(here.losses), bool)
        else:
            arrived = has_arrived(targets, here.log_odds)
            verdict, reasons = _judge(targets, here.log_odds, arrived)
            harm = _harm(self._before[0], retained, bound, unit, "retained")
            harm += _harm(
                self._before[1], unseen, max(_UNSEEN_HARM_SHARE * unit, 2 * bound), math.inf, "calibration"
            )
            stays = targets.roles == Role.STAYS
            risen = loss_of(here.log_odds[stays]) - loss_of(targets.start[stays])
            if stays.any() and risen.mean() > _STAYS_FACTOR * bound:
                harm.append(
                    "copies in the retain set and shared tokens of edits, which should stay, lost "
                    f"{risen.mean():.3g} nats on average (bound {_STAYS_FACTOR * bound:.2g})"
                )
            if harm:
                verdict, reasons = Verdict.HARMFUL, harm + reasons
        return ValidityCheck(
            verdict=verdict,
            reasons=tuple(reasons),
            rows=self._rows(here.losses, arrived, self._whole(moved)),
            retained=self._change(self._before[0], retained, moved),
            calibration=self._change(self._before[1], unseen, None),
            harm_bound=bound,
        )

    def _rows(self, after: np.ndarray, arrived: np.ndarray, whole: np.ndarray) -> tuple[RowOutcome, ...]:
        targets, problem = self.targets, self.task.problem
        before = loss_of(targets.start)
        rows = []
        for k in np.lexsort((targets.roles, targets.owners)):
            role = Role(int(targets.roles[k]))
            if role is Role.STAYS:
                continue
            owner = int(targets.owners[k])
            named = int(problem.named[owner])
            edited = problem.replacements[owner] >= 0
            has_target = not math.isnan(targets.ends[k])
            all_of_it = math.isnan(whole[k])
            rows.append(
                RowOutcome(
                    id=row_id(problem.examples, named),
                    part="replacement" if role is Role.WANTED else "as trained" if edited else "removed",
                    before=float(before[k]),
                    target=float(loss_of(targets.ends[k])) if has_target else None,
                    after=float(after[k]),
                    arrived=bool(arrived[k]) if has_target else None,
                    whole_before=float(before[k] if all_of_it else self._whole_before[k]),
                    whole_after=float(after[k] if all_of_it else whole[k]),
                    copies=tuple(
                        row_id(problem.examples, copy.retained)
                        for copy in targets.copies
                        if copy.named == owner and role is Role.GOES and copy.cosine >= _COPY_COSINE
                    ),
                )
            )
        return tuple(rows)

    def _change(self, before: np.ndarray, after: np.ndarray, moved: LoraParams | None) -> GroupChange | None:
        if len(before) == 0:
            return None
        predicted = math.nan
        if moved is not None:
            task, probe = self.task, self._probe
            self.workspace.budget.spend("diagnostics", FORWARD_WITH_TANGENT * len(probe))
            delta = trees.tree_sub(moved, task.adapter)
            stack = self.workspace.micro_batches(task.problem.examples, probe)
            predicted = float(per_example(_quadratic, stack, task.objective, task.adapter, delta).mean())
        return GroupChange(
            num_rows=len(before),
            before=Distribution.of(before),
            after=Distribution.of(after),
            rise=Distribution.of(after - before),
            predicted=predicted,
        )


def has_arrived(targets: RowTargets, here: np.ndarray) -> np.ndarray:
    """[m] whether each row is where rows of its kind are; true where nobody knows where that is."""
    where = _Where.of(targets, here)
    allowed = _ARRIVED_SPREADS * targets.spreads
    told_apart = where.way > _LAGGING_SPREADS * targets.spreads
    moved = ~told_apart | (where.moved >= _ROW_SHARE * where.way)
    arrived = (where.short <= allowed) & (where.beyond <= allowed + _OVERSHOOT_LOG_ODDS) & moved
    return (
        where.near
        | arrived
        | (where.enough & (where.beyond <= allowed + _OVERSHOOT_LOG_ODDS))
        | np.isnan(targets.ends)
    )


@dataclasses.dataclass(frozen=True)
class _Where:
    """Where rows are, in log-odds, signed so that forwards is positive; [m] each."""

    way: np.ndarray  # from the start to the mean of its kind
    moved: np.ndarray
    short: np.ndarray  # of that mean
    beyond: np.ndarray  # its end or that mean, whichever is further; of rows that go and were not there as trained
    near: np.ndarray  # whether the loss is close to that of the end, in nats
    enough: np.ndarray  # whether a row that goes has most of the loss of its end, or more

    @classmethod
    def of(cls, targets: RowTargets, here: np.ndarray) -> _Where:
        goes = targets.roles == Role.GOES
        sign = np.where(goes, 1.0, -1.0)
        known = ~np.isnan(targets.ends)
        ends, centres = (np.where(known, x, targets.start) for x in (targets.ends, targets.centres))
        furthest = np.maximum(ends, centres)
        return cls(
            way=sign * (centres - targets.start),
            moved=sign * (here - targets.start),
            short=sign * (centres - here),
            beyond=np.where(goes & (targets.start < furthest), here - furthest, -math.inf),
            near=np.abs(loss_of(here) - loss_of(ends)) <= _LEAST_NATS,
            enough=goes & (loss_of(here) >= _ENOUGH_SHARE * loss_of(ends)),
        )

    def at(self, which: np.ndarray) -> _Where:
        """Some of the rows."""
        return _Where(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))


def _judge(targets: RowTargets, here: np.ndarray, arrived: np.ndarray) -> tuple[Verdict, list[str]]:
    short, beyond, unclear = [], [], []
    removed = ~np.isin(targets.owners, targets.owners[targets.roles == Role.WANTED])
    goes, wanted = targets.roles == Role.GOES, targets.roles == Role.WANTED
    judged = ~np.isnan(targets.ends)
    groups = {"removed rows": goes & removed, "edited pairs": goes & ~removed, "replacements": wanted}
    for name, of_group in groups.items():
        which = of_group & judged
        if which.any():
            said = _judge_group(targets, here, which)
            for found, texts in zip((short, beyond, unclear), said, strict=True):
                found += [f"{name} {text}" for text in texts]
    rows = (goes | wanted) & judged
    missing = int((rows & ~arrived).sum())
    if missing > int(rows.sum()) // ROWS_PER_LAGGARD:
        short.append(f"{missing} of {int(rows.sum())} forget rows have not arrived")
    if beyond:
        return Verdict.HARMFUL, beyond + short
    if short:
        return Verdict.INCOMPLETE, short
    unknown = int((goes & ~judged).sum())
    if unknown:
        unclear.append(
            f"nothing shows where {unknown} forget rows should end; give calibration rows (--calibration), which "
            "were not trained on"
        )
    return (Verdict.NOT_JUDGED, unclear) if unclear else (Verdict.COMPLETE, [])


def _judge_group(
    targets: RowTargets, here: np.ndarray, which: np.ndarray
) -> tuple[list[str], list[str], list[str]]:
    """What a group lacks, how it went too far, and why it cannot be told."""
    rows, spreads = _Where.of(targets, here).at(which), targets.spreads[which]
    losses = (loss_of(x[which]).mean() for x in (targets.start, here, targets.ends))
    before, after, target = losses
    nats = f"{before:.3g} -> {after:.3g} nats, target {target:.3g}"
    near = abs(after - target) <= _LEAST_NATS
    enough = targets.roles[which][0] == Role.GOES and after >= _ENOUGH_SHARE * target
    short, beyond, unclear = [], [], []
    has_way = rows.way > 0
    if has_way.any() and not near:
        way, moved = rows.way[has_way].mean(), rows.moved[has_way].mean()
        error = 2 * float(spreads[has_way].mean()) / math.sqrt(has_way.sum())
        told = f"went {max(moved / way, 0):.0%} of their way ({nats})"
        if way > _NEGLIGIBLE_WAY and moved < _LEAST_SHARE * way:
            (short if way > error else unclear).append(told)
        elif way - moved > max(min(_SHORT_SHARE * way, _SHORT_LOG_ODDS), error) and not enough:
            short.append(told)
        if rows.beyond[has_way].mean() > max(_OVERSHOOT_LOG_ODDS, error):
            beyond.append(f"went too far ({nats})")
    lagging = int(((rows.short > _LAGGING_SPREADS * spreads) & ~rows.near & ~rows.enough).sum())
    # The quantile of a binomial distribution: how many of so many normal numbers lie that far out by chance.
    at_most = bdtr(np.arange(len(spreads) + 1.0), len(spreads), ndtr(-_LAGGING_SPREADS))
    by_chance = int(np.argmax(at_most >= _CHANCE))
    if not short and lagging > max(by_chance, len(spreads) // ROWS_PER_LAGGARD):
        short.append(f"lag: {lagging} of {len(spreads)} are far from their targets ({nats})")
    return short, beyond, unclear


def _harm(before: np.ndarray, after: np.ndarray, bound: float, row_bound: float, kind: str) -> list[str]:
    if len(before) == 0:
        return []
    rise = after - before
    told = f"{before.mean():.3g} -> {after.mean():.3g} nats"
    if rise.mean() > bound:
        return [f"{kind} rows were harmed: their mean loss went {told} (bound {bound:.2g})"]
    harmed = float((rise > row_bound).mean())
    if harmed > _HARMED_SHARE:
        return [f"{kind} rows were harmed: {harmed:.0%} of them lost more than {row_bound:.2g} nats ({told})"]
    return []
