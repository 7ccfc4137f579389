"""`erase`: an adapter, the data it was tuned on and a list of requests, to a new adapter and its receipt."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.data import (
    Action,
    Request,
    TokenDataset,
    content_hash,
    edited_example,
    encode_examples,
    find_look_alikes,
    token_similarities,
)
from llmeraser_jax.environment import library_versions, peak_memory_bytes
from llmeraser_jax.lora import Lora, product_norms
from llmeraser_jax.losses import Objective, gradient_sum, lm_objective
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import place_stack, replicate
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.cost import GRADIENT, CostMeter
from llmeraser_jax.unlearning.dispatch import unlearn
from llmeraser_jax.unlearning.problem import EditProblem
from llmeraser_jax.unlearning.receipt import (
    GradientEquivalents,
    NamedExample,
    Receipt,
    summarise_solves,
)
from llmeraser_jax.unlearning.steps import StepRecord, Unlearned, UnlearningError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EraseResult:
    """What `erase` returns.

    Attributes:
        delta: the parameter change, a pytree like the adapter.
        lora: the new adapter, `old + delta`.
        receipt: what was done.
    """

    delta: Lora
    lora: Lora
    receipt: Receipt


def make_problem(model: Model, dataset: TokenDataset, requests: Sequence[Request]) -> EditProblem[TokenDataset]:
    """The requests as index arrays over the examples as trained, followed by their replacements.

    Args:
        model: its tokenizer encodes the replacements.
        dataset: the training set as it stood.
        requests: validated against `dataset.examples` (`data.load_requests`).

    Raises:
        ValueError: a replacement that the recipe cannot encode, or whose change is lost when its prompt is cut
            to the recipe's `max_length`; named by id.
    """
    if len(dataset.examples) != len(dataset):
        msg = "The data set was made without texts; use data.encode_examples, so that edits can be encoded."
        raise ValueError(msg)
    by_id = {request.id: request for request in requests}
    dataset.indices_of(by_id)
    named = np.array([i for i, example in enumerate(dataset.examples) if example.id in by_id], np.int64)
    replacements, edited = [], []
    for index in named:
        example = dataset.examples[index]
        replacement = edited_example(example, by_id[example.id])
        if replacement is None:
            replacements.append(-1)
        else:
            replacements.append(len(dataset) + len(edited))
            edited.append(replacement)
    together = encode_examples(
        (*dataset.examples, *edited),
        dataset.recipe,
        model.tokenizer,
        buckets=dataset.buckets,
        normalizer=dataset.normalizer,
    )
    if together.dropped_ids:
        msg = (
            f"The changed example {together.dropped_ids[0]!r} has no token under the loss within max_length = "
            f"{dataset.recipe.max_length}; request its removal."
        )
        raise ValueError(msg)
    replacements = np.array(replacements, np.int64)
    lost = [
        dataset.examples[i].id
        for i, j in zip(named, replacements, strict=True)
        if j >= 0 and np.array_equal(together.encoded[i].tokens, together.encoded[j].tokens)
    ]
    if lost:
        msg = (
            f"The changes to {', '.join(lost[:10])} leave the same tokens, since the changed part of the prompt "
            f"is cut off at max_length = {dataset.recipe.max_length}. There is nothing to erase for them."
        )
        raise ValueError(msg)
    return EditProblem(together, len(dataset), named, replacements)


def erase(
    model: Model,
    lora: Lora,
    dataset: TokenDataset,
    requests: Sequence[Request],
    config: EraseConfig | None = None,
    *,
    heldout: TokenDataset | None = None,
    retrain_cost: float | None = None,
    checkpoint_directory: Path | None = None,
    factors_directory: Path | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> EraseResult:
    """Makes the adapter forget, or remember differently, what the requests name.

    The parameter change is that of influence functions (LLMEraser: Ding et al., arXiv 2412.00383):
    `(C + rho I)^-1 (1/n) sum_S (g - g')`, taken in one step as they do, or along the influence path. The L2
    term belongs to each example, so a removal drops its share.

    Args:
        model: the base; its mesh, if it has one, is used.
        lora: the adapter trained on `dataset`.
        dataset: the training set as it stood, encoded with the recipe it was trained with.
        requests: what is to go or to change; from `data.load_requests`.
        config: how; `config.l2` must be the lambda of training.
        heldout: examples of the same kind that were not trained on, encoded alike: they show where removed
            rows should end. Without them requests with a removal go along the path, and whether the removed rows
            have arrived is not judged.
        retrain_cost: gradient equivalents of a retraining, which `config.budget` is a share of; where it is known
            and no budget is named, an erasure stops before it costs more.
        checkpoint_directory: where `config.stream` saves its solves.
        factors_directory: where solver `ekfac` keeps its factors: read where they are there, else made and saved;
            None makes them anew.
        on_step: called after every accepted step.

    Returns:
        The change, the new adapter and the receipt. The change is zero where the matched way finds every named pair
        where retraining would be expected to leave it; the receipt says so.

    Raises:
        UnlearningError: no usable step was found; there is no result.
        ValueError: no requests, or a replacement that cannot be encoded.
    """
    config = EraseConfig() if config is None else config
    if not requests:
        msg = "There are no requests; nothing to erase."
        raise ValueError(msg)
    started = time.perf_counter()
    problem = make_problem(model, dataset, requests)
    if config.similar_share > 0:
        problem = dataclasses.replace(problem, similarities=token_similarities(dataset, problem.named))
    if len(problem.retained):
        look_alikes = find_look_alikes(dataset, problem.named, problem.retained)
        problem = dataclasses.replace(problem, look_alikes=look_alikes)
    objective = lm_objective(model.apply, model.base, l2=config.l2)
    lora = replicate(lora, model.mesh)
    action_of = {request.id: request.action for request in requests}
    modified = [action_of[dataset.examples[i].id] is Action.MODIFY_QUERY for i in problem.named]
    moved = unlearn(
        objective,
        lora,
        problem,
        config,
        mesh=model.mesh,
        heldout=heldout,
        modified=np.array(modified, bool),
        retrain_cost=retrain_cost,
        checkpoint_directory=checkpoint_directory,
        factors_directory=factors_directory,
        on_step=on_step,
    )
    seconds = time.perf_counter() - started
    gradient_norms, num_sampled = _edited_gradient_norms(
        objective, (lora, moved.params), problem, config, moved.cost, model.mesh
    )
    delta = trees.tree_sub(moved.params, lora)
    delta_norm = float(trees.tree_norm(delta))
    if not np.isfinite(delta_norm) or (moved.steps and not delta_norm > 0):
        msg = f"The whole change has norm {delta_norm}; nothing was forgotten, and no adapter is written."
        raise UnlearningError(msg)
    receipt = _make_receipt(
        dataset, requests, problem, config, moved, seconds, gradient_norms, num_sampled, lora, delta
    )
    return EraseResult(delta=delta, lora=moved.params, receipt=receipt)


def _edited_gradient_norms(
    objective: Objective,
    adapters: Sequence[LoraParams],
    problem: EditProblem,
    config: EraseConfig,
    cost: CostMeter,
    mesh,
) -> tuple[list[float], int]:
    """`||grad L'||` of each adapter on the same examples; counted as diagnostics."""
    sample_size = None if config.audit else config.diagnostic_sample
    weighted = problem.edited_mean(sample_size, np.random.default_rng([config.seed, 2**31]))
    stack = problem.examples.stack(weighted.indices, weighted.weights, chunk_size=config.chunk_size)
    stack = place_stack(stack, mesh)
    norms = [float(trees.tree_norm(gradient_sum(objective, adapter, stack))) for adapter in adapters]
    cost.diagnostics += GRADIENT * len(weighted.indices) * len(adapters)
    return norms, len(weighted.indices)


@jax.jit
def bf16_survival(old: LoraParams, delta: LoraParams) -> jax.Array:
    """`<round(old + delta) - round(old), delta> / ||delta||^2`, rounding to bfloat16: 1 where nothing is lost."""

    def rounded(tree):
        return jax.tree.map(lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7), tree)

    survived = trees.tree_sub(rounded(trees.tree_add(old, delta)), rounded(old))
    size = trees.tree_vdot(delta, delta)
    return jnp.where(size > 0, trees.tree_vdot(survived, delta) / size, 1.0)


def _outcome(moved: Unlearned) -> str:
    if not moved.steps:
        return (
            "complete: the adapter is unchanged; the forget rows are already where retraining would be expected to "
            "leave them"
        )
    check = moved.validity
    told = "not judged" if check is None else check.words
    notes = []
    shortened = sum(step.scale < 1 for step in moved.steps)
    if moved.final_weight > 0:
        what = "way to their targets" if moved.method == "matched" else "weight"
        notes.append(f"{moved.final_weight:.2g} of the forget rows' {what} is left")
    if shortened:
        notes.append(f"{shortened} of {len(moved.steps)} steps shortened by the trust region")
    if moved.stopped:
        notes.append(f"stopped early: {moved.stopped}")
    if moved.attempts:
        notes.append(f"tried and not kept: {'; '.join(moved.attempts)}")
    return f"{told} ({'; '.join(notes)})" if notes else told


def _first_standard_error(moved: Unlearned) -> float | None:
    error = moved.steps[0].standard_error if moved.steps else math.nan
    return None if math.isnan(error) else error


def _make_receipt(
    dataset: TokenDataset,
    requests: Sequence[Request],
    problem: EditProblem,
    config: EraseConfig,
    moved: Unlearned,
    seconds: float,
    gradient_norms: list[float],
    num_sampled: int,
    lora: Lora,
    delta: Lora,
) -> Receipt:
    by_id = {example.id: example for example in dataset.examples}
    named = []
    for request in requests:
        after = edited_example(by_id[request.id], request)
        named.append(
            NamedExample(
                id=request.id,
                action=str(request.action),
                hash_before=content_hash(by_id[request.id]),
                hash_after=None if after is None else content_hash(after),
            )
        )
    actions = [example.action for example in named]
    cost = moved.cost
    product_change, product_before = product_norms(lora, delta)
    rhs_norm = 0.0
    if moved.steps:
        first = moved.steps[0]
        rhs_norm = first.rhs_norm / ((first.weight_before - first.weight_after) / first.scale)
    return Receipt(
        config=config,
        counts={action: actions.count(action) for action in ("remove", "modify_query", "correct_response")},
        named=tuple(named),
        num_examples_before=problem.num_trained,
        num_examples_after=problem.num_edited_total,
        method=moved.method,
        complete=moved.complete,
        validity=moved.validity,
        targets=None if moved.targets is None else moved.targets.losses,
        outcome=_outcome(moved),
        final_weight=moved.final_weight,
        rhs_norm=rhs_norm,
        solver=summarise_solves(moved.steps),
        steps=moved.steps,
        num_correctors=moved.num_correctors,
        corrected=moved.corrected,
        attempts=moved.attempts,
        curvature_reason=moved.curvature_reason,
        step_standard_error=_first_standard_error(moved),
        product_asymmetry=moved.asymmetry,
        delta_norm=float(trees.tree_norm(delta)),
        adapter_norm_before=float(trees.tree_norm(lora)),
        adapter_norm_after=float(trees.tree_norm(moved.params)),
        product_change_norm=float(product_change),
        product_norm_before=float(product_before),
        bf16_survival=float(bf16_survival(lora, delta)),
        edited_gradient_norm_before=gradient_norms[0],
        edited_gradient_norm_after=gradient_norms[1],
        gradient_norm_examples=num_sampled,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        gradient_equivalents=GradientEquivalents(
            rhs=cost.rhs,
            curvature=cost.curvature,
            trust_region=cost.trust_region,
            total=cost.total,
            diagnostics=cost.diagnostics,
            retraining=None if math.isnan(cost.retraining) else cost.retraining,
            share_of_retraining=None if math.isnan(cost.retraining) else cost.total / cost.retraining,
        ),
        versions=library_versions(),
    )
