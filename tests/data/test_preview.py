"""`llmeraser preview` shows what would be trained, from tokenizer files alone."""

import json

import pytest

from llmeraser_jax import cli
from llmeraser_jax.data import EncodedExample, Recipe, encode_examples, load_examples, marked_text, turn_ends
from tests.data.chat_tokenizers import byte_tokenizer
from tests.golden.token_cases import CONVERSATIONS, TEMPLATES


@pytest.fixture
def arguments(tmp_path):
    byte_tokenizer(TEMPLATES["thinks in the last turn"]).save_pretrained(tmp_path / "tokenizer")
    rows = [{"id": f"r{k}", "messages": messages} for k, messages in enumerate(CONVERSATIONS)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return ["preview", "--model", str(tmp_path / "tokenizer"), "--data", str(tmp_path / "d.jsonl")]


def test_rows_are_shown_with_the_part_under_the_loss_marked(arguments, capsys):
    assert cli.main([*arguments, "--rows", "1"]) == 0
    assert capsys.readouterr().out == (
        "4 examples, template 'chat', loss on 'response': 53 tokens under the loss, 13.2 an example. "
        "0 cut, 0 dropped.\n"
        "\n--- r0: 54 tokens, 15 under the loss\n"
        "<|im_start|>user\nWhere does Ona live?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIn Turku.<|im_end|>\n⟧\n"
        "\n... and 3 more (--rows).\n"
    )


def test_json_has_ids_tokens_and_mask_of_every_row_by_the_recipe_given(arguments, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(
        'template = "chat"\nloss_on = "assistant"\nepochs = 3\nchat_template_kwargs = { enable_thinking = true }\n'
    )
    assert cli.main([*arguments, "--recipe", str(tmp_path / "recipe.toml"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = byte_tokenizer(TEMPLATES["thinks in the last turn"])
    recipe = Recipe(loss_on="assistant")
    expected = encode_examples(load_examples(tmp_path / "d.jsonl"), recipe, tokenizer).encoded
    assert lines == [
        {"id": e.id, "tokens": e.tokens.tolist(), "loss_mask": [int(bit) for bit in e.loss_mask]} for e in expected
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--recipe", "absent.toml"], "absent.toml"),
        (["--rows", "0"], "rows is 0; it must be at least 1"),
        (["--model", "."], "there is no tokenizer"),
    ],
)
def test_what_cannot_be_shown_is_one_line(arguments, changes, message, capsys, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cli.main([*arguments, *changes]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llmeraser: error: ") and message in error


def test_control_characters_are_written_out_and_split_characters_survive():
    tokenizer = byte_tokenizer()
    (row,) = load_examples([{"prompt": "a\x1b[31m\u202e東", "completion": "là\n"}])
    (encoded,) = encode_examples([row], Recipe(), tokenizer).encoded
    assert marked_text(encoded, tokenizer) == "a\\x1b[31m\\u202e東⟦là\n</s>⟧"
    # The loss begins within a character.
    mask = encoded.loss_mask.copy()
    mask[encoded.response_start - 1] = True
    within = EncodedExample("0", encoded.tokens, encoded.response_start, mask)
    assert marked_text(within, tokenizer).endswith("là\n</s>⟧")


def test_the_turn_s_end_is_found_where_it_is_not_the_tokenizer_s():
    tokenizer = byte_tokenizer(TEMPLATES["chatml"], eos="<|endoftext|>")
    rows = load_examples([{"messages": messages} for messages in CONVERSATIONS])
    ends = turn_ends(encode_examples(rows, Recipe(), tokenizer).encoded, tokenizer)
    assert sorted(ends) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    texts = load_examples([{"prompt": "a", "completion": "b"}])
    assert turn_ends(encode_examples(texts, Recipe(add_eos=False), tokenizer).encoded, tokenizer) == frozenset()
