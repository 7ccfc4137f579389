"""Data as people have them: columns, containers and objects that other trainers take, to the same examples."""

import dataclasses
import json

import pytest

from llmeraser_jax.data import (
    DataError,
    Example,
    content_hash,
    encode_examples,
    load_examples,
    marked_text,
    save_examples,
)
from llmeraser_jax.data.templates import Recipe
from tests.data.chat_tokenizers import byte_tokenizer
from tests.golden.token_cases import TEMPLATES

USER = {"role": "user", "content": "Who?"}
ASSISTANT = {"role": "assistant", "content": "Ona."}
PARTS = [{"type": "text", "text": "W"}, {"type": "text", "text": "ho?"}]
TOOLS = [{"type": "function", "function": {"name": "find", "description": "b, then a"}}]
CHAT = Example(id="0", messages=(("user", "Who?"),), response="Ona.", format="messages")


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "a ", "completion": " b"}, Example(id="0", instruction="a ", response=" b", format="prompt")),
        ({"text": "All of it."}, Example(id="0", response="All of it.", format="text")),
        ({"instruction": "a", "response": "b"}, Example(id="0", instruction="a", response="b")),
        (
            {"instruction": "a", "context": "c", "response": "b", "category": "qa"},
            Example(id="0", instruction="a", input="c", response="b"),
        ),
        (
            {"instruction": "a", "input": "", "output": "b", "text": "a, b"},
            Example(id="0", instruction="a", response="b"),
        ),
        ({"prompt": [USER], "completion": [ASSISTANT]}, CHAT),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ona."}]}, CHAT),
        ({"conversations": [USER, ASSISTANT]}, CHAT),
        (
            {
                "messages": [
                    {**USER, "content": [{"type": "text", "text": "W"}, {"type": "text", "text": "ho?"}]},
                    ASSISTANT,
                ]
            },
            CHAT,
        ),
        ({"messages": [USER, ASSISTANT], "tools": None, "system": None, "history": []}, CHAT),
        # Some templates tell an empty list from none.
        ({"messages": [USER, ASSISTANT], "tools": []}, dataclasses.replace(CHAT, tools="[]")),
        ({"messages": [USER, ASSISTANT], "tools": TOOLS}, dataclasses.replace(CHAT, tools=json.dumps(TOOLS))),
        (
            {"messages": [USER, ASSISTANT], "tools": json.dumps(TOOLS, indent=1)},
            dataclasses.replace(CHAT, tools=json.dumps(TOOLS)),
        ),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"enable_thinking": False}},
            dataclasses.replace(CHAT, chat_template_kwargs='{"enable_thinking": false}'),
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_row_of_another_trainer_is_this_example(row, example, tmp_path):
    assert load_examples([row]) == (example,)
    save_examples(tmp_path / "again.jsonl", [example])
    assert load_examples(tmp_path / "again.jsonl") == (example,)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": "b", "system": "Be brief."}, "column 'system' would be passed over"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "column 'history' would be passed over"),
        ({"question": "a", "answer": "b", "context": "c"}, "column 'context' would be passed over"),
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "column 'tools' would be passed over"),
        ({"messages": [USER, ASSISTANT], "system": "Be brief."}, "column 'system' would be passed over"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "has both 'response' and 'completion'"),
        ({"instruction": "a", "output": "b", "input": "c", "context": "d"}, "has both 'input' and 'context'"),
        (
            {"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT]},
            "has 3 messages; the response must be one",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "audio"}]}, ASSISTANT]},
            "a part of type 'audio'; only parts of",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "image"}]}, ASSISTANT]},
            "a part of type 'image' and no picture",
        ),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]}, "message 1: key 'tool_calls' is not supported"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "column 'tools' is not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "column 'tools': it must be a list of JSON schemas"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tokenize": False}},
            "tokenize cannot be set there",
        ),
        ({"completion": "a"}, "no known column format"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_would_be_passed_over_is_refused_by_name(row, message):
    with pytest.raises(DataError, match=message) as caught:
        load_examples([row])
    assert str(caught.value).startswith("the list given, row 0: ")


def test_ignored_columns_are_listed_once(caplog):
    rows = [
        {"prompt": "a", "completion": "b", "source": "web", "score": None},
        {"prompt": "c", "completion": "d", "n": 1},
    ]
    load_examples(rows)
    assert caplog.messages == ["the list given: these columns are ignored: 'source', 'n'."]


def test_csv_and_tsv_are_read_as_texts(tmp_path):
    (tmp_path / "d.csv").write_text('id,instruction,input,output\n007,"Say ""a"", then\nb",,12\n', "utf-8")
    assert load_examples(tmp_path / "d.csv") == (Example(id="007", instruction='Say "a", then\nb', response="12"),)
    (tmp_path / "d.tsv").write_text("prompt\tcompletion\na,b\tc\n", "utf-8")
    (loaded,) = load_examples(tmp_path / "d.tsv")
    assert (loaded.instruction, loaded.response) == ("a,b", "c")
    (tmp_path / "short.csv").write_text("prompt,completion\na\n", "utf-8")
    with pytest.raises(DataError, match=r"short.csv, row 0 \(line 2\): fewer fields than the first line"):
        load_examples(tmp_path / "short.csv")


ROWS = [{"prompt": f"p{k}", "completion": f"c{k}"} for k in range(4)]


def test_a_dataset_and_a_frame_give_the_examples_of_their_rows():
    import datasets
    import pandas

    expected = load_examples(ROWS)
    assert load_examples(datasets.Dataset.from_list(ROWS)) == expected
    assert load_examples(pandas.DataFrame(ROWS)) == expected
    missing = pandas.DataFrame(
        [{"instruction": "a", "input": None, "output": "b"}, {"instruction": "c", "output": "d"}]
    )
    assert [e.input for e in load_examples(missing)] == ["", ""]
    with pytest.raises(DataError, match="data is a int; expected a path, a list of dicts"):
        load_examples(3)


@pytest.mark.parametrize("keep", [[3, 1], slice(2, 4)], ids=["a list of indices", "a range of indices"])
def test_a_frame_s_index_names_its_rows_in_memory_in_parquet_and_in_a_dataset(tmp_path, keep):
    import datasets
    import pandas

    frame = pandas.DataFrame(ROWS).iloc[keep]
    frame.to_parquet(tmp_path / "d.parquet")
    for source in (frame, tmp_path / "d.parquet", datasets.Dataset.from_pandas(frame, preserve_index=True)):
        assert {e.id: e.response for e in load_examples(source)} == {str(i): f"c{i}" for i in frame.index}


def test_a_media_column_of_another_name_is_named_and_never_opened(tmp_path, caplog):
    import datasets

    table = datasets.Dataset.from_list([{**ROWS[0], "image": str(tmp_path / "absent.png")}])
    table = table.cast_column("image", datasets.Image())
    with pytest.raises(DataError, match=r"column 'image': picture '.*absent.png': is not there"):
        load_examples(table)
    assert load_examples(table.rename_column("image", "picture")) == load_examples(ROWS[:1])
    assert "these columns are ignored: 'picture'" in caplog.text


def test_tools_and_arguments_reach_the_template_and_the_content_hash():
    tokenizer = byte_tokenizer(TEMPLATES["shows tools"])
    (plain, told) = load_examples(
        [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT], "tools": json.dumps(TOOLS)}]
    )
    text = marked_text(encode_examples([told], Recipe(), tokenizer).encoded[0], tokenizer)
    assert text.startswith("<|im_start|>system\n" + json.dumps(TOOLS[0]))
    assert content_hash(plain) == content_hash(CHAT) != content_hash(told)
    with pytest.raises(ValueError, match="Example '1' has tools, which template 'plain' leaves out"):
        encode_examples([told], Recipe(template="plain"), tokenizer)
