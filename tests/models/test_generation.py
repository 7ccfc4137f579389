import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.models import generate, greedy_decode
from tests.models.tiny import VARIED, random_lora, tiny_model

PROMPTS = [[5, 9, 11, 3, 20, 7], [4], [12, 13, 14], [8, 8, 8, 8]]


def _greedy_without_cache(model, lora, prompt, count):
    """Every token from a fresh forward pass over the whole text; one shape, so that it compiles once."""
    text = list(prompt)
    apply = jax.jit(model.apply)
    for _ in range(count):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(text)] = text
        mask = np.arange(16)[None] < len(text)
        text.append(int(jnp.argmax(apply(model.base, lora, padded, mask, np.array([[len(text) - 1]])))))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    ("changes", "with_lora"),
    [
        *((changes, lora) for changes in ({}, {"model_type": "mistral", "sliding_window": 3}) for lora in (0, 1)),
        *((VARIED[name], 1) for name in ("gemma3", "phi3", "dynamic", "smollm3")),
    ],
)
def test_the_cache_changes_nothing(changes, with_lora):
    model = tiny_model(**changes)
    lora = random_lora(model) if with_lora else None
    expected = [_greedy_without_cache(model, lora, prompt, 7) for prompt in PROMPTS]
    assert generate(model, lora, PROMPTS, 7, stop_ids=()) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_stand_on_either_side(side):
    model = tiny_model()
    expected = generate(model, None, PROMPTS, 5, stop_ids=())
    tokens, mask = np.full((4, 9), 17, np.int32), np.zeros((4, 9), np.int32)
    for row, prompt in enumerate(PROMPTS):
        place = slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt))
        tokens[row, place], mask[row, place] = prompt, 1
    new, lengths = greedy_decode(model.config, model.base, None, tokens, mask, np.array([], np.int32), 5)
    assert new.tolist() == expected
    assert lengths.tolist() == [5, 5, 5, 5]


def test_a_text_ends_before_its_first_stop_token_and_the_others_go_on():
    model = tiny_model()
    free = generate(model, None, PROMPTS, 8, stop_ids=())
    stop = free[0][3]
    stopped = generate(model, None, PROMPTS, 8, stop_ids=[stop, 28])
    expected = [new[: min((new.index(s) for s in (stop, 28) if s in new), default=len(new))] for new in free]
    assert stopped == expected
    assert len(stopped[0]) <= 3


def test_the_models_own_end_of_sequence_tokens_stop_by_default():
    model = tiny_model()
    first = generate(model, None, PROMPTS[:1], 1, stop_ids=())[0][0]
    ending = tiny_model(eos_token_ids=(first,))
    assert generate(ending, None, PROMPTS[:1], 4) == [[]]


def test_order_and_results_do_not_depend_on_the_batch_size():
    model = tiny_model()
    together = generate(model, None, PROMPTS, 6, stop_ids=())
    for batch_size in (1, 3):
        assert generate(model, None, PROMPTS, 6, batch_size=batch_size, stop_ids=()) == together
    assert generate(model, None, [], 6) == []


def test_generation_stops_early_when_all_texts_have_ended():
    model = tiny_model()
    every_token = list(range(29))
    assert generate(model, None, PROMPTS, 10_000, stop_ids=every_token) == [[], [], [], []]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [([[3], []], 4, "Prompt 1 is empty"), ([[3, 29]], 4, "Prompt 0 holds"), ([[3]], 0, "max_new_tokens")],
)
def test_bad_prompts_are_named(prompts, count, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), None, prompts, count)


def test_a_narrow_base_generates():
    assert len(generate(tiny_model(dtype="bfloat16"), None, [[3, 4]], 3, stop_ids=())[0]) == 3
