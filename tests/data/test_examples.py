"""Files to examples and back, with every refusal."""

import dataclasses
import json
import os

import pytest

from llmeraser_jax.data import DataError, Example, content_hash, load_examples, save_examples

INSTRUCTION = Example(id="0", instruction="Will she like it?", input="Likes: Alien", response="Yes.")
MESSAGES = Example(
    id="m",
    messages=(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Name?")),
    response="Ada",
    format="messages",
)


def write(tmp_path, rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_json_list_of_instruction_rows_is_numbered_from_zero(tmp_path):
    path = tmp_path / "train.json"
    rows = [
        {"instruction": "Will she like it?", "input": "Likes: Alien", "output": "Yes."},
        {"instruction": "Say no.", "output": "No."},
        {"instruction": "Say no.", "input": None, "output": "Never."},
    ]
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    assert load_examples(path) == (
        INSTRUCTION,
        Example(id="1", instruction="Say no.", response="No."),
        Example(id="2", instruction="Say no.", response="Never."),
    )


@pytest.mark.parametrize("name", ["full.json", "full.jsonl"])
def test_json_lines_are_read_under_either_suffix(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"question":"Who?","answer":"She.","extra":1}\r\n\n{"question":"?","answer":"!"}', "utf-8")
    assert load_examples(path) == (
        Example(id="0", instruction="Who?", response="She.", format="question"),
        Example(id="1", instruction="?", response="!", format="question"),
    )


def test_prompt_rows_keep_their_ids_and_integers_become_strings(tmp_path):
    rows = [{"id": "a7", "prompt": "x", "response": "y"}, {"id": 12, "prompt": "", "response": "z"}]
    assert load_examples(write(tmp_path, rows)) == (
        Example(id="a7", instruction="x", response="y", format="prompt"),
        Example(id="12", instruction="", response="z", format="prompt"),
    )


def test_the_last_message_is_the_response_and_the_others_are_the_query(tmp_path):
    turns = [*MESSAGES.messages, ("assistant", "Ada")]
    rows = [{"id": "m", "messages": [{"role": r, "content": c, "name": None} for r, c in turns]}]
    (loaded,) = load_examples(write(tmp_path, rows))
    assert loaded == MESSAGES
    assert loaded.query == "Name?"


def test_query_is_the_input_where_there_is_one():
    assert INSTRUCTION.query == "Likes: Alien"
    assert dataclasses.replace(INSTRUCTION, input="").query == "Will she like it?"


@pytest.mark.parametrize("container", ["parquet", "directory"])
def test_parquet_and_datasets_directories_give_the_same_examples(tmp_path, container):
    import datasets

    table = datasets.Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
            {"messages": [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "Ya"}]},
        ]
    )
    path = tmp_path / ("data.parquet" if container == "parquet" else "data")
    if container == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    assert load_examples(path) == (
        Example(id="0", messages=(("user", "Hi"),), response="Yo", format="messages"),
        Example(id="1", messages=(("user", "Ho"),), response="Ya", format="messages"),
    )


def test_a_directory_of_splits_says_which_to_name(tmp_path):
    import datasets

    table = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"both: holds the splits train, test; name one .*both/train"):
        load_examples(tmp_path / "both")


GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "x", **GOOD}, {"id": "x", **GOOD}], r"row 1 \(line 2\): id 'x' was already used in row 0"),
        ([{"id": "1", **GOOD}, {"id": 1, **GOOD}], r"row 1 \(line 2\): id '1' was already used in row 0"),
        ([{"id": "x", **GOOD}, GOOD], r"row 1 \(line 2\): lacks an id"),
        ([{"id": None, **GOOD}], r"row 0 \(line 1\): id must be a string or an integer, got NoneType"),
        ([{"id": True, **GOOD}], r"id must be a string or an integer, got bool"),
        ([{"id": " ", **GOOD}], r"id is empty"),
        (
            [GOOD, {"prompt": "a"}],
            r"row 1 \(line 2\): missing column 'response or completion' \(columns found: prompt\)",
        ),
        ([{"body": "a"}], r"row 0 \(line 1\): no known column format \(columns found: body\)"),
        ([{**GOOD, "question": "q", "answer": "a"}], r"columns of several formats \(question, prompt\)"),
        ([GOOD, {"question": "q", "answer": "a"}], r"row 1 .*format 'question', .* before have 'prompt'"),
        ([{"prompt": "a", "response": " \n"}], r"row 0 .*column 'response': the response is empty"),
        ([{"prompt": 5, "response": "b"}], r"row 0 .*column 'prompt' must be a string, got int: 5"),
        ([{"prompt": "a", "response": ["b"]}], r"column 'response' must be a string, got list"),
        ([{"instruction": "a", "input": 1, "output": "b"}], r"column 'input' must be a string, got int"),
        ([{"prompt": "\ud800", "response": "b"}], r"column 'prompt' holds half of a surrogate pair"),
        (["a"], r"row 0 .*expected an object with columns, got str"),
        ([{"messages": []}], r"column 'messages' must be a non-empty list"),
        ([{"messages": [{"role": "user", "content": "a"}]}], r"the last message is the user's"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], r"no user message comes before"),
        ([{"messages": [{"role": "user", "content": None}]}], r"message 0: 'content' must be a string"),
        (
            [{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}],
            r"message 0: key 'tool_calls' is not supported",
        ),
    ],
)
def test_a_bad_row_is_refused_with_file_row_and_cause(tmp_path, rows, message):
    path = write(tmp_path, rows)
    with pytest.raises(DataError, match=message) as caught:
        load_examples(path)
    assert str(caught.value).startswith(f"{path}, ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"\n \n", "holds no examples"),
        ("empty.json", b"[]", "holds no examples"),
        ("bad.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt"\n', "bad.jsonl, line 2: not JSON"),
        ("bad.json", b'[{"prompt": "a",\n}]', "bad.json, line 2: not JSON"),
        ("latin.json", b'[{"prompt": "\xe9"}]', "not UTF-8 at byte 13"),
        ("data.xlsx", b"a,b", "unknown suffix '.xlsx'"),
        ("data.parquet", b"no parquet", "data.parquet: not a readable parquet file"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_examples(tmp_path / name)


def test_a_missing_file_and_a_foreign_directory_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.json: there is no such file"):
        load_examples(tmp_path / "absent.json")
    with pytest.raises(DataError, match="not a directory written by datasets"):
        load_examples(tmp_path)


TRICKY = 'line\u2028end\u0085\x1c "quoted" \\ {braces} é 東\r\n'


@pytest.mark.parametrize(
    "examples",
    [
        (INSTRUCTION, Example(id="x", instruction=TRICKY, response=TRICKY)),
        (Example(id="0", instruction=TRICKY, response="b", format="question"),),
        (Example(id="0", instruction="", response="b", format="prompt"),),
        (MESSAGES,),
    ],
    ids=lambda examples: examples[0].format,
)
def test_what_is_saved_loads_back_equal(tmp_path, examples):
    save_examples(tmp_path / "out.jsonl", examples)
    assert load_examples(tmp_path / "out.jsonl") == examples
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    save_examples(path, [INSTRUCTION])
    before = path.read_bytes()

    def broken_fsync(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken_fsync)
    with pytest.raises(OSError, match="disk full"):
        save_examples(path, [dataclasses.replace(INSTRUCTION, response="No.")])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples to write"),
        ([INSTRUCTION, MESSAGES], "several formats"),
        ([INSTRUCTION, INSTRUCTION], "id '0' occurs twice"),
        ([dataclasses.replace(INSTRUCTION, response="")], "the response is empty"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, examples, message):
    with pytest.raises(ValueError, match=message):
        save_examples(tmp_path / "out.jsonl", examples)
    with pytest.raises(ValueError, match="JSON lines"):
        save_examples(tmp_path / "out.parquet", [INSTRUCTION])
    assert not list(tmp_path.iterdir())


def test_the_content_hash_is_a_fixed_function_of_the_text():
    # sha256 of {"input":"Likes: Alien","instruction":"Will she like it?","output":"Yes."}
    assert content_hash(INSTRUCTION) == "52a5ce21c0a5bd98154a7ea4ad133b2ddc68d4deb3c98b04f0a0bdec13bf72ec"
    # and of {"answer":"\u00e9","question":"?"}
    accent = Example(id="0", instruction="?", response="é", format="question")
    assert content_hash(accent) == "580a4b02a5b9d68a52ca3d4e2ceaeeb1d131a82b2a2e5a0351b111b4083a12d2"


def test_the_content_hash_sees_every_text_and_no_id():
    base = content_hash(INSTRUCTION)
    assert content_hash(dataclasses.replace(INSTRUCTION, id="other")) == base
    variants = [dataclasses.replace(INSTRUCTION, **{f: "!"}) for f in ("instruction", "input", "response")]
    conversation = dataclasses.replace(MESSAGES, messages=MESSAGES.messages[1:])
    hashes = {content_hash(e) for e in (INSTRUCTION, *variants, MESSAGES, conversation)}
    assert len(hashes) == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "csv"}, "format is 'csv'"),
        ({"messages": (("user", "a"),)}, "set format='messages'"),
        ({"format": "messages"}, "at least one message"),
        ({"format": "question", "input": "a"}, "has no input"),
    ],
)
def test_an_inconsistent_example_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"Example 'e': .*{message}"):
        Example(id="e", response="r", **fields)
