"""The recipe: prompts letter by letter, resolution, and every refusal."""

import copy
import dataclasses

import pytest

from llmeraser_jax.data import Example, Recipe
from llmeraser_jax.data.chat import ChatRenderer
from llmeraser_jax.data.templates import make_prompt_renderer

WITH_INPUT = Example(id="e", instruction="Do {it}.", input="{x}", response="r")
WITHOUT_INPUT = Example(id="e", instruction="Do {it}.", response="r")
CHAT = Example(id="c", messages=(("system", "red"), ("user", "blue")), response="r", format="messages")


def prompt_of(recipe, tokenizer):
    if recipe.template == "chat":
        return lambda example: ChatRenderer(recipe, tokenizer).render(example).prompt
    return make_prompt_renderer(recipe)


@pytest.mark.parametrize(
    ("template", "example", "prompt"),
    [
        ("plain", WITH_INPUT, "Do {it}.\n{x}\n"),
        ("plain", WITHOUT_INPUT, "Do {it}.\n"),
        ("qa", WITH_INPUT, "Question: Do {it}.\n{x}\nAnswer:"),
        ("qa", WITHOUT_INPUT, "Question: Do {it}.\nAnswer:"),
        (
            "alpaca",
            WITH_INPUT,
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nDo {it}.\n\n### Input:\n{x}\n\n### Response:\n",
        ),
        (
            "alpaca",
            WITHOUT_INPUT,
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nDo {it}.\n\n### Response:\n",
        ),
        (
            "tallrec",
            WITH_INPUT,
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. "
            "Write a response that appropriately completes the request.  # noqa: E501\n\n"
            "### Instruction:\nDo {it}.\n\n### Input:\n{x}\n\n### Response:\n",
        ),
        (
            "tallrec",
            WITHOUT_INPUT,
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.  # noqa: E501\n\n"
            "### Instruction:\nDo {it}.\n\n### Response:\n",
        ),
        ("none", WITHOUT_INPUT, "Do {it}."),
        ("{{I}} {instruction}/{input}>", WITH_INPUT, "{I} Do {it}./{x}>"),
        ("<{instruction}>", WITHOUT_INPUT, "<Do {it}.>"),
        ("chat", WITH_INPUT, "<s> user : Do {it}.\n\n{x} bot :"),
        ("chat", CHAT, "<s> system : red user : blue bot :"),
        ("plain", Example(id="c", messages=(("user", "hi"),), response="r", format="messages"), "hi\n"),
    ],
)
def test_a_template_writes_this_prompt(word_tokenizer, template, example, prompt):
    recipe = Recipe(template=template).resolve(example.format, word_tokenizer)
    assert prompt_of(recipe, word_tokenizer)(example) == prompt


@pytest.mark.parametrize(
    ("data_format", "template", "prefix", "add_bos"),
    [
        ("instruction", "alpaca", "", True),
        ("question", "qa", " ", True),
        ("prompt", "none", "", True),
        ("text", "none", "", True),
        ("messages", "chat", "", False),
    ],
)
def test_auto_is_settled_by_the_columns(word_tokenizer, data_format, template, prefix, add_bos):
    recipe = Recipe()
    assert not recipe.is_resolved
    resolved = recipe.resolve(data_format, word_tokenizer)
    assert (resolved.template, resolved.response_prefix, resolved.add_bos) == (template, prefix, add_bos)
    assert resolved.is_resolved
    assert resolved.resolve(data_format, word_tokenizer) == resolved


def test_what_is_stated_is_not_resolved_away(word_tokenizer):
    recipe = Recipe(template="qa", response_prefix="", add_bos=False, add_eos=False, tokenization="joint")
    assert recipe.resolve("instruction", word_tokenizer) == recipe


@pytest.mark.parametrize(
    ("fields", "missing", "message"),
    [
        ({"add_bos": True}, "bos_token", "no BOS token; set add_bos = false"),
        ({}, "eos_token", "no EOS token; set add_eos = false"),
        ({"template": "chat"}, "chat_template", "has no chat template"),
    ],
)
def test_what_the_tokenizer_lacks_is_refused(word_tokenizer, fields, missing, message):
    setattr(word_tokenizer, missing, None)
    with pytest.raises(ValueError, match=message):
        Recipe(**fields).resolve("prompt", word_tokenizer)


def test_a_tokenizer_without_bos_gets_none(word_tokenizer):
    word_tokenizer.bos_token = None
    assert Recipe().resolve("prompt", word_tokenizer).add_bos is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": True}, "packing is true, which is not supported"),
        ({"packing": "no"}, "packing is 'no'; it must be false, or \"isolated\""),
        ({"packing": "isolated"}, 'averaged over their tokens: state reduction = "token"'),
        (
            {"template": "alpacca"},
            "template is 'alpacca'; it must be one of auto, none, plain, alpaca, tallrec, qa, chat, or",
        ),
        ({"template": "{instruction} {system}"}, "plain fields {instruction} and {input} only, not 'system'"),
        ({"template": "{instruction!r}"}, "plain fields"),
        ({"template": "{instruction"}, "is not a format string"),
        ({"template": 3}, "template is 3"),
        ({"response_prefix": 3}, "response_prefix is 3"),
        ({"tokenization": "both"}, "tokenization is 'both'; it must be one of separate, joint"),
        ({"loss_on": "prompt"}, "loss_on is 'prompt'; it must be one of response, assistant, all"),
        ({"reduction": "mean"}, "reduction is 'mean'; it must be one of example, token"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle'; it must be one of left, right, error"),
        ({"add_bos": 1}, "add_bos is 1; it must be true or false"),
        ({"add_eos": "yes"}, "add_eos is 'yes'; it must be true or false"),
        ({"truncate": "response"}, "truncate is 'response'; it must be one of sequence, prompt"),
        ({"chat_template": 3}, "chat_template is 3; it must be a string"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs is 'x'; it must be a table of names and values"),
        ({"chat_template_kwargs": {"tools": []}}, "tools cannot be set there"),
        ({"date": "26 Jul 2024"}, "date is '26 Jul 2024'; it must be a date, YYYY-MM-DD"),
        ({"max_length": 1}, "max_length is 1"),
        ({"max_length": 12.0}, "max_length is 12.0"),
        ({"max_length": True}, "max_length is True"),
        ({"epochs": 3}, "unknown recipe key 'epochs'; the keys are template, "),
    ],
)
def test_a_bad_field_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_mapping(fields)


def test_a_mapping_is_the_recipe_and_has_no_nulls():
    recipe = Recipe(template="qa", loss_on="all", max_length=64)
    assert recipe.to_mapping() == {
        "template": "qa",
        "loss_on": "all",
        "reduction": "example",
        "max_length": 64,
        "truncation_side": "left",
        "packing": False,
        "truncate": "sequence",
    }
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe


@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (
            "<{instruction}>",
            WITH_INPUT,
            "Example 'e' has an input, which template '<{instruction}>' leaves out",
        ),
        ("qa", CHAT, "Example 'c' has 2 messages before the response"),
    ],
)
def test_a_template_that_would_lose_text_is_refused(word_tokenizer, template, example, message):
    recipe = Recipe(template=template).resolve(example.format, word_tokenizer)
    with pytest.raises(ValueError, match=message):
        prompt_of(recipe, word_tokenizer)(example)


def test_a_chat_template_that_refuses_an_example_is_told_with_its_id(word_tokenizer):
    word_tokenizer = copy.deepcopy(word_tokenizer)
    word_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('Only user and assistant roles.') }}"
        "{% endif %}{{ m.content }} {% endfor %}"
    )
    render = prompt_of(Recipe(template="chat").resolve("messages", word_tokenizer), word_tokenizer)
    assert render(dataclasses.replace(CHAT, messages=(("user", "hello"),))) == "hello "
    with pytest.raises(ValueError, match=r"Example 'c': the chat template refuses it: Only user"):
        render(dataclasses.replace(CHAT, messages=(("system", "be brief"), ("user", "hello"))))
