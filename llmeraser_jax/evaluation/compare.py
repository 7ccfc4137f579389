"""Measures before, unlearned, retrained and the controls side by side: `Comparison`, the input of a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.baselines.controls import gradient_ascent, scaled_rhs
from llmeraser_jax.data import Request, TokenDataset, content_hash
from llmeraser_jax.evaluation.membership import (
    mean_of_others,
    membership_auc,
    membership_loss_auc,
    membership_min_k_auc,
    reference_scores,
)
from llmeraser_jax.evaluation.report import Comparison, Cost, ModelScores, SolverTrace
from llmeraser_jax.evaluation.scoring import (
    ExampleScores,
    heldout_kl_of,
    make_task_metrics,
    score_examples,
)
from llmeraser_jax.evaluation.tasks import Metric
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
    """The controls `c*b`, as far away as the unlearned adapter is, and gradient ascent along a path of that length.

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
    shown: Collection[str] = (),
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
        shown: content hashes of examples that the erasing was shown as never trained on. It takes them for where
            removed ones should end, so that they are no non-members of membership inference.
        solves: of the erasure, for the report.
        context: for the top of the page.
    """
    problem = make_problem(model, dataset, requests)
    controls = make_controls(model, before.lora, unlearned.lora, problem, l2=l2)
    task = None if heldout is None else make_task_metrics(model, heldout)

    views = {column.name: _view(model, problem, heldout, column.lora) for column in (before, unlearned, *controls)}
    views |= {column.name: _view(model, problem, heldout, column.lora) for column in retrained}
    base = None if heldout is None else _view(model, problem, heldout, None)
    outside = np.array([content_hash(e) not in shown for e in (() if heldout is None else heldout.examples)], bool)
    told_apart = {name: _without(view, outside) for name, view in views.items()}
    of_base = None if base is None else _without(base, outside)
    of_retrained = [told_apart[column.name] for column in retrained]

    def scores(column: Column, left_out: int | None = None) -> ModelScores:
        view = views[column.name]
        return ModelScores(
            name=column.name,
            forget_losses=view.forget.losses,
            wanted_losses=view.wanted.losses,
            heldout_losses=np.zeros(0) if view.heldout is None else view.heldout.losses,
            extraction_strengths=view.forget.extraction,
            task_metrics=() if task is None else task(column.lora),
            membership_aucs=_membership(told_apart[column.name], of_base, of_retrained, left_out)
            if outside.any()
            else (),
            cost=column.cost,
        )

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
        retrained=tuple(scores(column, position) for position, column in enumerate(retrained)),
        controls=tuple(scores(column) for column in controls),
        heldout_kl=heldout_kl,
        num_nonmembers=int(outside.sum()),
        solves=tuple(solves),
        context=dict(context or {}),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _View:
    """One model's view of the named examples as trained and as wanted, and of the held-out ones."""

    forget: ExampleScores
    wanted: ExampleScores
    heldout: ExampleScores | None


def _view(
    model: Model, problem: EditProblem[TokenDataset], heldout: TokenDataset | None, lora: Lora | None
) -> _View:
    return _View(
        forget=score_examples(model, lora, problem.examples, problem.named),
        wanted=score_examples(model, lora, problem.examples, problem.wanted),
        heldout=None if heldout is None else score_examples(model, lora, heldout),
    )


def _without(view: _View, kept: np.ndarray) -> _View:
    """The view with those held-out examples alone that are kept."""
    if view.heldout is None:
        return view
    scores = {field.name: getattr(view.heldout, field.name)[kept] for field in dataclasses.fields(ExampleScores)}
    return dataclasses.replace(view, heldout=ExampleScores(**scores))


def _membership(
    view: _View, base: _View | None, retrained: Sequence[_View], left_out: int | None
) -> tuple[Metric, ...]:
    """Every attack on one model; `left_out` is its own place among the retrained ones, if it is one."""
    inside, outside = view.forget, view.heldout
    if outside is None or base is None or base.heldout is None:
        return ()
    aucs = [
        membership_loss_auc(inside.losses, outside.losses),
        membership_min_k_auc(inside.min_k, outside.min_k),
        membership_auc("min_k_plus_plus", inside.min_k_plus_plus, outside.min_k_plus_plus),
        _reference_auc("reference_base", view, base.forget.losses, base.heldout.losses),
    ]
    members = mean_of_others([other.forget.losses for other in retrained], left_out)
    others = mean_of_others([other.heldout.losses for other in retrained if other.heldout is not None], left_out)
    if len(retrained) >= 2 and members is not None and others is not None:
        aucs.append(_reference_auc("reference_retrained", view, members, others))
    return tuple(aucs)


def _reference_auc(name: str, view: _View, members: np.ndarray, others: np.ndarray) -> Metric:
    assert view.heldout is not None
    return membership_auc(
        name, reference_scores(view.forget.losses, members), reference_scores(view.heldout.losses, others)
    )
