"""Exact unlearning by retraining, as a method: the oracle and no rival."""

from __future__ import annotations

import dataclasses
import time

from llmeraser_jax.rivals.ensemble import make_ensemble
from llmeraser_jax.rivals.ensemble_model import ensemble_model, place_ensemble
from llmeraser_jax.training import finetune
from llmeraser_jax.training.retrain import choose_seeds
from llmeraser_jax.unlearning import Result, UnlearningTask, Workspace
from llmeraser_jax.unlearning.budget import GRADIENT, Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrain:
    """Exact unlearning: training again on the edited data, from where the training began, once per seed.

    The oracle and no rival: its cost is what the others are there to avoid. Removals drop rows, edits replace them.
    Several seeds are returned as an ensemble, whose prediction is the mean of theirs: what held-out KL is measured
    against. Where the initial adapter is not known, every seed draws its own.

    Attributes:
        seeds: how many, or which; all must differ from the task's own.
    """

    seeds: int | tuple[int, ...] = 1

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Retrains; in a `workdir` finished seeds are not trained again.

        Raises:
            ValueError: invalid seeds.
            RunError: the training's hyper-parameters are not wholly known.
        """
        started = time.perf_counter()
        train = task.require_training()
        own = None if "seed" in task.unstated else train.seed
        chosen = choose_seeds(self.seeds, own=own, of="the trained adapter")
        retrained = [
            finetune(
                task.language_model,
                task.edited,
                dataclasses.replace(train, seed=seed),
                lora=task.initial_adapter(seed),
                workdir=None if task.workdir is None else task.workdir / "retrain" / f"seed_{seed}",
            )
            for seed in chosen
        ]
        model, params = task.language_model, retrained[0].lora
        if len(retrained) > 1:
            model = ensemble_model(model)
            params = place_ensemble(make_ensemble([result.lora for result in retrained]), model)
        return Result(
            model=model,
            params=params,
            before=task.adapter,
            cost=Cost(
                training=GRADIENT * train.epochs * len(task.edited) * len(chosen),
                retraining=task.cost_of_retraining,
            ),
            seconds=time.perf_counter() - started,
            details={"seeds": list(chosen), "losses": [result.loss for result in retrained]},
        )
