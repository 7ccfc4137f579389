"""What preconditioners and approximate inverses are worth on a real LoRA problem, their own set-up counted.

    python -m experiments.preconditioners.main --workdir DIR

fine-tunes the demo's base on fictional people (`experiments.fidelity`), asks for the removal of some of them, and
solves `(C + rho I) x = b` with the operator and the right-hand side of the influence path: at its start, where the
named rows are memorised, and at its end, where they are forgotten and nearly all of their weight is gone. Writes
`results.json` and prints the table.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.resources import as_file
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from llmeraser_jax.unlearning.cost import BACKWARD, FORWARD

from experiments.fidelity.profiles import NUM_HELDOUT_PEOPLE, write_rows
from experiments.fidelity.tasks import profiles_task
from llmeraser_jax import files, trees
from llmeraser_jax.checkpoint import restore_pytree, save_pytree
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, LinearisedCurvature, linearise
from llmeraser_jax.curvature.factor import FactoredCurvature, factored_curvature
from llmeraser_jax.curvature.kfac import EkFac, ekfac, example_factors
from llmeraser_jax.curvature.taps import token_factors
from llmeraser_jax.data import encode_examples
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.lora import Lora
from llmeraser_jax.losses import Objective, gradient_sum, lm_objective, loss_sum, weight_sum
from llmeraser_jax.models import load_model
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.solvers.direct import DirectInverse
from llmeraser_jax.solvers.spectral import (
    SpectralPreconditioner,
    factored_preconditioner,
    nystroem_from_products,
    sketch_probes,
)
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.types import ExampleStack, LoraParams, Preconditioner
from llmeraser_jax.unlearning import EraseConfig, erase, make_problem

logger = logging.getLogger("preconditioners")

PRODUCT = CURVATURES["gauss-newton"].gradient_equivalents
TARGETS = (0.1, 0.01)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreconditionersConfig:
    """What is measured.

    Attributes:
        workdir: the trained model is kept there, and `results.json`.
        num_rows: training rows of the profiles.
        share: of them that are to be removed.
        dampings: rho; the L2 term's 1e-3 comes on top.
        sample_size: retained rows behind the operator, as in the path's default.
        ranks: of Nystroem.
        draws: random roots per row of the factored curvature.
        points: where: `start` and `end` of the path.
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


@dataclasses.dataclass(frozen=True)
class Point:
    """One system but for its damping."""

    name: str
    params: Lora
    stack: ExampleStack
    operator: LinearisedCurvature  # sum_i c_i G(z_i), the L2 term included
    rhs: Lora
    num_examples: int  # behind the operator


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A preconditioner made once for a point.

    Attributes:
        with_mu: the preconditioner for a damping with the L2 term's share; None is plain conjugate gradients.
        setup: gradient equivalents.
        direct: whether it is an approximate inverse too.
        amortised: whether one set-up serves all requests on the same adapter.
    """

    with_mu: Callable[[float], Preconditioner | None]
    setup: float
    setup_seconds: float = 0.0
    direct: bool = False
    amortised: bool = False


def candidates(
    config: PreconditionersConfig, objective: Objective, point: Point, trained: ExampleStack, num_trained: int
) -> dict[str, Candidate]:
    """Everything that is compared, by name.

    Args:
        config: what is measured.
        objective: the loss.
        point: where.
        trained: all training rows with the coefficients of their mean, for factors that are kept.
        num_trained: how many these are.
    """
    key, another = jax.random.split(jax.random.key(config.seed))
    n, params = point.num_examples, point.params
    l2 = objective.l2 * float(weight_sum(point.stack))
    made: dict[str, Candidate] = {"none": Candidate(lambda mu: None, 0.0)}

    def add(name: str, fn, setup: float, **flags) -> None:
        started = time.perf_counter()
        found = jax.block_until_ready(fn())
        seconds = time.perf_counter() - started
        made[name] = Candidate(found.with_mu, setup, seconds, **flags)
        logger.info("%s: %s made in %.1f s", point.name, name, seconds)

    # The largest sketch and the most draws are made once; smaller ones are their beginnings.
    probes = sketch_probes(key, params, rank=max(config.ranks))
    products = [_mv(point.operator, jax.tree.map(lambda x, i=i: x[i], probes)) for i in range(max(config.ranks))]
    for rank in config.ranks:
        first = jax.tree.map(lambda x, rank=rank: x[:rank], probes)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *products[:rank])
        add(
            f"Nystroem, rank {rank}",
            partial(nystroem_from_products, first, stacked, mu=l2),
            (FORWARD + rank) * n,
            direct=True,
        )
    drawn = _factored(objective, params, point.stack, key, max(config.draws))
    for draws in config.draws:
        add(
            f"factored, {draws} draws",
            partial(_fewer_draws, drawn, max(config.draws), draws),
            (FORWARD + draws * BACKWARD) * n,
            direct=True,
        )
    for basis, fn in (("examples", _example_factors), ("tokens", _token_factors)):
        for data, stack, count in (("sample", point.stack, n), ("all rows", trained, num_trained)):
            add(
                f"EK-FAC ({basis}, {data})",
                partial(_ekfac_of, fn, objective, params, stack, key, another),
                2 * (FORWARD + BACKWARD) * count,
                direct=True,
                amortised=data == "all rows",
            )
    return made


_mv = jax.jit(lambda operator, v: operator.mv(v))


@partial(jax.jit, static_argnames="draws")
def _factored(objective, params, stack, key, draws: int) -> FactoredCurvature:
    return factored_curvature(objective, params, stack, key, damping=0.0, num_roots=draws)


def _fewer_draws(curvature: FactoredCurvature, drawn: int, draws: int) -> SpectralPreconditioner:
    keep = np.arange(len(curvature.weights)) % drawn < draws
    rows = jax.tree.map(lambda x: x[keep], curvature.rows)
    return factored_preconditioner(FactoredCurvature(rows, curvature.weights[keep] * drawn / draws, 0.0))


_example_factors, _token_factors, _ekfac = jax.jit(example_factors), jax.jit(token_factors), jax.jit(ekfac)


def _ekfac_of(find_factors, objective, params, stack, key, another) -> EkFac:
    factors = find_factors(objective, params, stack, key)
    return _ekfac(objective, params, stack, another, factors=factors, damping=0.0)


_SOLVER = ConjugateGradients(rtol=1e-3, max_steps=1000)
_advance = jax.jit(_SOLVER.advance)  # apart from the product, which is compiled once for all preconditioners
_init = jax.jit(_SOLVER.init)


def _true_residual(operator: Damped, rhs: LoraParams, x: LoraParams) -> float:
    return float(trees.tree_norm(trees.tree_sub(rhs, _mv(operator, x))) / trees.tree_norm(rhs))


class _Compiled:
    """An operator whose products are compiled once, for solvers outside jit."""

    positive_semidefinite = True

    def __init__(self, operator: Damped | LinearisedCurvature):
        self.mv = partial(_mv, operator)


def steps_to_targets(
    operator: Damped, rhs: LoraParams, preconditioner: Preconditioner | None, max_steps: int, targets
) -> tuple[dict[float, int | None], LoraParams, float]:
    """Products until the true relative residual is at each target, the last iterate and its residual."""
    state = _init(rhs, preconditioner)
    rhs_sq = state.residual_sq
    reached: dict[float, int | None] = dict.fromkeys(targets)
    for count in range(1, max_steps + 1):
        state = _advance(state, _mv(operator, state.direction), rhs_sq, preconditioner)
        recurrence = float(np.sqrt(state.residual_sq / rhs_sq))
        if any(found is None and recurrence <= target for target, found in reached.items()):
            actual = _true_residual(operator, rhs, state.x)
            for target in targets:
                if reached[target] is None and actual <= target:
                    reached[target] = count
        if all(found is not None for found in reached.values()) or not bool(state.running):
            break
    return reached, state.x, _true_residual(operator, rhs, state.x)


def compare(x: LoraParams, exact: LoraParams, operator: Damped, rhs: LoraParams) -> dict[str, float]:
    """An approximate solution against one that conjugate gradients found."""

    def lowered(v):
        return float(trees.tree_vdot(rhs, v) - 0.5 * trees.tree_vdot(v, _mv(operator, v)))

    norms = float(trees.tree_norm(x)), float(trees.tree_norm(exact))
    return {
        "cosine": float(trees.tree_vdot(x, exact)) / norms[0] / norms[1],
        "length_ratio": norms[0] / norms[1],
        "relative_error": float(trees.tree_norm(trees.tree_sub(x, exact))) / norms[1],
        "share_of_quadratic": lowered(x) / lowered(exact),
    }


def measure(config: PreconditionersConfig) -> dict[str, Any]:
    """Trains, if need be, measures, and writes `results.json`."""
    task = profiles_task(config.num_rows)
    drawn = task.draw("removal", config.share, 0)
    if not (config.workdir / "data" / "train.jsonl").exists():
        write_rows(config.workdir / "data", drawn.train, drawn.heldout)
    with as_file(resources("llmeraser_jax.demo") / "base") as base:
        model = load_model(base)
    run = finetune_run(
        model,
        config.workdir / "data" / "train.jsonl",
        config.workdir / "run",
        recipe=task.recipe,
        lora=task.lora,
        config=task.train,
    )
    started = time.perf_counter()
    dataset = run.encode(run.load_examples(), model.tokenizer)
    lora = run.load_adapter(model)
    objective = lm_objective(model.apply, model.base, l2=task.train.l2)
    problem = make_problem(model, dataset, drawn.requests)
    unseen = encode_examples(drawn.heldout[: 2 * NUM_HELDOUT_PEOPLE], task.recipe, model.tokenizer)
    forgotten_path = config.workdir / "forgotten"
    if not forgotten_path.exists():
        erasing = EraseConfig(l2=objective.l2, chunk_size=32)
        save_pytree(forgotten_path, erase(model, lora, dataset, drawn.requests, erasing, heldout=unseen).lora)
    forgotten = restore_pytree(forgotten_path, lora)
    chunk = 16

    def stack_of(weighted):
        return problem.examples.stack(weighted.indices, weighted.weights, chunk_size=chunk)

    named = stack_of(problem.influence_rhs())
    trained = stack_of(problem.trained_mean(None, np.random.default_rng(0)))
    result: dict[str, Any] = {
        "config": dataclasses.asdict(config) | {"workdir": None},
        "devices": describe_devices(),
        "versions": library_versions(),
        "num_named": len(problem.named),
        "num_trained": problem.num_trained,
        "size": trees.tree_size(lora),
        "points": {},
    }
    for name, params, weight in (("start", lora, 0.98), ("end", forgotten, 0.02)):
        if name not in config.points:
            continue
        weighted = problem.path_mean(weight, config.sample_size, np.random.default_rng([config.seed, 1]))
        stack = stack_of(weighted)
        point = Point(
            name=name,
            params=params,
            stack=stack,
            operator=linearise(DatasetCurvature(objective, params, stack, CURVATURES["gauss-newton"])),
            rhs=gradient_sum(objective, params, named),
            num_examples=len(weighted.indices),
        )
        for measured in measure_point(config, objective, point, named, trained, problem.num_trained):
            result["points"][name] = measured
            result["seconds"] = time.perf_counter() - started
            files.atomic_write_json(config.workdir / "results.json", result)  # what is there so far
    return result


def measure_point(
    config: PreconditionersConfig,
    objective: Objective,
    point: Point,
    named: ExampleStack,
    trained: ExampleStack,
    num_trained: int,
) -> Iterator[dict[str, Any]]:
    """All candidates, one damping more in every result."""
    per_product = PRODUCT * point.num_examples
    l2 = objective.l2 * float(weight_sum(point.stack))
    tried = candidates(config, objective, point, trained, num_trained)
    loss_of = partial(_mean_loss, objective, named)
    rows: list[dict[str, Any]] = []
    for damping in config.dampings:
        operator, mu = Damped(point.operator, damping), damping + l2
        exact, at = None, len(rows)
        directly: dict[str, LoraParams] = {}
        for name, candidate in tried.items():
            preconditioner = candidate.with_mu(mu)
            targets = (*TARGETS, 1e-3) if name == "none" else TARGETS
            reached, x, residual = steps_to_targets(operator, point.rhs, preconditioner, config.max_steps, targets)
            if exact is None or residual < exact[1]:
                exact = (x, residual)
            logger.info("%s, damping %g, %s: %s", point.name, damping, name, reached)
            setup = candidate.setup / per_product
            row: dict[str, Any] = {
                "damping": damping,
                "preconditioner": name,
                "setup_products": setup,
                "setup_gradient_equivalents": candidate.setup,
                "setup_seconds": candidate.setup_seconds,
                "amortised": candidate.amortised,
                "steps": {str(target): reached[target] for target in TARGETS},
                "total_products": {
                    str(target): None if (steps := reached[target]) is None else setup + steps for target in TARGETS
                },
                "gradient_equivalents": {
                    str(target): None
                    if (steps := reached[target]) is None
                    else steps * per_product + candidate.setup
                    for target in TARGETS
                },
                "last_true_residual": residual,
            }
            if candidate.direct and preconditioner is not None:
                solution = DirectInverse(preconditioner).solve(_Compiled(operator), point.rhs)
                directly[name] = solution.value
                row["direct"] = {
                    "relative_residual": float(solution.relative_residual),
                    "status": int(solution.status),
                }
            rows.append(row)
        assert exact is not None
        for row in rows[at:]:
            if (x := directly.get(row["preconditioner"])) is not None:
                row["direct"] |= compare(x, exact[0], operator, point.rhs)
                row["direct"]["loss_of_named"] = loss_of(trees.tree_add(point.params, x))
            row["loss_of_named_exact"] = loss_of(trees.tree_add(point.params, exact[0]))
            row["residual_of_exact"] = exact[1]
        yield {
            "num_examples": point.num_examples,
            "loss_of_named": loss_of(point.params),
            "rhs_norm": float(trees.tree_norm(point.rhs)),
            "rows": rows,
        }


def _mean_loss(objective: Objective, stack: ExampleStack, params: Lora) -> float:
    return float(loss_sum(objective, params, stack) / weight_sum(stack))


def render(result: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = []
    for name, point in result["points"].items():
        lines += [
            f"### At the path's {name}: {point['num_examples']} examples, loss of the named rows "
            f"{point['loss_of_named']:.3f}",
            "",
            "| damping | preconditioner | set-up | steps to 0.1 | to 0.01 | products to 0.1 | to 0.01 |"
            " direct: residual | cosine | length | share of quadratic | loss of named |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in point["rows"]:
            steps = [_shown(row["steps"][str(t)], "{}") for t in TARGETS]
            totals = [_shown(row["total_products"][str(t)], "{:.1f}") for t in TARGETS]
            direct = row.get("direct")
            cells = (
                [
                    f"{direct['relative_residual']:.3g}",
                    f"{direct['cosine']:.3f}",
                    f"{direct['length_ratio']:.2f}",
                    f"{direct['share_of_quadratic']:.2f}",
                    f"{direct['loss_of_named']:.3f} ({row['loss_of_named_exact']:.3f})",
                ]
                if direct
                else [""] * 5
            )
            columns = [
                f"{row['damping']:g}",
                row["preconditioner"],
                f"{row['setup_products']:.1f}",
                *steps,
                *totals,
            ]
            lines.append("| " + " | ".join([*columns, *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def _shown(value: float | None, template: str) -> str:
    return "-" if value is None else template.format(value)


def main(config: PreconditionersConfig) -> None:
    """Measures and prints."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    result = measure(config)
    print(render(result))


if __name__ == "__main__":
    main(tyro.cli(PreconditionersConfig))
