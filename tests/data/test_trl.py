"""Token ids and loss masks are those that TRL's SFTTrainer trains on: by golden files, and against TRL itself."""

import json
import pathlib
from typing import Any

import pytest

from llmeraser_jax.data import Recipe, encode_examples, load_examples
from tests.data.chat_tokenizers import byte_tokenizer
from tests.golden import make_token_golden
from tests.golden.token_cases import CONVERSATIONS, cases, tokenizer_of, trained_by_trl

GOLDEN = json.loads(make_token_golden.FILE.read_text(encoding="utf-8"))


def encoded(rows, tokenizer, **recipe):
    """Ids and labels of the rows that are kept, as TRL's are written."""
    dataset = encode_examples(load_examples(rows), Recipe(**recipe), tokenizer)
    return [[e.tokens.tolist(), e.loss_mask.astype(int).tolist()] for e in dataset.encoded]


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_tokens_and_loss_are_what_trl_trained_on(case):
    assert encoded(case["rows"], tokenizer_of(case["tokenizer"]), **case["recipe"]) == case["trained"]


def test_the_golden_rows_are_cut_and_dropped_in_every_way():
    kept = {case["name"]: len(case["trained"]) for case in GOLDEN if case["name"].startswith("cut")}
    assert 0 < kept["cut on the right at 36"] < len(CONVERSATIONS) == kept["cut on the left at 36"]


@pytest.mark.torch
def test_the_golden_file_is_what_the_installed_trl_makes():
    for golden, (name, tokenizer, rows, options, recipe) in zip(GOLDEN, cases(), strict=True):
        assert (golden["name"], golden["rows"], golden["recipe"]) == (name, rows, recipe)
        assert golden["trained"] == trained_by_trl(rows, tokenizer_of(tokenizer), **options), name


def trl_templates():
    import trl

    assert trl.__file__ is not None
    folder = pathlib.Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text("utf-8") for path in folder.glob("*.jinja")}


def outcome(make, *args, **kwargs):
    """What a function returns, or that it refuses the rows."""
    try:
        return make(*args, **kwargs)
    except Exception:
        return "refused"


@pytest.mark.torch
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_every_template_that_trl_ships_gives_trls_tokens(conversation):
    messages = [{"messages": conversation}]
    pair = [{"prompt": conversation[:-1], "completion": conversation[-1:]}]
    refused = []
    for name, template in trl_templates().items():
        tokenizer = byte_tokenizer(template)
        options: dict[str, Any]
        for loss_on, rows, options in (
            ("all", messages, {}),
            ("response", pair, {"completion_only": True}),
            *([("assistant", messages, {"assistant_only": True})] if "generation %}" in template else []),
        ):
            expected = outcome(trained_by_trl, rows, tokenizer, **options)
            got = outcome(encoded, rows, tokenizer, loss_on=loss_on, max_length=10_000)
            assert got == expected, (name, loss_on)
            refused += [name] * (got == "refused")
    # LLaVA's wants lists of parts; Gemma's knows no system turn.
    assert set(refused) <= {"llava_next", "llava_next_training", "gemma", "gemma_training"}


@pytest.mark.torch
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_the_template_that_trl_swaps_in_for_assistant_turns_can_be_stated(conversation, tmp_path):
    templates, rows = trl_templates(), [{"messages": conversation}]
    compared = 0
    for name, template in templates.items():
        if not name.endswith("_training") or (original := templates.get(name.removesuffix("_training"))) is None:
            continue
        tokenizer = byte_tokenizer(original)
        expected = outcome(trained_by_trl, rows, tokenizer, assistant_only=True, chat_template=template)
        (tmp_path / "training.jinja").write_text(template, "utf-8")
        stated = {"chat_template": str(tmp_path / "training.jinja"), "loss_on": "assistant", "max_length": 10_000}
        assert outcome(encoded, rows, tokenizer, **stated) == expected, name
        compared += expected != "refused"
    assert compared > 25


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", ["cohere", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5", "qwen3_instruct_2507", "qwen3_vl"]
)
def test_without_markers_the_turns_are_found_where_trls_training_template_marks_them(name):
    templates = trl_templates()
    tokenizer = byte_tokenizer(templates[name])
    rows = [{"messages": c} for c in CONVERSATIONS if not (name == "gemma" and c[0]["role"] == "system")]
    marked = trained_by_trl(rows, tokenizer, assistant_only=True, chat_template=templates[f"{name}_training"])
    assert encoded(rows, tokenizer, loss_on="assistant", max_length=10_000) == marked
