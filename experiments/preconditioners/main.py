"""What preconditioners save on a real LoRA problem, their own set-up counted.

    python -m experiments.preconditioners.main --workdir DIR

fine-tunes the demo's base on fictional people (`experiments.fidelity`), asks for the removal of some of them, and
solves `(C + rho I) x = b` with the operator and the right-hand side of the influence path: at its start, where the
named rows are memorised, and at its end, where they are forgotten and nearly all of their weight is gone. Each
damping's solves at each point are one file, and a second call computes what is missing.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.common import claim_settings, load_demo_base, log_progress
from experiments.fidelity.profiles import NUM_HELDOUT_PEOPLE, ProfilesTask, make_requests
from llmeraser_jax import files, trees
from llmeraser_jax.checkpoint import restore_pytree, save_pytree
from llmeraser_jax.curvature import (
    CURVATURES,
    Damped,
    DatasetCurvature,
    FactoredCurvature,
    ekfac,
    example_factors,
    factored_curvature,
    linearise,
)
from llmeraser_jax.curvature.taps import token_factors
from llmeraser_jax.data import save_examples
from llmeraser_jax.evaluation.render import MISSING, Page, Table, render_text, write_page
from llmeraser_jax.losses import gradient_sum, weight_sum
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.solvers.spectral import factored_preconditioner, nystroem_from_products, sketch_probes
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import erase, task_of_run
from llmeraser_jax.unlearning.budget import BACKWARD, FORWARD

logger = logging.getLogger("preconditioners")

PRODUCT = CURVATURES["gauss-newton"].gradient_equivalents
TARGETS = (0.1, 0.01)
POINTS = {"start": 0.98, "end": 0.02}  # weight of the named rows
CHUNK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreconditionersConfig:
    """What is measured.

    Attributes:
        workdir: everything is kept there.
        num_rows: training rows of the profiles.
        share: of them that are to be removed.
        dampings: rho; the L2 term's 1e-3 comes on top.
        sample_size: retained rows behind the operator, as in the path's default.
        ranks: of Nystroem.
        draws: random roots per row of the factored curvature.
        points: where on the path.
        max_steps: of conjugate gradients.
        seed: of samples and random vectors.
    """

    workdir: Path
    num_rows: int = 400
    share: float = 0.05
    dampings: tuple[float, ...] = (7e-3, 1e-3, 1e-4)
    sample_size: int = 64
    ranks: tuple[int, ...] = (8, 32, 64)
    draws: tuple[int, ...] = (1, 2, 8)
    points: tuple[Literal["start", "end"], ...] = ("start", "end")
    max_steps: int = 150
    seed: int = 0


_mv = jax.jit(lambda operator, v: operator.mv(v))
_factored = jax.jit(partial(factored_curvature, damping=0.0), static_argnames="num_roots")
_ekfac = jax.jit(partial(ekfac, damping=0.0))


def candidates(config: PreconditionersConfig, objective, params, operator, stack, count, trained, num_trained):
    """Everything that is compared: name -> (a preconditioner that knows its damping by `with_mu`, set-up cost).

    Args:
        config: what is measured.
        objective: the loss.
        params: the adapter.
        operator: of the system, without damping.
        stack, count: the examples behind it with their coefficients, and how many these are.
        trained, num_trained: all training rows with the coefficients of their mean, for factors that are kept.
    """
    key, another = jax.random.split(jax.random.key(config.seed))
    l2 = objective.l2 * float(weight_sum(stack))
    made: dict[str, tuple[Any, float]] = {"none": (None, 0.0)}
    # The largest sketch and the most draws are made once; smaller ones are their beginnings.
    probes = sketch_probes(key, params, rank=max(config.ranks))
    products = [_mv(operator, jax.tree.map(lambda x, i=i: x[i], probes)) for i in range(max(config.ranks))]
    for rank in config.ranks:
        first = jax.tree.map(lambda x, rank=rank: x[:rank], probes)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *products[:rank])
        made[f"Nystroem, rank {rank}"] = (nystroem_from_products(first, stacked, mu=l2), (FORWARD + rank) * count)
    most = max(config.draws)
    drawn = _factored(objective, params, stack, key, num_roots=most)
    for draws in config.draws:
        keep = np.arange(len(drawn.weights)) % most < draws
        rows = jax.tree.map(lambda x, keep=keep: x[keep], drawn.rows)
        fewer = FactoredCurvature(rows, drawn.weights[keep] * most / draws, 0.0)
        made[f"factored, {draws} draws"] = (factored_preconditioner(fewer), (FORWARD + draws * BACKWARD) * count)
    for basis, find in (("examples", jax.jit(example_factors)), ("tokens", jax.jit(token_factors))):
        for name, rows, number in (("sample", stack, count), ("all rows", trained, num_trained)):
            factors = find(objective, params, rows, key)
            found = _ekfac(objective, params, rows, another, factors=factors)
            made[f"EK-FAC ({basis}' basis, {name})"] = (found, 2 * (FORWARD + BACKWARD) * number)
    return made


_SOLVER = ConjugateGradients(rtol=1e-3, max_steps=1000)
_advance, _init = jax.jit(_SOLVER.advance), jax.jit(_SOLVER.init)  # apart from the product, which is compiled once


def steps_to_targets(operator: Damped, rhs: LoraParams, preconditioner, max_steps: int) -> list[int | None]:
    """Products until the true relative residual is at each target; None where it never was."""
    state = _init(rhs, preconditioner)
    rhs_sq = state.residual_sq
    reached: list[int | None] = [None] * len(TARGETS)
    for count in range(1, max_steps + 1):
        state = _advance(state, _mv(operator, state.direction), rhs_sq, preconditioner)
        recurrence = float(np.sqrt(state.residual_sq / rhs_sq))
        if any(found is None and recurrence <= target for target, found in zip(TARGETS, reached, strict=True)):
            rest = trees.tree_norm(trees.tree_sub(rhs, _mv(operator, state.x)))
            actual = float(rest / trees.tree_norm(rhs))
            pairs = zip(TARGETS, reached, strict=True)
            reached = [count if found is None and actual <= target else found for target, found in pairs]
        if None not in reached or not bool(state.running):
            break
    return reached


def measure(config: PreconditionersConfig) -> Iterator[dict[str, Any]]:
    """Trains, if need be, and solves; the rows of each point and damping as they are done."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "workdir"}
    claim_settings(config.workdir, {k: v for k, v in settings.items() if k not in ("dampings", "points")})
    task, model = ProfilesTask(num_rows=config.num_rows), load_demo_base()
    drawn = task.draw()
    requests = make_requests(drawn, "removal", config.share)
    path = config.workdir / "train.jsonl"
    save_examples(path, drawn.train)
    run = finetune_run(model, path, config.workdir / "run", recipe=task.recipe, lora=task.lora, config=task.train)
    unseen = drawn.heldout[: 2 * NUM_HELDOUT_PEOPLE]
    unlearning = task_of_run(run, requests, model=model, calibration=unseen)
    lora, objective, problem = unlearning.adapter, unlearning.objective, unlearning.problem
    forgotten = config.workdir / "forgotten"
    if not forgotten.exists():
        save_pytree(forgotten, erase(unlearning, chunk_size=32).params)
    adapters = {"start": lora, "end": restore_pytree(forgotten, lora)}

    def stack_of(weighted):
        return problem.examples.stack(weighted.indices, weighted.weights, chunk_size=CHUNK)

    trained = stack_of(problem.trained_mean(None, np.random.default_rng(0)))
    for point in config.points:
        paths = {rho: config.workdir / "results" / f"{point}-{rho:g}.json" for rho in config.dampings}
        if not all(path.exists() for path in paths.values()):
            rng = np.random.default_rng([config.seed, 1])
            weighted = problem.path_mean(POINTS[point], config.sample_size, rng)
            stack, count, params = stack_of(weighted), len(weighted.indices), adapters[point]
            operator = linearise(DatasetCurvature(objective, params, stack, CURVATURES["gauss-newton"]))
            rhs = gradient_sum(objective, params, stack_of(problem.influence_rhs()))
            tried = candidates(config, objective, params, operator, stack, count, trained, problem.num_trained)
        for rho, path in paths.items():
            if not path.exists():
                rows = []
                for name, (preconditioner, setup) in tried.items():
                    mu = rho + objective.l2 * float(weight_sum(stack))
                    given = None if preconditioner is None else preconditioner.with_mu(mu)
                    steps = steps_to_targets(Damped(operator, rho), rhs, given, config.max_steps)
                    rows.append({"preconditioner": name, "setup": setup / (PRODUCT * count), "steps": steps})
                    logger.info("%s, damping %g, %s: %s", point, rho, name, steps)
                path.parent.mkdir(exist_ok=True)
                files.atomic_write_json(path, rows)
            yield from ({"point": point, "damping": rho, **row} for row in files.read_json(path))


def table(rows: list[dict[str, Any]]) -> Table:
    """Products until the true relative residual is at each target, set-up included."""
    columns = list(dict.fromkeys((row["point"], row["damping"]) for row in rows))
    by_name: dict[str, dict[Any, str]] = {}
    for row in rows:
        totals = [MISSING if steps is None else f"{row['setup'] + steps:.0f}" for steps in row["steps"]]
        cells = by_name.setdefault(row["preconditioner"], {"set-up": f"{row['setup']:.1f}"})
        cells[row["point"], row["damping"]] = " / ".join(totals)
    header = ("preconditioner", "set-up", *(f"{point}, {damping:g}" for point, damping in columns))
    lines = ((name, cells["set-up"], *(cells.get(column, MISSING) for column in columns))
             for name, cells in by_name.items())  # fmt: skip
    return Table(header, tuple(lines))


def main(config: PreconditionersConfig) -> None:
    """Measures and prints the table."""
    log_progress("preconditioners")
    shown = table(list(measure(config)))
    write_page(Page("Products to a relative residual of 0.1 / 0.01, set-up included", (shown,)), config.workdir)
    sys.stdout.write(render_text([shown]))


if __name__ == "__main__":
    main(tyro.cli(PreconditionersConfig))
