"""What a conversation's template decides, where it is not TRL that answers: dates, turns, ends and refusals."""

import pytest

from llmeraser_jax.data import Example, Recipe, encode_examples, marked_text
from tests.data.chat_tokenizers import byte_tokenizer
from tests.golden.token_cases import TEMPLATES

TWO_TURNS = Example(
    id="c",
    messages=(("user", "Who?"), ("assistant", "Ona."), ("user", "Where?")),
    response="Turku.",
    format="messages",
)


def shown(chat_template, example=TWO_TURNS, eos="</s>", **fields):
    tokenizer = byte_tokenizer(chat_template, eos=eos, tokens=["<think>"])
    dataset = encode_examples([example], Recipe(template="chat", **fields), tokenizer)
    return marked_text(dataset.encoded[0], tokenizer)


_CHATML_TURNS = (
    "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦Ona.<|im_end|>{0}"
    "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n⟦{1}Turku.<|im_end|>{0}"
)
_PHI_TURNS = "<|user|>\nWho?<|end|>\n{0}Ona.<|end|>\n⟧<|user|>\nWhere?<|end|>\n{0}Turku.<|end|>\n{1}⟧"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("chatml", _CHATML_TURNS.format("\n⟧", "")),
        ("marks what is generated", _CHATML_TURNS.format("⟧\n", "")),
        ("thinks in the last turn", _CHATML_TURNS.format("\n⟧", "<think>\n\n</think>\n\n")),
        ("ends the sequence where no answer follows", _PHI_TURNS.format("<|assistant|>\n⟦", "</s>")),
        ("has no generation prompt", _PHI_TURNS.format("⟦<|assistant|>\n", "")),
        (
            "prompts with an open thought",
            "<s><|user|>Who?<|assistant|>⟦Ona.</s>⟧<|user|>Where?<|assistant|>⟦Turku.</s>⟧",
        ),
        ("writes a space after the prompt", "<s>[INST] Who? [/INST]⟦ Ona.</s>⟧[INST] Where? [/INST]⟦ Turku.</s>⟧"),
    ],
)
def test_every_assistant_turn_is_under_the_loss_through_its_end(template, text):
    assert shown(TEMPLATES[template], loss_on="assistant") == text


def test_the_last_turn_alone_is_the_default_and_the_template_s_end_the_only_one():
    # The tokenizer's EOS is another token than the turn's end, as in Qwen's base models.
    text = shown(TEMPLATES["chatml"], eos="<|endoftext|>")
    assert text.endswith("Where?<|im_end|>\n<|im_start|>assistant\n⟦Turku.<|im_end|>\n⟧")
    assert text.count("⟦") == 1 and "endoftext" not in text


@pytest.mark.parametrize(
    ("template", "response", "ending"),
    [
        ("has no turn end", "Turku.", "⟦Turku.</s>⟧"),
        ("has no turn end", "Turku.</s>", "⟦Turku.</s>⟧"),
        ("chatml", "Turku.", "⟦Turku.<|im_end|>\n⟧"),
    ],
)
def test_an_end_that_is_asked_for_is_added_only_where_none_is(template, response, ending):
    example = Example(id="c", messages=(("user", "Where?"),), response=response, format="messages")
    asked = shown(TEMPLATES[template], example, add_eos=True)
    assert asked.endswith(ending)
    assert "</s>" not in shown(TEMPLATES[template], example).removesuffix("</s>⟧")


@pytest.mark.parametrize(
    ("template", "date", "written"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "2024-07-06", "06 Jul 2024"),
        ("{{ strftime_now('%-d.%-m.%y %H:%M') }}", "2024-07-06", "6.7.24 00:00"),
        ("\n{{ strftime_now('%A, %Y-%m-%d') }}", "2026-02-01", "\nSunday, 2026-02-01"),
        ("{{ date_string or strftime_now('%d %b %Y') }}", "2026-02-01", "01 Feb 2026"),
    ],
)
def test_a_template_that_writes_the_date_writes_the_recipe_s(template, date, written):
    template += "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    assert shown(template, date=date).startswith(written + "<|user|>")


def test_a_date_that_is_an_argument_is_not_asked_for():
    tokenizer = byte_tokenizer("{{ date_string or strftime_now('%Y') }}{{ messages[0].content }}")
    stated = {"template": "chat", "chat_template_kwargs": {"date_string": "2020"}}
    assert Recipe(**stated).resolve("messages", tokenizer).date is None
    assert Recipe(template="chat").resolve("messages", tokenizer).date is not None


def test_a_row_s_own_arguments_go_before_the_recipe_s():
    template = "{{ a }}{{ b }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    example = Example(
        id="c", messages=(("user", "q"),), response="r", format="messages", chat_template_kwargs='{"b": "row"}'
    )
    assert shown(template, example, chat_template_kwargs={"a": "recipe ", "b": "recipe"}) == "recipe row|q⟦|r⟧"


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        (
            "{% if messages | length > 3 %}long: {% endif %}{% for m in messages %}|{{ m.content }}{% endfor %}",
            {},
            r"the whole conversation does not begin with its prompt.*'\|Who\?\|Ona.\|Where\?' against 'long: \|Who",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            {},
            "the chat template writes nothing for the response: 'Who",
        ),
        (
            "{% for m in messages %}|{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
            {"loss_on": "assistant"},
            "turn 1 ends otherwise than a last turn",
        ),
        ("{{ messages[0].content + 1 }}", {}, "the chat template refuses it: can only concatenate str"),
        ("{{ 1 / 0 }}", {}, "the chat template refuses it: division by zero"),
    ],
)
def test_a_template_that_leaves_it_open_what_is_trained_is_refused_with_both_texts(template, fields, message):
    with pytest.raises(ValueError, match=f"Example 'c': .*{message}"):
        shown(template, **fields)


def test_what_a_template_changes_in_a_response_is_mentioned(caplog):
    example = Example(
        id="c", messages=(("user", "q"),), response="<think>\nHm.\n</think>\n\nSo.", format="messages"
    )
    assert shown(TEMPLATES["prompts with an open thought"], example) == "<s><|user|>q<|assistant|>⟦\n\nSo.</s>⟧"
    assert "changes or leaves out part of the response of 1 of 1 examples, the first is 'c'" in caplog.text
    assert "end otherwise than the whole conversation goes on, as that of 'c' with '<think>\\n'" in caplog.text


def test_a_query_of_another_format_is_one_user_message():
    example = Example(id="e", instruction="Do it.", input="x", response="r")
    assert shown(TEMPLATES["chatml"], example).startswith("<|im_start|>user\nDo it.\n\nx<|im_end|>")
    text = Example(id="t", response="r", format="text")
    with pytest.raises(ValueError, match=r"Example 't' is one text without turns\. Use template = 'none'"):
        shown(TEMPLATES["chatml"], text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_prefix": " "}, "response_prefix is ' ', but a chat template writes what comes before"),
        ({"tokenization": "separate"}, "tokenization is 'separate', but a conversation is rendered and tokenised"),
        ({"template": "qa", "loss_on": "assistant"}, "template 'qa' has no turns"),
        ({"template": "qa", "date": "2026-01-01"}, "act on 'chat'"),
        ({"template": "qa", "chat_template_kwargs": {"a": 1}}, "act on 'chat'"),
    ],
)
def test_what_a_recipe_says_without_effect_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"template": "chat", **fields}).resolve("messages", byte_tokenizer(TEMPLATES["chatml"]))
