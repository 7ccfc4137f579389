"""Tokens, masks and layouts against arrays written out by hand."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.data import (
    BucketShape,
    EncodedExample,
    Example,
    Recipe,
    TokenDataset,
    choose_buckets,
    encode_examples,
)
from llmeraser_jax.types import ExampleSet

# Word ids: <s> 1, </s> 2, Q 3, A 4, red 5, blue 6, green 7, is 8, it 9, yes 10, no 11,
# ":" 12, user 13, bot 14
PLAIN = Recipe(template="plain")


def example(prompt, response, id_="e"):
    return Example(id=id_, instruction=prompt, response=response, format="prompt")


def encode_one(tokenizer, prompt, response, **fields):
    recipe = Recipe(**{"template": "plain", **fields})
    (encoded,) = encode_examples([example(prompt, response)], recipe, tokenizer).encoded
    return encoded


def make_dataset(lengths, *, num_targets=1, buckets=None):
    """Examples of the given lengths; example k's tokens are 100 k, 100 k + 1, ..."""
    encoded = [
        EncodedExample(
            id=str(k),
            tokens=np.arange(100 * k, 100 * k + n, dtype=np.int32),
            response_start=n - num_targets,
            loss_mask=np.arange(n) >= n - num_targets,
        )
        for k, n in enumerate(lengths)
    ]
    return TokenDataset(encoded, PLAIN, buckets=choose_buckets(encoded) if buckets is None else buckets)


def shapes(stack):
    return [leaf.shape for leaf in jax.tree.leaves(stack)]


# -- tokens ----------------------------------------------------------------------------------------


def test_bos_prompt_response_and_eos_in_this_order(word_tokenizer):
    encoded = encode_one(word_tokenizer, "red is it", "yes no")
    assert encoded.tokens.tolist() == [1, 5, 8, 9, 10, 11, 2]
    assert encoded.tokens.dtype == np.int32
    assert (encoded.response_start, encoded.loss_start, encoded.num_targets) == (4, 4, 3)
    assert encoded.prompt.tolist() == [1, 5, 8, 9]
    assert encoded.response.tolist() == [10, 11, 2]


def test_bos_and_eos_can_be_left_out(word_tokenizer):
    encoded = encode_one(word_tokenizer, "red", "yes", add_bos=False, add_eos=False)
    assert encoded.tokens.tolist() == [5, 10]


def test_a_bos_written_by_the_template_is_not_doubled(word_tokenizer):
    encoded = encode_one(word_tokenizer, "red", "yes", template="<s> {instruction}", add_bos=True)
    assert encoded.tokens.tolist() == [1, 5, 10, 2]


def test_a_conversation_goes_through_the_chat_template(word_tokenizer):
    chat = Example(
        id="c", messages=(("user", "red"), ("bot", "no"), ("user", "blue")), response="yes", format="messages"
    )
    (encoded,) = encode_examples([chat], Recipe(), word_tokenizer).encoded
    assert encoded.tokens.tolist() == [1, 13, 12, 5, 14, 12, 11, 13, 12, 6, 0, 12, 10]
    assert encoded.response_start == 10


def test_loss_on_all_predicts_every_token_but_the_first(word_tokenizer):
    encoded = encode_one(word_tokenizer, "red is", "yes", loss_on="all")
    assert (encoded.response_start, encoded.loss_start, encoded.num_targets) == (3, 1, 4)


# Pieces: <s> 1, </s> 2, "▁" 3, line break 4, y 5, e 6, s 7, ye 8, yes 9, ▁yes 10, a 11, ":" 12, a: 13


@pytest.mark.parametrize("tokenization", ["separate", "joint"])
@pytest.mark.parametrize(("prefix", "response"), [("", [9, 2]), (" ", [10, 2])])
def test_a_word_mark_is_there_exactly_when_a_space_is(mark_tokenizer, tokenization, prefix, response):
    encoded = encode_one(
        mark_tokenizer, "a", "yes", template="plain", response_prefix=prefix, tokenization=tokenization
    )
    assert encoded.tokens.tolist() == [1, 3, 11, 4, *response]
    assert mark_tokenizer.decode(encoded.response[:-1]) == "yes"


def test_tokenised_apart_the_response_is_the_same_after_every_prompt(mark_tokenizer):
    fields = {"template": "{instruction}", "tokenization": "separate", "add_eos": False}
    assert encode_one(mark_tokenizer, "a", ":yes", **fields).tokens.tolist() == [1, 3, 11, 12, 9]
    assert encode_one(mark_tokenizer, "yes", ":yes", **fields).tokens.tolist() == [1, 10, 12, 9]


def test_tokenised_jointly_a_token_across_the_border_is_response(mark_tokenizer):
    fields = {"template": "{instruction}", "tokenization": "joint", "add_eos": False}
    encoded = encode_one(mark_tokenizer, "a", ":yes", **fields)
    assert encoded.tokens.tolist() == [1, 3, 13, 9]
    assert encoded.response.tolist() == [13, 9]


# -- truncation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"truncation_side": "left"}, [1, 8, 9, 10, 2]),
        ({"truncation_side": "right"}, [1, 5, 6, 10, 2]),
        ({"truncation_side": "left", "add_bos": False}, [7, 8, 9, 10, 2]),
    ],
)
def test_only_the_prompt_is_cut_and_counts_are_reported(word_tokenizer, caplog, fields, tokens):
    examples = [example("red blue green is it", "yes", "long"), example("red", "no", "short")]
    with caplog.at_level(logging.WARNING):
        recipe = Recipe(template="plain", truncate="prompt", max_length=5, **fields)
        dataset = encode_examples(examples, recipe, word_tokenizer)
    assert dataset.encoded[0].tokens.tolist() == tokens
    assert dataset.encoded[0].response.tolist() == [10, 2]
    assert (dataset.num_truncated, dataset.truncated_ids) == (1, ("long",))
    assert "1 of 2 examples were cut" in caplog.text


@pytest.mark.parametrize(
    ("side", "loss_on", "tokens", "mask"),
    [
        ("left", "response", [8, 9, 10, 11, 2], [0, 0, 1, 1, 1]),
        ("right", "response", [1, 5, 8, 9, 10], [0, 0, 0, 0, 1]),
        ("right", "all", [1, 5, 8, 9, 10], [1, 1, 1, 1, 1]),
    ],
)
def test_a_sequence_is_cut_at_either_end_as_trl_does(word_tokenizer, side, loss_on, tokens, mask):
    encoded = encode_one(word_tokenizer, "red is it", "yes no", max_length=5, truncation_side=side, loss_on=loss_on)
    assert encoded.tokens.tolist() == tokens
    assert encoded.loss_mask.tolist() == [bool(bit) for bit in mask]


def test_a_response_longer_than_the_sequence_keeps_its_end_and_predicts_all_but_one(word_tokenizer):
    encoded = encode_one(word_tokenizer, "red", "yes no yes no", max_length=3)
    assert encoded.tokens.tolist() == [10, 11, 2]
    assert (encoded.response_start, encoded.num_targets, encoded.prompt.tolist()) == (1, 2, [10])


def test_a_row_without_a_token_under_the_loss_is_dropped_and_named(word_tokenizer, caplog):
    examples = [example("red blue green is it", "yes", "long"), example("red", "no", "short")]
    recipe = Recipe(template="plain", max_length=4, truncation_side="right")
    dataset = encode_examples(examples, recipe, word_tokenizer)
    assert (dataset.ids, dataset.dropped_ids) == (("short",), ("long",))
    assert [e.id for e in dataset.examples] == ["short"]
    assert "1 of 2 examples were dropped: within max_length = 4 no token under the loss is left" in caplog.text
    with pytest.raises(ValueError, match="Example 'long' was dropped: within max_length = 4"):
        dataset.indices_of(["long"])
    with pytest.raises(ValueError, match="all 1 examples were dropped"):
        encode_examples(examples[:1], recipe, word_tokenizer)


def test_what_just_fits_is_not_cut(word_tokenizer):
    recipe = Recipe(template="plain", max_length=5)
    dataset = encode_examples([example("red blue", "yes")], recipe, word_tokenizer)
    assert dataset.encoded[0].tokens.tolist() == [1, 5, 6, 10, 2]
    assert dataset.num_truncated == 0


def test_a_prompt_cut_to_nothing_else_keeps_bos(word_tokenizer):
    encoded = encode_one(word_tokenizer, "red blue", "yes", max_length=3, truncate="prompt")
    assert encoded.tokens.tolist() == [1, 10, 2]


@pytest.mark.parametrize(
    ("max_length", "side", "message"),
    [
        (3, "left", "Example 'e': its response takes 3 tokens, .* max_length = 3"),
        (4, "error", "Example 'e': 2 prompt and 3 response tokens exceed max_length = 4"),
    ],
)
def test_what_may_not_be_cut_is_refused_by_name(word_tokenizer, max_length, side, message):
    with pytest.raises(ValueError, match=message):
        encode_one(word_tokenizer, "red", "yes no", max_length=max_length, truncation_side=side, truncate="prompt")


def test_a_response_that_nothing_predicts_is_refused(word_tokenizer):
    with pytest.raises(ValueError, match="Example 'e': its prompt has no token"):
        encode_one(word_tokenizer, "", "yes", add_bos=False)


# -- buckets ---------------------------------------------------------------------------------------


def test_buckets_are_few_rounded_and_as_wide_as_their_examples():
    encoded = make_dataset([10] * 50 + [60] * 50 + [300] * 3, num_targets=5).encoded
    assert choose_buckets(encoded) == (
        BucketShape(time=16, response=8),
        BucketShape(time=64, response=8),
        BucketShape(time=304, response=8),
    )
    # 100 rows of 64 and 3 of 304 beat 50 of 16 and 53 of 304.
    assert [b.time for b in choose_buckets(encoded, max_buckets=2)] == [64, 304]
    assert [b.time for b in choose_buckets(encoded, max_buckets=1)] == [304]


def test_a_bucket_that_saves_little_is_not_opened():
    assert [b.time for b in choose_buckets(make_dataset([60] * 100 + [70] * 100).encoded)] == [64, 80]
    assert [b.time for b in choose_buckets(make_dataset([250] * 50 + [260] * 50).encoded)] == [272]


def test_bucket_choice_is_the_best_by_exhaustion():
    from itertools import combinations

    lengths = np.random.default_rng(0).integers(3, 200, 40).tolist()
    rounded = [-(-n // 16) * 16 for n in lengths]
    bounds = sorted(set(rounded))

    def cost(chosen):
        return sum(min(b for b in chosen if b >= n) for n in rounded)

    best = min(cost((*c, bounds[-1])) for c in combinations(bounds[:-1], 2))
    chosen = tuple(b.time for b in choose_buckets(make_dataset(lengths).encoded, max_buckets=3))
    assert cost(chosen) == best


def test_an_example_goes_to_the_smallest_bucket_that_holds_tokens_and_response():
    buckets = (
        BucketShape(time=32, response=4),
        BucketShape(time=16, response=4),
        BucketShape(time=16, response=12),
    )
    dataset = make_dataset([16, 17, 5], num_targets=4, buckets=buckets)
    assert [dataset.bucket_of(k) for k in range(3)] == [1, 0, 1]
    assert make_dataset([14], num_targets=9, buckets=buckets).bucket_of(0) == 2
    with pytest.raises(ValueError, match=r"Example '0' \(33 tokens, 4 under the loss\) fits no bucket"):
        make_dataset([33], num_targets=4, buckets=buckets)


def test_shared_buckets_keep_their_places_and_grow_at_the_end(word_tokenizer):
    train = encode_examples([example("red", "yes")], PLAIN, word_tokenizer)
    assert train.buckets == (BucketShape(time=16, response=4),)
    edited = [example("blue", "no", "a"), example("blue", "no " * 20, "b")]
    other = encode_examples(edited, train.recipe, word_tokenizer, buckets=train.buckets)
    assert other.buckets == (BucketShape(time=16, response=4), BucketShape(time=32, response=24))
    assert [other.bucket_of(k) for k in range(2)] == [0, 1]
    same = encode_examples(edited[:1], train.recipe, word_tokenizer, buckets=train.buckets)
    assert same.buckets == train.buckets


def test_an_empty_set_takes_the_shapes_of_another(word_tokenizer):
    train = encode_examples([example("red", "yes")], PLAIN, word_tokenizer)
    empty = encode_examples([], train.recipe, word_tokenizer, buckets=train.buckets)
    assert len(empty) == 0
    assert empty.buckets == train.buckets
    with pytest.raises(ValueError, match="no examples to lay out"):
        empty.stack(np.array([]), np.array([]), chunk_size=2)
    with pytest.raises(ValueError, match="pass a resolved recipe"):
        encode_examples([], Recipe(), word_tokenizer)


# -- layout ----------------------------------------------------------------------------------------


def test_a_stack_is_these_arrays(word_tokenizer):
    examples = [example("red is it", "yes no", "a"), example("blue", "no", "b"), example("red", "yes", "c")]
    dataset = encode_examples(examples, PLAIN, word_tokenizer)
    assert isinstance(dataset, ExampleSet)
    assert (len(dataset), dataset.ids) == (3, ("a", "b", "c"))
    stack = dataset.stack(np.array([2, 0, 1]), np.array([0.5, -1.0, 2.0]), chunk_size=2)
    (batch,), (weights,) = stack.batches, stack.weights
    pad = [0] * 12
    row_c = [1, 5, 10, 2, *pad]
    row_a = [1, 5, 8, 9, 10, 11, 2, *pad[:9]]
    row_b = [1, 6, 11, 2, *pad]
    assert batch.tokens.tolist() == [[row_c, row_a], [row_b, row_c]]
    assert batch.attention_mask.sum(-1).tolist() == [[4, 7], [4, 4]]
    assert batch.attention_mask[0, 1].tolist() == [1] * 7 + [0] * 9
    assert batch.targets.tolist() == [[[10, 2, 0, 0], [10, 11, 2, 0]], [[11, 2, 0, 0], [10, 2, 0, 0]]]
    assert batch.positions.tolist() == [[[1, 2, 0, 0], [3, 4, 5, 0]], [[1, 2, 0, 0], [1, 2, 0, 0]]]
    third = np.float32(1 / 3)
    np.testing.assert_array_equal(batch.target_weights[0], [[0.5, 0.5, 0, 0], [third, third, third, 0]])
    assert weights.tolist() == [[0.5, -1.0], [2.0, 0.0]]
    assert {leaf.dtype for leaf in (batch.tokens, batch.attention_mask, batch.positions, batch.targets)} == {
        jnp.dtype("int32")
    }
    assert (batch.target_weights.dtype, weights.dtype) == (jnp.float32, jnp.float32)


def test_weights_are_float64_under_x64():
    dataset = make_dataset([5])
    with jax.enable_x64(True):
        stack = dataset.stack(np.array([0]), np.array([1 / 3]), chunk_size=1)
    assert stack.weights[0].dtype == np.float64
    assert stack.batches[0].target_weights.dtype == np.float64
    assert np.asarray(stack.weights[0]).item() == 1 / 3


def test_buckets_are_stacked_apart_in_order_and_empty_ones_left_out():
    buckets = tuple(BucketShape(time=time, response=4) for time in (16, 32, 64))
    dataset = make_dataset([40, 5, 60, 6, 7], buckets=buckets)
    stack = dataset.stack(np.array([4, 2, 1, 0, 3]), np.array([4.0, 2.0, 1.0, 9.0, 3.0]), chunk_size=2)
    assert [b.tokens.shape for b in stack.batches] == [(2, 2, 16), (1, 2, 64)]
    assert [b.tokens[..., 0].tolist() for b in stack.batches] == [[[400, 100], [300, 400]], [[200, 0]]]
    assert [w.tolist() for w in stack.weights] == [[[4.0, 1.0], [3.0, 0.0]], [[2.0, 9.0]]]


def test_a_fixed_number_of_chunks_holds_the_shapes_and_adds_nothing():
    buckets = tuple(BucketShape(time=time, response=4) for time in (16, 32))
    dataset = make_dataset([5, 20, 6], buckets=buckets)
    assert dataset.num_chunks_of(np.array([0, 2]), chunk_size=1) == (2, 0)
    one = dataset.stack(np.array([1]), np.array([1.0]), chunk_size=1, num_chunks=(2, 1))
    two = dataset.stack(np.array([0, 2]), np.array([1.0, 1.0]), chunk_size=1, num_chunks=(2, 1))
    assert shapes(one) == shapes(two)
    assert [w.tolist() for w in one.weights] == [[[0.0], [0.0]], [[1.0]]]
    assert one.batches[0].attention_mask.sum(-1).tolist() == [[1], [1]]
    assert not one.batches[0].target_weights.any()
    with pytest.raises(ValueError, match=r"num_chunks is \(1, 1\), but 1 at a time these examples need \(2, 0\)"):
        dataset.stack(np.array([0, 2]), np.ones(2), chunk_size=1, num_chunks=(1, 1))


def test_a_uniform_stack_has_one_shape_and_keeps_the_order():
    buckets = (BucketShape(time=16, response=8), BucketShape(time=32, response=4))
    dataset = make_dataset([5, 20, 6], buckets=buckets)
    stack = dataset.stack_uniform(np.array([1, 0, 2]), np.array([1.0, 2.0, 3.0]), chunk_size=2, num_chunks=3)
    (batch,), (weights,) = stack.batches, stack.weights
    assert batch.tokens.shape == (3, 2, 32)
    assert batch.targets.shape == (3, 2, 8)
    assert batch.tokens[..., 0].tolist() == [[100, 0], [200, 100], [100, 100]]
    assert weights.tolist() == [[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("indices", "weights", "chunk_size", "message"),
    [
        (np.array([0, 3]), np.ones(2), 1, "range from 0 to 3; the data set has 3 examples"),
        (np.array([-1]), np.ones(1), 1, "range from -1"),
        (np.array([0.0]), np.ones(1), 1, "dtype float64; expected a vector of integers"),
        (np.array([0, 1]), np.ones(3), 1, "one weight per index"),
        (np.array([0]), np.array([np.nan]), 1, "a nan or an infinity"),
        (np.array([0]), np.ones(1), 0, "chunk_size is 0"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(indices, weights, chunk_size, message):
    dataset = make_dataset([4, 5, 6])
    for method in (dataset.stack, dataset.stack_uniform):
        with pytest.raises(ValueError, match=message):
            method(indices, weights, chunk_size=chunk_size)


def test_indices_are_found_by_id():
    dataset = make_dataset([4, 5, 6])
    assert dataset.indices_of(["2", "0"]).tolist() == [2, 0]
    with pytest.raises(KeyError, match="the first is '7'"):
        dataset.indices_of(["1", "7"])


# -- reductions ------------------------------------------------------------------------------------


def test_token_reduction_divides_by_the_training_sets_mean_count(word_tokenizer):
    recipe = Recipe(template="plain", reduction="token")
    examples = [
        example("red", "yes", "a"),
        example("red", "yes no yes no yes", "b"),
    ]  # 2 and 6 targets with EOS
    dataset = encode_examples(examples, recipe, word_tokenizer)
    assert dataset.normalizer == 4.0
    assert dataset.num_targets.tolist() == [2, 6]
    batch = dataset.stack(np.arange(2), np.ones(2), chunk_size=2).batches[0]
    np.testing.assert_array_equal(batch.target_weights[0].sum(-1), [2 / 4, 6 / 4])
    # Fewer examples later do not change the constant.
    rest = encode_examples(examples[:1], dataset.recipe, word_tokenizer, normalizer=dataset.normalizer)
    np.testing.assert_array_equal(
        rest.stack(np.arange(1), np.ones(1), chunk_size=1).batches[0].target_weights[0, 0], [0.25, 0.25, 0, 0]
    )


def test_a_normalizer_goes_with_token_reduction_only(word_tokenizer):
    with pytest.raises(ValueError, match="only 'token' takes a normalizer"):
        encode_examples([example("red", "yes")], PLAIN, word_tokenizer, normalizer=3.0)
    recipe = Recipe(template="plain", reduction="token").resolve("prompt", word_tokenizer)
    with pytest.raises(ValueError, match="pass the training set's normalizer"):
        encode_examples([], recipe, word_tokenizer)


def test_padding_and_bucket_do_not_change_an_examples_loss(word_tokenizer):
    """The loss through a stack is the mean over response tokens of a next-token table, written out."""
    from llmeraser_jax.losses import response_cross_entropy

    dataset = encode_examples([example("red is", "yes no", "a")], PLAIN, word_tokenizer)
    table = np.random.default_rng(1).normal(size=(15, 15))
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    wanted = -(log_probs[8, 10] + log_probs[10, 11] + log_probs[11, 2]) / 3
    wide = TokenDataset(dataset.encoded, dataset.recipe, buckets=(BucketShape(time=64, response=12),))
    for chosen in (dataset, wide):
        batch = jax.tree.map(lambda x: x[0], chosen.stack(np.arange(1), np.ones(1), chunk_size=1).batches[0])
        logits = jnp.asarray(table, jnp.float32)[jnp.take_along_axis(batch.tokens, batch.positions, axis=1)]
        np.testing.assert_allclose(response_cross_entropy(logits, batch), [wanted], rtol=1e-6)
