"""Request files: what each action does to an example, and every refusal."""

import dataclasses
import json

import pytest

from llmeraser_jax.data import (
    Action,
    Example,
    Request,
    RequestError,
    apply_requests,
    edited_example,
    load_requests,
    parse_requests,
    request_to_json,
)

EXAMPLES = (
    Example(id="0", instruction="Will she like it?", input="Likes: Alien", response="Yes."),
    Example(id="1", instruction="Say no.", response="No."),
    Example(id="2", instruction="Say it.", input="A", response="It."),
    Example(id="3", instruction="Rest.", response="Kept."),
)
CHAT = Example(
    id="c",
    messages=(("user", "Hi"), ("assistant", "Hello"), ("user", "Name?"), ("tool", "none")),
    response="Ada",
    format="messages",
)
QUESTION = Example(id="q", instruction="Who?", response="She.", format="question")


def test_a_file_mixing_all_actions_gives_the_edited_data(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"id": "2", "action": "remove"}\n'
        "\n"
        '{"id": "0", "action": "modify_query", "query": "Likes: \u2028"}\n'
        '{"id": 1, "action": "correct_response", "response": "Yes."}\n',
        encoding="utf-8",
    )
    requests = load_requests(path, EXAMPLES)
    assert requests == (
        Request(id="2", action=Action.REMOVE, changes={}, line=1),
        Request(id="0", action=Action.MODIFY_QUERY, changes={"query": "Likes: \u2028"}, line=3),
        Request(id="1", action=Action.CORRECT_RESPONSE, changes={"response": "Yes."}, line=4),
    )
    assert apply_requests(EXAMPLES, requests) == (
        Example(id="0", instruction="Will she like it?", input="Likes: \u2028", response="Yes."),
        Example(id="1", instruction="Say no.", response="Yes."),
        EXAMPLES[3],
    )


@pytest.mark.parametrize(
    ("example", "changes", "wanted"),
    [
        (
            EXAMPLES[0],
            {"query": "x"},
            Example(id="0", instruction="Will she like it?", input="x", response="Yes."),
        ),
        (EXAMPLES[1], {"query": "x"}, Example(id="1", instruction="x", response="No.")),
        (
            EXAMPLES[0],
            {"instruction": "x"},
            Example(id="0", instruction="x", input="Likes: Alien", response="Yes."),
        ),
        (EXAMPLES[0], {"input": ""}, Example(id="0", instruction="Will she like it?", response="Yes.")),
        (
            EXAMPLES[1],
            {"instruction": "x", "input": "y"},
            Example(id="1", instruction="x", input="y", response="No."),
        ),
        (QUESTION, {"query": "x"}, Example(id="q", instruction="x", response="She.", format="question")),
        (
            CHAT,
            {"query": "x"},
            Example(
                id="c",
                messages=(("user", "Hi"), ("assistant", "Hello"), ("user", "x"), ("tool", "none")),
                response="Ada",
                format="messages",
            ),
        ),
    ],
)
def test_a_modified_query_replaces_exactly_what_it_names(example, changes, wanted):
    request = Request(id=example.id, action=Action.MODIFY_QUERY, changes=changes)
    assert edited_example(example, request) == wanted


def test_a_removed_example_has_no_successor_and_a_foreign_request_is_refused():
    request = Request(id="1", action=Action.REMOVE)
    assert edited_example(EXAMPLES[1], request) is None
    with pytest.raises(ValueError, match="names '1', not '0'"):
        edited_example(EXAMPLES[0], request)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "9", "action": "remove"}', "unknown id '9'; the data has 4 examples, from '0' to '3'"),
        (
            '{"id": "0", "action": "forget"}',
            "unknown action 'forget'; the actions are remove, modify_query, ",
        ),
        ('{"id": "0", "action": ["remove"]}', r"unknown action \['remove'\]"),
        ('{"id": "0"}', "key 'action' is missing"),
        ('{"action": "remove"}', "key 'id' is missing"),
        ('{"id": null, "action": "remove"}', "id must be a string, got NoneType"),
        ('{"id": "0", "action": "remove", "query": "x"}', "unknown key 'query'; remove takes nothing"),
        (
            '{"id": "0", "action": "modify_query", "response": "x"}',
            "unknown key 'response'; modify_query takes",
        ),
        ('{"id": "0", "action": "modify_query"}', "modify_query needs 'query' or 'instruction' or 'input'"),
        ('{"id": "0", "action": "correct_response"}', "correct_response needs 'response'"),
        ('{"id": "0", "action": "correct_response", "response": " "}', "'response' is empty; to drop"),
        ('{"id": "0", "action": "correct_response", "response": 1}', "'response' must be a string, got int"),
        ('{"id": "0", "action": "modify_query", "query": "x", "input": "y"}', "'query' cannot go with"),
        ('{"id": "0", "action": "modify_query", "query": "\\ud800"}', "'query' is not valid Unicode"),
        (
            '{"id": "0", "action": "correct_response", "response": "Yes."}',
            "correct_response of '0' changes nothing: response is what it was",
        ),
        (
            '{"id": "0", "action": "modify_query", "query": "Likes: Alien"}',
            "modify_query of '0' changes nothing: query is what it was",
        ),
        (
            '{"id": "q", "action": "modify_query", "input": "x"}',
            "'input' cannot be set in data of format 'question'",
        ),
        ('{"id": "0", "id": "1", "action": "remove"}', "a key occurs twice"),
        ('{"id": "0", "action"', "not JSON: .* at column 21"),
        ('["0"]', "expected an object, got list"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_cause(tmp_path, line, message):
    examples = (*EXAMPLES, QUESTION) if '"q"' in line else EXAMPLES
    path = tmp_path / "requests.jsonl"
    path.write_text('{"id": "3", "action": "remove"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(RequestError, match=f"line 2: {message}") as caught:
        load_requests(path, examples)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count("\n") == 0


def test_naming_an_example_twice_is_refused_with_both_lines():
    lines = ['{"id": "0", "action": "remove"}', '{"id": 0, "action": "correct_response", "response": "x"}']
    with pytest.raises(RequestError, match=r"^requests: line 2: id '0' was already named in line 1;"):
        parse_requests(lines, EXAMPLES)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "requests.jsonl"
    path.write_text(content)
    with pytest.raises(RequestError, match=r"requests.jsonl: holds no requests\."):
        load_requests(path, EXAMPLES)
    with pytest.raises(FileNotFoundError, match=r"absent.jsonl: there is no such request file"):
        load_requests(tmp_path / "absent.jsonl", EXAMPLES)


def test_removing_everything_is_refused_and_all_but_one_is_not():
    lines = [json.dumps({"id": e.id, "action": "remove"}) for e in EXAMPLES]
    with pytest.raises(RequestError, match="requests: removes all 4 examples"):
        parse_requests(lines, EXAMPLES)
    assert apply_requests(EXAMPLES, parse_requests(lines[1:], EXAMPLES)) == EXAMPLES[:1]


def test_every_problem_is_listed_up_to_twenty():
    lines = [{"id": str(100 + k), "action": "remove"} for k in range(25)]
    with pytest.raises(RequestError) as caught:
        parse_requests(lines, EXAMPLES, source="file")
    listed = str(caught.value).split("\n")
    assert len(listed) == 21
    assert [line.split(";")[0] for line in listed[:2]] == [
        "file: line 1: unknown id '100'",
        "file: line 2: unknown id '101'",
    ]
    assert listed[20] == "file: and 5 more."


def test_a_request_written_as_json_is_read_back_equal():
    requests = (
        Request(id="0", action=Action.MODIFY_QUERY, changes={"instruction": "é", "input": "b"}, line=1),
        Request(id="1", action=Action.REMOVE, line=2),
    )
    lines = [request_to_json(request) for request in requests]
    assert lines == [
        '{"id": "0", "action": "modify_query", "instruction": "é", "input": "b"}',
        '{"id": "1", "action": "remove"}',
    ]
    assert parse_requests(lines, EXAMPLES) == requests


def test_applying_requests_checks_their_ids():
    remove = Request(id="9", action=Action.REMOVE)
    with pytest.raises(ValueError, match="not in the data, the first '9'"):
        apply_requests(EXAMPLES, [remove])
    with pytest.raises(ValueError, match="Two requests name example '9'"):
        apply_requests(EXAMPLES, [remove, remove])


@pytest.mark.parametrize(
    ("turn", "action", "changes", "turns"),
    [
        (0, "modify_query", {"query": "Hey"}, ["Hey", "Hello", "Name?", "none", "Ada"]),
        (1, "correct_response", {"response": "Ho"}, ["Hi", "Ho", "Name?", "none", "Ada"]),
        (3, "modify_query", {"query": "found"}, ["Hi", "Hello", "Name?", "found", "Ada"]),
        (4, "correct_response", {"response": "Eve"}, ["Hi", "Hello", "Name?", "none", "Eve"]),
    ],
)
def test_one_turn_of_a_conversation_is_changed_and_the_request_written_back(turn, action, changes, turns):
    line = {"id": "c", "action": action, "turn": turn, **changes}
    (request,) = parse_requests([line], (*EXAMPLES, CHAT))
    edited = edited_example(CHAT, request)
    assert edited is not None
    assert [*(content for _, content in edited.messages), edited.response] == turns
    assert [role for role, _ in edited.messages] == [role for role, _ in CHAT.messages]
    assert json.loads(request_to_json(request)) == line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action": "modify_query", "turn": 1, "query": "x"}, "turn 1 of 'c' is the assistant's; change it by"),
        ({"action": "correct_response", "turn": 2, "response": "x"}, "turn 2 of 'c' is the user's; change it by"),
        ({"action": "modify_query", "turn": 5, "query": "x"}, "turn is 5, and 'c' has 5 messages, from 0"),
        ({"action": "modify_query", "turn": "0", "query": "x"}, "'turn' is '0'; it is the number of a message"),
        ({"action": "remove", "turn": 0}, "no part of a removal"),
        ({"action": "modify_query", "turn": 0, "instruction": "x"}, "change it by modify_query with 'query'"),
        ({"action": "modify_query", "turn": 0, "query": "Hi"}, "changes nothing"),
    ],
)
def test_a_turn_that_is_not_there_or_another_role_s_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        parse_requests([{"id": "c", **fields}], (*EXAMPLES, CHAT))


def test_a_text_row_can_be_removed_or_corrected_and_has_no_query():
    rows = tuple(Example(id=str(k), response=f"Text {k}.", format="text") for k in range(2))
    (request,) = parse_requests([{"id": "0", "action": "correct_response", "response": "New."}], rows)
    assert apply_requests(rows, [request])[0].response == "New."
    assert apply_requests(rows, parse_requests([{"id": "0", "action": "remove"}], rows)) == rows[1:]
    with pytest.raises(RequestError, match="an example of format 'text' has no query"):
        parse_requests([{"id": "0", "action": "modify_query", "query": "x"}], rows)
    with pytest.raises(RequestError, match="turn is 0, and '0' has no messages"):
        parse_requests([{"id": "0", "action": "correct_response", "turn": 0, "response": "x"}], rows)


def test_a_copy_of_what_is_named_that_stays_in_the_data_is_mentioned(caplog):
    copies = tuple(dataclasses.replace(EXAMPLES[1], id=f"copy{k}") for k in range(2))
    removal = {"id": "1", "action": "remove"}
    parse_requests([removal], (*EXAMPLES, *copies))
    assert "'1' stays in the data word for word, as 'copy0', 'copy1': what it says stays known" in caplog.text
    caplog.clear()
    parse_requests([removal, *({**removal, "id": c.id} for c in copies)], (*EXAMPLES, *copies))
    parse_requests([removal], EXAMPLES)
    assert not caplog.text
