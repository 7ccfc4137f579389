"""Numbers about models on examples: response losses, held-out KL, and answers to the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax.data import Example, TokenDataset, encode_examples, turn_ends
from llmeraser_jax.evaluation.extraction import extraction_strengths
from llmeraser_jax.evaluation.forgetting import HeldOutKL, HeldOutKLResult
from llmeraser_jax.evaluation.membership import min_k_plus_plus_scores, min_k_scores
from llmeraser_jax.evaluation.tasks import Metric, exact_match, yes_no_accuracy, yes_no_auc
from llmeraser_jax.models import Model, generate
from llmeraser_jax.parallel import place_batch, to_host, whole_shares
from llmeraser_jax.types import BaseParams, LoraParams, TokenBatch

_CHUNK_SIZE = 16
_SPARE_TOKENS = 4  # a generated answer may run this much longer than the longest expected one


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExampleScores:
    """One model's view of some examples' responses, in the order they were asked for.

    Attributes:
        losses: mean over the response's tokens, in nats, whatever the recipe averages the training loss over.
        log_probs: log-probability of all the response's tokens together, in nats.
        min_k, min_k_plus_plus: see `membership`, k = 20.
        extraction: extraction strength, the end-of-sequence token left out.
    """

    losses: Float[np.ndarray, " examples"]
    log_probs: Float[np.ndarray, " examples"]
    min_k: Float[np.ndarray, " examples"]
    min_k_plus_plus: Float[np.ndarray, " examples"]
    extraction: Float[np.ndarray, " examples"]


class TokenStatistics(NamedTuple):
    """What a model predicts at every loss position.

    Attributes:
        target_log_probs: log-probability of the token that is there, in nats.
        means: mean of `log p(v)` over tokens v drawn from the prediction (minus its entropy).
        deviations: standard deviation of the same.
        hits: whether the token that is there is the most probable one.
    """

    target_log_probs: Float[Array, "batch response"]
    means: Float[Array, "batch response"]
    deviations: Float[Array, "batch response"]
    hits: Bool[Array, "batch response"]


@partial(jax.jit, static_argnames="apply")
def _log_probs(apply, base: BaseParams, lora, batch: TokenBatch) -> Float[Array, "batch response vocab"]:
    logits = apply(base, lora, *batch.inputs)
    return jax.nn.log_softmax(logits, axis=-1)


def token_statistics(
    log_probs: Float[Array, "batch response vocab"], targets: Int[Array, "batch response"]
) -> TokenStatistics:
    """Log-probability of each target, moments of `log p` under the prediction itself, and greedy hits."""
    probs = jnp.exp(log_probs)
    means = jnp.sum(jnp.where(probs > 0, probs * log_probs, 0), axis=-1)
    # Centred: the difference of the second moment and the squared mean cancels where one token has all the mass.
    squares = jnp.where(probs > 0, probs * (log_probs - means[..., None]) ** 2, 0)
    return TokenStatistics(
        target_log_probs=jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0],
        means=means,
        deviations=jnp.sqrt(jnp.sum(squares, axis=-1)),
        hits=jnp.argmax(log_probs, axis=-1) == targets,
    )


@partial(jax.jit, static_argnames="apply")
def _token_statistics(apply, base: BaseParams, lora, batch: TokenBatch) -> TokenStatistics:
    return token_statistics(_log_probs(apply, base, lora, batch), batch.targets)


def _batches(model: Model, dataset: TokenDataset, indices: np.ndarray) -> Iterator[tuple[np.ndarray, TokenBatch]]:
    """Micro-batches on the device(s), each with the places in `indices` that its first rows belong to."""
    size = whole_shares(_CHUNK_SIZE, model.mesh)
    stack = dataset.stack(indices, np.ones(len(indices)), chunk_size=size)
    order = np.argsort([dataset.bucket_of(int(i)) for i in indices], kind="stable")
    for batches, weights in zip(stack.batches, stack.weights, strict=True):
        for chunk, row_weights in enumerate(np.asarray(weights)):
            batch = jax.tree.map(lambda leaf, chunk=chunk: leaf[chunk], batches)
            count = int(np.count_nonzero(row_weights))
            yield order[:count], place_batch(batch, model.mesh)
            order = order[count:]


def score_examples(
    model: Model, lora: LoraParams | None, dataset: TokenDataset, indices: np.ndarray | None = None
) -> ExampleScores:
    """Losses and log-probabilities of the examples' responses.

    Args:
        model: the base, or what reads `lora` in its place.
        lora: what `model.apply` reads; None is the base alone.
        dataset: encoded examples.
        indices: which; None is all, in order.
    """
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    losses, log_probs, min_k, min_k_plus_plus, extraction = (np.zeros(len(indices)) for _ in range(5))
    if len(indices):
        for rows, batch in _batches(model, dataset, indices):
            statistics = _token_statistics(model.apply, model.base, lora, batch)
            token_log_probs, means, deviations, hits = (x[: len(rows)] for x in to_host(statistics))
            token_log_probs = token_log_probs.astype(np.float64)
            width = token_log_probs.shape[1]
            response, text = _response_masks(dataset, indices[rows], width)
            log_probs[rows] = np.where(response, token_log_probs, 0).sum(1)
            losses[rows] = -log_probs[rows] / response.sum(1)
            min_k[rows] = min_k_scores(token_log_probs, response)
            min_k_plus_plus[rows] = min_k_plus_plus_scores(token_log_probs, means, deviations, response)
            extraction[rows] = extraction_strengths(hits, text)
    return ExampleScores(
        losses=losses, log_probs=log_probs, min_k=min_k, min_k_plus_plus=min_k_plus_plus, extraction=extraction
    )


def _response_masks(dataset: TokenDataset, indices: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Which loss positions [examples, width] hold the response, with its end token and without it."""
    encoded = [dataset.encoded[i] for i in indices]
    starts = np.array([np.searchsorted(e.targets, e.response_start) for e in encoded])
    lengths = np.array([len(e.response) for e in encoded])
    place = np.arange(width)
    after_prompt = place >= starts[:, None]
    ends = (starts + lengths)[:, None]
    return after_prompt & (place < ends), after_prompt & (place < ends - bool(dataset.recipe.add_eos))


def heldout_kl_of(
    model: Model, heldout: TokenDataset, candidates: Mapping[str, LoraParams], retrained: Sequence[LoraParams]
) -> HeldOutKLResult:
    """Held-out KL of every candidate to the retrained models, one micro-batch of vocabularies at a time.

    Args:
        model: the base of all.
        heldout: held-out prompts with their responses.
        candidates: what to judge, by name; `model.apply` reads each.
        retrained: adapters retrained with different seeds, at least two.

    Raises:
        ValueError: fewer than two retrained models.
    """
    accumulator = HeldOutKL()
    for rows, batch in _batches(model, heldout, np.arange(len(heldout))):
        mask = to_host(batch.target_weights) > 0
        mask[len(rows) :] = False

        def log_probs(lora, batch=batch):
            return to_host(_log_probs(model.apply, model.base, lora, batch))

        accumulator.update(
            {name: log_probs(lora) for name, lora in candidates.items()},
            [log_probs(lora) for lora in retrained],
            mask,
        )
    return accumulator.result()


def answer(
    model: Model, lora: LoraParams | None, dataset: TokenDataset, indices: np.ndarray | None = None
) -> list[str]:
    """Greedy answers to the examples' queries, special tokens removed.

    They end where training ended responses, or where the base model does.

    Args:
        model: the base; one with a method `generate` generates by that.
        lora: what `model.apply` reads; None is the base alone.
        dataset: encoded examples; their responses only bound the length.
        indices: which; None is all, in order.
    """
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    longest = max((len(dataset.encoded[i].response) for i in indices), default=0)
    prompts = [dataset.encoded[i].prompt.tolist() for i in indices]
    length = longest + _SPARE_TOKENS
    trained_end = model.tokenizer.eos_token_id
    ends = turn_ends((dataset.encoded[i] for i in indices), model.tokenizer)
    stops = sorted({*model.config.eos_token_ids, *ends, *(() if trained_end is None else (trained_end,))})
    by_model = getattr(model, "generate", partial(generate, model))
    images = dataset.images_of(indices)
    pictures = {} if images is None else {"images": images}
    tokens = by_model(lora, prompts, length, batch_size=_CHUNK_SIZE, stop_ids=stops, **pictures)
    return [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]


def _yes_no_responses(examples: Sequence[Example]) -> tuple[str, str] | None:
    """The responses that mean yes and no, where every example has one of them and both occur."""
    found = {example.response for example in examples}
    by_word = {response.strip(" .\n").casefold(): response for response in found}
    if len(found) == 2 and by_word.keys() == {"yes", "no"}:
        return by_word["yes"], by_word["no"]
    return None


def make_task_metrics(model: Model, heldout: TokenDataset) -> TaskMetrics:
    """The task that the held-out examples pose: yes/no where all answers are, else exact match."""
    pair = _yes_no_responses(heldout.examples)
    if pair is None:
        return TaskMetrics(model=model, heldout=heldout, alternatives=None, labels=None)
    alternatives = tuple(
        encode_examples(
            [dataclasses.replace(example, response=response) for example in heldout.examples],
            heldout.recipe,
            model.tokenizer,
            buckets=heldout.buckets,
            normalizer=heldout.normalizer,
        )
        for response in pair
    )
    labels = np.array([example.response == pair[0] for example in heldout.examples])
    return TaskMetrics(model=model, heldout=heldout, alternatives=alternatives, labels=labels)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TaskMetrics:
    """Measures adapters on the held-out task; call it with one.

    Attributes:
        model: the base, or what reads adapters in its place.
        heldout: the test set.
        alternatives: for a yes/no task, the test set with every response yes, and with every response no.
        labels: for a yes/no task, where yes is right.
    """

    model: Model
    heldout: TokenDataset
    alternatives: tuple[TokenDataset, ...] | None
    labels: np.ndarray | None

    def __call__(self, lora: LoraParams | None) -> tuple[Metric, ...]:
        """Accuracy and AUC of a yes/no task; exact match of greedy answers otherwise.

        Without an end-of-sequence token in the recipe nothing was taught to end: an answer that begins with the
        whole response is a match then.
        """
        if self.alternatives is not None and self.labels is not None:
            yes, no = (score_examples(self.model, lora, data).log_probs for data in self.alternatives)
            return (yes_no_accuracy(yes, no, self.labels), yes_no_auc(yes, no, self.labels))
        expected = [example.response for example in self.heldout.examples]
        open_ended = np.arange(len(expected))
        if not self.heldout.recipe.add_eos:
            open_ended = np.flatnonzero(score_examples(self.model, lora, self.heldout).extraction < 1)
        answers = list(expected)
        for place, text in zip(open_ended, answer(self.model, lora, self.heldout, open_ended), strict=True):
            answers[place] = text
        return (exact_match(answers, expected),)
