"""What a request costs as it and the data grow, without retraining: cost, floor, and what the rows did.

    python -m experiments.fidelity.cost --workdir DIR [--num-rows 4000] [--shares 0.01 0.05 0.1]

Takes the trained model of the fidelity experiment in the same workdir, and trains it where it is missing. The
floor is what the right-hand sides of the steps taken cost alone: for each a gradient per named row and replacement.
"""

from __future__ import annotations

import dataclasses
import sys
from importlib.resources import as_file
from importlib.resources import files as resources
from pathlib import Path

import numpy as np
import tyro

from experiments.fidelity.main import CellId, study_of
from experiments.fidelity.methods import PAPER_EPOCHS, PAPER_SHARE
from experiments.fidelity.profiles import CATEGORIES, Category
from experiments.fidelity.tasks import profiles_task
from experiments.workdirs import claim_settings
from llmeraser_jax import files
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.models import load_model
from llmeraser_jax.unlearning import erase


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Which requests.

    Attributes:
        workdir: of the fidelity experiment.
        num_rows: n.
        shares: of the rows that are named.
        categories: of requests.
    """

    workdir: Path
    num_rows: int = 4000
    shares: tuple[float, ...] = (0.01, 0.05, 0.1)
    categories: tuple[Category, ...] = CATEGORIES


def main(config: CostConfig) -> None:
    """Erases, and prints a table."""
    say = sys.stdout.write
    task = profiles_task(config.num_rows)
    claim_settings(config.workdir / "tasks" / task.name, task.settings())
    results = []
    say(
        "| category | share | budget | pairs | steps | cost | cost / 5 epochs | cost / floor | loss on S "
        "| loss wanted | retained loss | outcome |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    with as_file(resources("llmeraser_jax.demo") / "base") as base:
        model = load_model(base)
        for share in config.shares:
            for category in config.categories:
                id_ = CellId(task=task.name, category=category, share=share)
                cell = study_of(config.workdir, id_, task, model, retrain_seeds=2)
                setting = cell.setting()
                five_epochs = float(PAPER_EPOCHS * len(setting.edited))
                problem = setting.problem
                pairs = len(problem.named) + len(problem.wanted)
                chosen = np.random.default_rng(0).choice(
                    problem.retained, min(400, len(problem.retained)), replace=False
                )
                rows = {"forget_loss": problem.named, "wanted_loss": problem.wanted, "retained_loss": chosen}

                def losses(lora, rows=rows, examples=problem.examples):
                    found = {key: score_examples(model, lora, examples, some).losses for key, some in rows.items()}
                    return {key: float(each.mean()) if len(each) else None for key, each in found.items()}

                before = losses(setting.lora)
                for budget in (None, PAPER_SHARE) if share <= 0.01 else (None,):
                    erase_config = dataclasses.replace(task.erase, method="matched", budget=budget)
                    result = erase(
                        model,
                        setting.lora,
                        setting.dataset,
                        setting.requests,
                        erase_config,
                        heldout=setting.heldout,
                        retrain_cost=five_epochs,
                    )
                    receipt, after = result.receipt, losses(result.lora)
                    cost = receipt.gradient_equivalents.total
                    row = {
                        "category": category,
                        "share": share,
                        "budget": budget,
                        "pairs": pairs,
                        "steps": len(receipt.steps),
                        "cost": cost,
                        "cost_of_5_epochs": cost / five_epochs,
                        "cost_over_floor": cost / (len(receipt.steps) * pairs),
                        **{key: [before[key], after[key]] for key in rows},
                        "seconds": receipt.seconds,
                        "outcome": receipt.outcome,
                    }
                    results.append(row)
                    say(f"{_line(row)}\n")
                    sys.stdout.flush()
    files.atomic_write_json(config.workdir / f"cost-{task.name}.json", results)


def _line(row: dict) -> str:
    def arrow(pair):
        return "–" if pair[0] is None else f"{pair[0]:.2f} → {pair[1]:.2f}"

    budget = "–" if row["budget"] is None else f"{row['budget']:.3f}"
    numbers = [
        f"{row['share']:g}",
        budget,
        str(row["pairs"]),
        str(row["steps"]),
        f"{row['cost']:.0f}",
        f"{row['cost_of_5_epochs']:.3f}",
        f"{row['cost_over_floor']:.2f}",
        arrow(row["forget_loss"]),
        arrow(row["wanted_loss"]),
        arrow(row["retained_loss"]),
        row["outcome"].split(":")[0],
    ]
    return f"| {row['category']} | " + " | ".join(numbers) + " |"


if __name__ == "__main__":
    main(tyro.cli(CostConfig))
