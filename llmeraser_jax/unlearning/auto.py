"""The default: target matching, and the influence path where that has no targets or fails its check."""

from __future__ import annotations

import dataclasses
import logging
import time

import numpy as np

from llmeraser_jax.unlearning.judged import Mover, conclude, judge
from llmeraser_jax.unlearning.matching import TargetMatching
from llmeraser_jax.unlearning.path import Path
from llmeraser_jax.unlearning.records import NoStepError, UnlearningError
from llmeraser_jax.unlearning.result import Result
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto:
    """Tries one method, and another one where the first has no targets, no step, or fails the validity check.

    Both share one budget. Where the second fails too, the first one's adapter is returned, not called complete.

    Attributes:
        first: needs targets.
        fallback: needs none.
    """

    first: TargetMatching = TargetMatching()
    fallback: Mover = Path()

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Runs the methods and judges the result.

        Raises:
            UnlearningError: neither found a step.
            ValueError: a row whose loss is not finite.
        """
        started = time.perf_counter()
        objective = task.objective
        # A loss that is no negative log-likelihood has no log-odds to match.
        matchable = objective.log_odds_fn is not None and objective.output_root_fn is not None
        knows_targets = (
            task.calibration is not None
            or task.target_loss is not None
            or bool(np.all(task.problem.replacements >= 0))
        )
        if not (matchable and knows_targets):
            return conclude(self, task, workspace, judge(self.fallback, task, workspace), started)
        try:
            first = judge(self.first, task, workspace)
        except NoStepError as error:
            logger.warning("Target matching found no step (%s); falling back.", error)
            judged = judge(self.fallback, task, workspace)
            return conclude(self, task, workspace, judged, started, attempts=(f"target matching: {error}",))
        if first.check is None or not first.check.failed:
            return conclude(self, task, workspace, first, started)
        logger.warning("Target matching did not do what was asked (%s); falling back.", first.check.words)
        try:
            second = judge(self.fallback, task, workspace, targets=first.targets)
        except UnlearningError as error:
            attempts, complete = (f"fallback: {error}",), False
            return conclude(self, task, workspace, first, started, attempts=attempts, complete=complete)
        if second.check is not None and second.check.passed:
            attempts = (f"target matching: {first.check.words}",)
            return conclude(self, task, workspace, second, started, attempts=attempts)
        verdict = second.moved.stopped if second.check is None else second.check.words
        verdict += f"; {second.moved.stopped}" if second.moved.stopped else ""
        attempts = (f"{second.moved.method}: {verdict}",)
        return conclude(self, task, workspace, first, started, attempts=attempts, complete=False)
