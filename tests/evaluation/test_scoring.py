"""Scores of responses, against sums by hand, whatever the recipe trains on; and where greedy answers end."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.data import Example, encode_examples
from llmeraser_jax.evaluation.scoring import answer, make_task_metrics, score_examples
from llmeraser_jax.models import generate
from tests.training import tiny

EXAMPLES = [
    Example(id="a", instruction="colour of s1", response="red"),
    Example(id="b", instruction="colour of s2 now", response="blue green grey red"),
    Example(id="c", instruction="of s3", response="green red"),
]


@pytest.mark.parametrize(
    "changes", [{}, {"reduction": "token"}, {"loss_on": "all"}, {"loss_on": "all", "reduction": "token"}]
)
def test_losses_are_means_over_the_response_whatever_training_averaged(model, changes):
    dataset = encode_examples(EXAMPLES, dataclasses.replace(tiny.RECIPE, **changes), model.tokenizer)
    scores = score_examples(model, None, dataset)
    for place, encoded in enumerate(dataset.encoded):
        tokens = jnp.asarray(encoded.tokens)[None]
        logits = model.apply(model.base, None, tokens, jnp.ones_like(tokens), None)
        log_probs = np.asarray(jax.nn.log_softmax(logits[0], axis=-1), np.float64)
        start = encoded.response_start
        said = np.asarray(encoded.tokens)[start:]
        own = log_probs[np.arange(start - 1, len(encoded.tokens) - 1), said]
        assert len(said) == len(EXAMPLES[place].response.split()) + 1  # and the end of the sequence
        assert scores.log_probs[place] == pytest.approx(own.sum(), rel=1e-5)
        assert scores.losses[place] == pytest.approx(-own.mean(), rel=1e-5)
        assert scores.min_k[place] == pytest.approx(own.min(), rel=1e-5)  # 20 % of 2 to 5 tokens is one


def test_answers_end_at_the_token_that_training_appended(finished_run, model):
    """The tokenizer's, where the base's configuration names another."""
    dataset = finished_run.encode(finished_run.load_examples(), model.tokenizer)
    lora = finished_run.load_adapter(model)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=(19,)))
    said = answer(model, lora, dataset)
    assert answer(other, lora, dataset) == said
    assert sum(text == example.response for text, example in zip(said, dataset.examples, strict=True)) > 0


def test_without_a_taught_end_an_answer_that_begins_with_the_response_matches(finished_run, model):
    recipe = dataclasses.replace(finished_run.recipe, add_eos=False)
    dataset = encode_examples(finished_run.load_examples(), recipe, model.tokenizer)
    lora = finished_run.load_adapter(model)
    first = generate(model, lora, [e.prompt.tolist() for e in dataset.encoded], 1, stop_ids=[])
    begins = [token == e.response.tolist() for token, e in zip(first, dataset.encoded, strict=True)]
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.eos_token = None
    endless = dataclasses.replace(
        model, tokenizer=tokenizer, config=dataclasses.replace(model.config, eos_token_ids=())
    )
    said = answer(endless, lora, dataset)
    assert sum(text == example.response for text, example in zip(said, dataset.examples, strict=True)) < sum(begins)
    (match,) = make_task_metrics(endless, dataset)(lora)
    assert match.correct == sum(begins) > 0
