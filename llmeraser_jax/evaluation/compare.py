"""Measures before, unlearned, retrained and the controls side by side: `Comparison`, the input of a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from llmeraser_jax import trees
from llmeraser_jax.baselines.controls import gradient_ascent, scaled_rhs
from llmeraser_jax.data import Request, TokenDataset
from llmeraser_jax.evaluation.forgetting import membership_loss_auc, membership_min_k_auc
from llmeraser_jax.evaluation.report import Comparison, Cost, ModelScores, SolverTrace
from llmeraser_jax.evaluation.scoring import TaskMetrics, heldout_kl_of, make_task_metrics, score_examples
from llmeraser_jax.lora import Lora
from llmeraser_jax.losses import lm_objective
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import place_stack
from llmeraser_jax.unlearning.erase import make_problem
from llmeraser_jax.unlearning.problem import EditProblem

_CHUNK_SIZE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One adapter of a comparison.

    Attributes:
        name: its heading, e.g. "seed 1".
        lora: the adapter.
        cost: what it took; None where unknown.
    """

    name: str
    lora: Lora
    cost: Cost | None = None


def make_controls(
    model: Model, before: Lora, unlearned: Lora, problem: EditProblem, *, l2: float
) -> tuple[Column, ...]:
    """The controls `c*b` and gradient ascent, moved exactly as far as the unlearned adapter was.

    Args:
        model: the base.
        before: the adapter that was edited.
        unlearned: the adapter after.
        problem: the request.
        l2: lambda of training.
    """
    objective = lm_objective(model.apply, model.base, l2=l2)
    weighted = problem.influence_rhs()
    stack = problem.examples.stack(weighted.indices, weighted.weights, chunk_size=_CHUNK_SIZE)
    stack = place_stack(stack, model.mesh)
    distance = float(trees.tree_norm(trees.tree_sub(unlearned, before)))
    columns = []
    for name, control in (("c*b", scaled_rhs), ("gradient ascent", gradient_ascent)):
        result = control(objective, before, stack, distance=distance, num_examples=len(weighted.indices))
        cost = Cost(seconds=result.seconds, gradient_equivalents=result.gradient_equivalents)
        columns.append(Column(name=name, lora=result.params, cost=cost))
    return tuple(columns)


def compare(
    model: Model,
    dataset: TokenDataset,
    requests: Sequence[Request],
    heldout: TokenDataset | None,
    *,
    before: Column,
    unlearned: Column,
    retrained: Sequence[Column] = (),
    l2: float = 0.0,
    solves: Sequence[SolverTrace] = (),
    context: Mapping[str, str] | None = None,
) -> Comparison:
    """Scores every model on the named examples and on the held-out ones.

    Args:
        model: the base of all.
        dataset: the training set as it stood before the request.
        requests: the request.
        heldout: examples that no model was trained on; None leaves out what needs them.
        before, unlearned, retrained: the models.
        l2: lambda of training, for the controls.
        solves: of the erasure, for the report.
        context: for the top of the page.
    """
    problem = make_problem(model, dataset, requests)
    controls = make_controls(model, before.lora, unlearned.lora, problem, l2=l2)
    task = None if heldout is None else make_task_metrics(model, heldout)

    def scores(column: Column) -> ModelScores:
        return _score(model, problem, heldout, task, column)

    heldout_kl = None
    if heldout is not None and len(retrained) >= 2:
        judged = {column.name: column.lora for column in (before, unlearned, *controls)}
        heldout_kl = heldout_kl_of(model, heldout, judged, [column.lora for column in retrained])
    action_of = {request.id: str(request.action) for request in requests}
    ids = tuple(dataset.examples[i].id for i in problem.named)
    return Comparison(
        ids=ids,
        actions=tuple(action_of[id_] for id_ in ids),
        before=scores(before),
        unlearned=scores(unlearned),
        retrained=tuple(scores(column) for column in retrained),
        controls=tuple(scores(column) for column in controls),
        heldout_kl=heldout_kl,
        solves=tuple(solves),
        context=dict(context or {}),
    )


def _score(
    model: Model,
    problem: EditProblem[TokenDataset],
    heldout: TokenDataset | None,
    task: TaskMetrics | None,
    column: Column,
) -> ModelScores:
    examples = problem.examples
    forget = score_examples(model, column.lora, examples, problem.named)
    wanted = score_examples(model, column.lora, examples, problem.wanted)
    if heldout is None or task is None:
        return ModelScores(
            name=column.name, forget_losses=forget.losses, wanted_losses=wanted.losses, cost=column.cost
        )
    outside = score_examples(model, column.lora, heldout)
    return ModelScores(
        name=column.name,
        forget_losses=forget.losses,
        wanted_losses=wanted.losses,
        heldout_losses=outside.losses,
        task_metrics=task(column.lora),
        membership_aucs=(
            membership_loss_auc(forget.losses, outside.losses),
            membership_min_k_auc(forget.min_k, outside.min_k),
        ),
        cost=column.cost,
    )
