"""Owns the question whether a recipe is the one that an adapter was trained with, asked of a sample of its data.

The right recipe is the one whose tokens the adapter knows best. What stands before the response (template, BOS) and
how it ends are judged by the loss of the response. Which other tokens were under the loss cannot be seen from
means, since other tokens have other losses; there the question is whether the adapter has learned them at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llmeraser_jax import data, losses, parallel
from llmeraser_jax.data import BucketShape, Example, Recipe, TokenDataset
from llmeraser_jax.losses import Objective
from llmeraser_jax.types import LoraParams

_log = logging.getLogger(__name__)

_TEMPLATES = ("none", "plain", "alpaca", "tallrec", "qa", "chat")
_TIME_MULTIPLE = 16
_MAX_TOKENS = 1024  # of a micro-batch, whose logits are as many times the vocabulary
WORSE_BY = 1.25  # a stated recipe is much worse than another above this ratio and this difference
WORSE_BY_NATS = 0.05
NOTED_BY = 1.05  # above this ratio it is noted
BETTER_THAN_BASE = 0.8  # of the base's loss: what another recipe has to be below
LEARNED = 0.5  # tokens whose loss fell below this share of the base's have been learned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe that may have been the training's, and the loss of the sample's responses by it.

    Attributes:
        recipe: resolved.
        words: what sets it apart, e.g. "template 'qa' without BOS".
        loss: mean over examples of the mean loss of the response's tokens, in nats.
    """

    recipe: Recipe
    words: str
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFit:
    """How a stated recipe compares with others on a sample.

    Attributes:
        stated: the recipe as stated.
        best: what fits best of all that were tried, the stated one included.
        num_tried: recipes that give different tokens.
        token_loss: mean over tokens under the stated recipe's loss: what trainers report.
        hints: tokens that seem to have been under the loss and are not, or the other way round, in words.
        shown: the first row of the sample as the stated recipe renders it, the part under the loss marked.
    """

    stated: Candidate
    best: Candidate
    num_tried: int
    token_loss: float
    hints: tuple[str, ...]
    shown: str

    @property
    def note(self) -> str | None:
        """In words, that another recipe fits somewhat better; None where none does, or much better."""
        if self.problem or self.stated.loss <= NOTED_BY * self.best.loss:
            return None
        return (
            f"{self.best.words} gives {self.best.loss:.4g}, the stated recipe {self.stated.loss:.4g} (mean loss of "
            "the responses of a sample); look at a row as it is rendered (--show-examples)."
        )

    @property
    def problem(self) -> str | None:
        """In words, that another recipe fits much better; None where none does."""
        if self.stated.loss <= WORSE_BY * self.best.loss + WORSE_BY_NATS:
            return None
        return (
            f"{self.best.words} gives {self.best.loss:.4g}, the stated recipe {self.stated.loss:.4g} (mean loss of "
            "the responses of a sample); did you mean that?"
        )


def compare_recipes(
    objective: Objective,
    lora: LoraParams,
    examples: Sequence[Example],
    recipe: Recipe,
    tokenizer: Any,
    *,
    start: LoraParams | None = None,
    mesh: Mesh | None = None,
) -> RecipeFit:
    """Tries a recipe and others that make sense for the same rows.

    Tried are all templates that can show the rows, with and without BOS, the other setting of EOS and the other way
    to tokenise; and the same around what is best so far, until nothing is better. A recipe counts as better only if
    the adapter has lowered the loss of its responses.

    Args:
        objective: of the base model.
        lora: the adapter.
        examples: a sample of the training data; rows that a recipe cuts or drops are left out of it.
        recipe: as stated.
        tokenizer: the model's.
        start: the adapter untrained; None is the base alone.
        mesh: devices to share micro-batches out over.

    Raises:
        ValueError: no row of the sample has a token under the stated recipe's loss.
    """
    measured = _Measured(objective, examples, tokenizer, start, mesh)
    first = dataclasses.replace(recipe, loss_on="response") if recipe.loss_on == "all" else recipe
    measured.make_room(first, *_neighbours(first, tokenizer))
    stated = measured.try_recipe(first, lora, "the stated recipe")
    if stated is None:
        msg = f"None of {len(examples)} sampled rows has a token under the loss as the recipe renders them."
        raise ValueError(msg)
    best, found = None, [stated]
    while best is not found[0]:
        best = found[0]
        tried = [measured.try_recipe(r, lora, _words(r, first)) for r in _neighbours(best.recipe, tokenizer)]
        found += [candidate for candidate in tried if candidate is not None]
        found.sort(key=lambda c: c.loss)
    best = next(c for c in found if c is stated or c.loss < BETTER_THAN_BASE * measured.loss(c.recipe, None))
    return RecipeFit(
        stated=stated,
        best=best,
        num_tried=len(found),
        token_loss=measured.token_loss(recipe, lora),
        hints=tuple(_hints(measured, recipe, lora)),
        shown=data.marked_text(measured.encode(recipe).encoded[0], tokenizer),
    )


class _Measured:
    """Losses of the sample under any recipe; tokens that were measured once are not measured again."""

    def __init__(
        self,
        objective: Objective,
        examples: Sequence[Example],
        tokenizer: Any,
        start: LoraParams | None,
        mesh: Mesh | None,
    ) -> None:
        self._objective, self._examples, self._tokenizer = objective, examples, tokenizer
        self._start, self._mesh = start, mesh
        self._seen: set[tuple[str, ...]] = set()
        self._sums: dict[tuple[Recipe, bool], tuple[np.ndarray, np.ndarray, tuple[str, ...]]] = {}
        self._shape = BucketShape(time=_TIME_MULTIPLE, response=1)

    def encode(self, recipe: Recipe) -> TokenDataset:
        """The sample in one shape, which only grows, so that few programs are compiled."""
        with _without_warnings():
            dataset = data.encode_examples(
                self._examples, dataclasses.replace(recipe, reduction="example"), self._tokenizer
            )
        time = max(len(e.tokens) for e in dataset.encoded) + 1
        response = max(e.num_targets for e in dataset.encoded)
        time = max(self._shape.time, -(-time // _TIME_MULTIPLE) * _TIME_MULTIPLE)
        self._shape = BucketShape(
            time=time, response=max(self._shape.response, min(2 ** (response - 1).bit_length(), time - 1))
        )
        return TokenDataset(
            dataset.encoded,
            dataset.recipe,
            buckets=[self._shape],
            examples=dataset.examples,
            features=dataset.features,
        )

    def make_room(self, *recipes: Recipe) -> None:
        """Finds the shape that the rows need by any of the recipes that can show them."""
        for recipe in recipes:
            with contextlib.suppress(ValueError, FileNotFoundError):
                self.encode(recipe)

    def try_recipe(self, recipe: Recipe, lora: LoraParams, words: str) -> Candidate | None:
        """None where the recipe cannot show the rows, or gives the tokens of one that was tried already."""
        try:
            dataset = self.encode(recipe)
        except (ValueError, FileNotFoundError) as error:
            _log.debug("%s: %s", words, error)
            return None
        hashes = tuple(dataset.token_sha256.values())
        if hashes in self._seen:
            return None
        self._seen.add(hashes)
        return Candidate(recipe=dataset.recipe, words=words, loss=self.loss(recipe, lora))

    def loss(self, recipe: Recipe, lora: LoraParams | None) -> float:
        """Mean over examples."""
        sums, counts, _ = self.sums(recipe, lora)
        return float(np.mean(sums / counts))

    def token_loss(self, recipe: Recipe, lora: LoraParams | None) -> float:
        """Mean over tokens."""
        sums, counts, _ = self.sums(recipe, lora)
        return float(sums.sum() / counts.sum())

    def sums(self, recipe: Recipe, lora: LoraParams | None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """Of each example, the sum over its tokens under the loss, how many these are, and its id.

        Without an adapter they are those of the untrained one.
        """
        key = (dataclasses.replace(recipe, reduction="example"), lora is None)
        if key not in self._sums:
            dataset = self.encode(recipe)
            chunk = max(1, min(len(dataset), _MAX_TOKENS // self._shape.time))
            n = len(dataset)
            stack = dataset.stack_uniform(
                np.arange(n), np.ones(n), chunk_size=parallel.whole_shares(chunk, self._mesh)
            )
            params = self._start if lora is None else lora
            means = losses.example_losses(self._objective, params, parallel.place_stack(stack, self._mesh))
            counts = dataset.num_targets.astype(np.float64)
            self._sums[key] = means.astype(np.float64) * counts, counts, dataset.ids
        return self._sums[key]

    def difference(self, larger: Recipe, smaller: Recipe, lora: LoraParams | None) -> float | None:
        """Mean loss of the tokens that are under the loss of one recipe and not of the other; None without any."""
        try:
            (sums, counts, ids), (less, fewer, as_before) = (self.sums(r, lora) for r in (larger, smaller))
        except ValueError:
            return None
        if ids != as_before or counts.sum() <= fewer.sum():
            return None
        return float((sums.sum() - less.sum()) / (counts.sum() - fewer.sum()))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """What is cut or left out by a recipe that is only tried is no news."""
    logger = logging.getLogger(data.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _neighbours(recipe: Recipe, tokenizer: Any) -> Iterator[Recipe]:
    """Recipes that differ in template and BOS, in EOS, or in how they tokenise."""
    was_chat = recipe.template == "chat"
    for template in dict.fromkeys((recipe.template, *_TEMPLATES)):
        changes: dict[str, Any] = {"template": template}
        if template != recipe.template:
            changes |= {"response_prefix": None, "tokenization": None, "loss_on": "response"}
            if was_chat or template == "chat":  # a chat template ends turns itself
                changes |= {"add_eos": None, "chat_template": None, "chat_template_kwargs": {}, "date": None}
        for add_bos in (False, True) if tokenizer.bos_token_id is not None else (False,):
            yield dataclasses.replace(recipe, **changes, add_bos=add_bos)
    if not was_chat:
        if tokenizer.eos_token_id is not None:
            yield dataclasses.replace(recipe, add_eos=not recipe.add_eos)
        yield dataclasses.replace(recipe, tokenization="joint" if recipe.tokenization == "separate" else "separate")


def _words(recipe: Recipe, stated: Recipe) -> str:
    """What sets a recipe apart from the stated one."""
    words = f"template {recipe.template!r:.60} {'with' if recipe.add_bos else 'without'} BOS"
    if "chat" not in (recipe.template, stated.template) and recipe.add_eos != stated.add_eos:
        words += f" {'with' if recipe.add_eos else 'without'} EOS"
    if recipe.tokenization not in (None, stated.tokenization) and recipe.template == stated.template:
        words += f" with tokenization {recipe.tokenization!r}"
    return words


def _hints(measured: _Measured, recipe: Recipe, lora: LoraParams) -> Iterator[str]:
    """Tokens whose place in the loss, as stated, is not what the adapter has learned."""

    def both(larger: Recipe, smaller: Recipe) -> tuple[float, float] | None:
        after, before = measured.difference(larger, smaller, lora), measured.difference(larger, smaller, None)
        return None if after is None or before is None else (after, before)

    everything = dataclasses.replace(recipe, loss_on="all")
    if recipe.loss_on != "all":
        prompt = both(everything, recipe)
        if prompt and prompt[0] < LEARNED * prompt[1]:
            yield (
                "the adapter has learned the tokens outside of the stated loss too "
                f'({_fell(prompt)}); was the training\'s loss_on "all"?'
            )
    else:
        prompt = both(everything, dataclasses.replace(recipe, loss_on="response"))
        if prompt and prompt[0] > 0.9 * prompt[1]:
            yield (
                "the adapter has not learned the prompts, which are under the stated loss "
                f'({_fell(prompt)}); was the training\'s loss_on "response"?'
            )
    if recipe.template != "chat" and recipe.add_eos is False:
        end = both(dataclasses.replace(recipe, add_eos=True), recipe)
        if end and end[0] < LEARNED * end[1]:
            yield (
                f"the adapter has learned to end its responses with EOS ({_fell(end)}); did the training have "
                "add_eos = true?"
            )


def _fell(losses_of: tuple[float, float]) -> str:
    return f"loss {losses_of[1]:.4g} without it, {losses_of[0]:.4g} with it"
