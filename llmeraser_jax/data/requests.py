"""Requests: which examples go, and how others should have been.

A request file is checked as a whole against the data before anything is computed; everything wrong with it is
reported at once.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeraser_jax import files
from llmeraser_jax.data.examples import Example
from llmeraser_jax.data.pictures import Picture, copy_pictures, read_pictures
from llmeraser_jax.data.sources import describe, problem_of_json, read_rows
from llmeraser_jax.text import one_line, show

_MAX_LISTED = 20
_MAX_COPIES = 5
_PICTURE_KEYS = ("image", "images")

_log = logging.getLogger(__name__)


class RequestError(ValueError):
    """A request file that cannot be carried out; the message lists line and cause of each problem."""


class Action(enum.StrEnum):
    """What is to become of an example."""

    REMOVE = "remove"
    MODIFY_QUERY = "modify_query"
    CORRECT_RESPONSE = "correct_response"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One line of a request file.

    Attributes:
        id: the example it names.
        action: what to do.
        changes: new texts: nothing for a removal; `response` for a correction; `query`, or `instruction` and
            `input`, for a modification.
        line: its line in the file, counted from 1.
        turn: of a conversation, the message to change, counted from 0 (the response is the last); None is the last
            user message of a modification, and the response of a correction.
        images: of a modification, the pictures in place of the example's; empty leaves them.
    """

    id: str
    action: Action
    changes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    line: int = 0
    turn: int | None = None
    images: tuple[Picture, ...] = ()


def load_requests(source: Any, examples: Sequence[Example]) -> tuple[Request, ...]:
    """Reads requests and checks them against the data.

    Args:
        source: a file of JSON lines; or, from Python, a list of dicts, a `datasets.Dataset`, or a pandas frame,
            where a null is an absent key.
        examples: the training examples that the requests name by id.

    Returns:
        The requests in file order.

    Raises:
        FileNotFoundError: there is no such file.
        RequestError: everything that is wrong with it, by line.
        DataError: a source of another kind.
    """
    if not isinstance(source, str | os.PathLike):
        rows = [_without_nulls(row) for _, row in read_rows(source)]
        return parse_requests(rows, examples, source=describe(source))
    path = Path(source)
    if not path.is_file():
        msg = f"{path}: there is no such request file."
        raise FileNotFoundError(msg)
    with files.reading(path, RequestError):
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            msg = f"{path}: not UTF-8 at byte {error.start}."
            raise RequestError(msg) from error
        # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
        return parse_requests(text.split("\n"), examples, source=str(path), directory=path.parent)


def parse_requests(
    lines: Iterable[str | Mapping[str, Any]],
    examples: Sequence[Example],
    *,
    source: str = "requests",
    directory: Path = Path(),
) -> tuple[Request, ...]:
    """Checks request lines against the data.

    Args:
        lines: JSON texts or parsed objects; blank lines are skipped.
        examples: the training examples.
        source: what error messages call the origin.
        directory: what relative paths of pictures start from.

    Raises:
        RequestError: every unknown or doubly named id, unknown action, unknown or missing key, change that
            changes nothing, and line that is not a JSON object; no request at all; nothing left over.
    """
    by_id = {example.id: example for example in examples}
    requests: list[Request] = []
    problems: list[str] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            request = _parse_line(line, number, directory)
            if request.id in line_of_id:
                first = line_of_id[request.id]
                raise _ProblemError(
                    f"id {show(request.id)} was already named in line {first}; name each example once"
                )
            line_of_id[request.id] = number
            if request.id not in by_id:
                raise _ProblemError(
                    f"unknown id {show(request.id)}; the data has {len(by_id)} examples{_hint(by_id)}"
                )
            example = by_id[request.id]
            if edited_example(example, request) == example:
                changed = " and ".join([*request.changes, *(["image"] if request.images else [])])
                raise _ProblemError(
                    f"{request.action} of {show(request.id)} changes nothing: {changed} is what it was"
                )
            requests.append(request)
        except (_ProblemError, ValueError) as error:
            problems.append(f"line {number}: {one_line(error, 400)}")
    if not requests and not problems:
        problems.append("holds no requests")
    removed = {request.id for request in requests if request.action is Action.REMOVE}
    if removed and len(removed) == len(by_id):
        problems.append(f"removes all {len(by_id)} examples; an adapter trained on nothing is the initial one")
    if not problems:
        _warn_of_copies(examples, requests, source)
    if problems:
        listed = problems[:_MAX_LISTED]
        if len(problems) > _MAX_LISTED:
            listed.append(f"and {len(problems) - _MAX_LISTED} more")
        msg = "\n".join(f"{source}: {problem}." for problem in listed)
        raise RequestError(msg)
    return tuple(requests)


def edited_example(example: Example, request: Request) -> Example | None:
    """The example as it should have been, or None when it should not have been there.

    `query` replaces what `Example.query` is: the last user message, the input where there is one, else the
    instruction. `instruction` and `input` set exactly those. `turn` names another message of a conversation. New
    pictures take the places of the old ones, in order.

    Raises:
        ValueError: the request names another example, or a field that this one's format lacks.
    """
    if request.id != example.id:
        msg = f"the request names {request.id!r}, not {example.id!r}"
        raise ValueError(msg)
    changes = dict(request.changes)
    if request.action is Action.REMOVE:
        return None
    if request.images:
        if len(request.images) != len(example.images):
            msg = f"it gives {len(request.images)} pictures, and {example.id!r} has {len(example.images)}"
            raise ValueError(msg)
        example = dataclasses.replace(example, images=request.images)
        if not changes:
            return example
    if request.turn is not None:
        return _with_turn(example, request)
    if request.action is Action.CORRECT_RESPONSE:
        return dataclasses.replace(example, response=changes["response"])
    if example.format == "text":
        msg = "an example of format 'text' has no query; correct its response, which is the text, or remove it"
        raise ValueError(msg)
    if "query" in changes:
        return _with_query(example, changes["query"])
    if example.format != "instruction":
        keys = " and ".join(map(repr, changes))
        msg = f"{keys} cannot be set in data of format {example.format!r}; give 'query'"
        raise ValueError(msg)
    return dataclasses.replace(example, **changes)


def apply_requests(examples: Sequence[Example], requests: Iterable[Request]) -> tuple[Example, ...]:
    """The edited data: removed examples dropped, edited ones in their places.

    Raises:
        ValueError: a request that names no example, or two that name one.
    """
    pending: dict[str, Request] = {}
    for request in requests:
        if request.id in pending:
            msg = f"Two requests name example {request.id!r}; name each once."
            raise ValueError(msg)
        pending[request.id] = request
    edited = []
    for example in examples:
        request = pending.pop(example.id, None)
        wanted = example if request is None else edited_example(example, request)
        if wanted is not None:
            edited.append(wanted)
    if pending:
        msg = (
            f"{len(pending)} request(s) name examples that are not in the data, the first {next(iter(pending))!r}."
        )
        raise ValueError(msg)
    return tuple(edited)


def request_to_json(request: Request) -> str:
    """The request as one line of a request file, without the line end; pictures are named by their paths."""
    return _to_line(request, [picture.path for picture in request.images])


def save_requests(path: str | os.PathLike[str], requests: Iterable[Request]) -> None:
    """Writes a request file that `load_requests` reads back. New pictures are copied to `pictures` beside it."""
    path = Path(path)
    lines = [_to_line(request, copy_pictures(path.parent, request.images)) + "\n" for request in requests]
    files.atomic_write_text(path, "".join(lines))


def _to_line(request: Request, images: Sequence[str]) -> str:
    turn = {} if request.turn is None else {"turn": request.turn}
    fields: dict[str, Any] = {"id": request.id, "action": str(request.action), **turn, **request.changes}
    if images:
        fields["images"] = list(images)
    return json.dumps(fields, ensure_ascii=False)


def _without_nulls(row: Any) -> Any:
    """A table's row as a request: columns that say nothing are absent, and a number of turns is whole again."""
    if not isinstance(row, Mapping):
        return row
    fields = {key: value for key, value in row.items() if value is not None}
    turn = fields.get("turn")
    return {**fields, "turn": int(turn)} if isinstance(turn, float) and turn.is_integer() else fields


class _ProblemError(Exception):
    """One line's problem, collected into a RequestError."""


def _parse_line(line: str | Mapping[str, Any], number: int, directory: Path) -> Request:
    """Checks what a line says by itself."""
    if isinstance(line, str):
        try:
            fields = json.loads(line, object_pairs_hook=_refuse_repeated_keys)
        except (ValueError, RecursionError) as error:
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise _ProblemError(f"not JSON: {problem_of_json(error)}{column}") from error
    else:
        fields = line
    if not isinstance(fields, Mapping):
        raise _ProblemError(f"expected an object, got {type(fields).__name__}")
    for key in ("id", "action"):
        if key not in fields:
            raise _ProblemError(f"key {key!r} is missing")
    id_, name = fields["id"], fields["action"]
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise _ProblemError(f"id must be a string, got {type(id_).__name__}")
    if name not in list(Action):
        raise _ProblemError(f"unknown action {show(name)}; the actions are {', '.join(Action)}")
    action = Action(name)
    turn = fields.get("turn")
    if "turn" in fields and (action is Action.REMOVE or type(turn) is not int or turn < 0):
        raise _ProblemError(
            f"'turn' is {show(turn)}; it is the number of a message to change, counted from 0, and no part of a "
            "removal"
        )
    changes = {key: value for key, value in fields.items() if key not in ("id", "action", "turn")}
    images: tuple[Picture, ...] = ()
    given = [key for key in _PICTURE_KEYS if key in changes] if action is Action.MODIFY_QUERY else []
    if len(given) > 1:
        raise _ProblemError("give 'image' or 'images', not both")
    if given:
        images = read_pictures(changes.pop(given[0]), directory, repr(given[0]))
        if not images:
            raise _ProblemError(f"{given[0]!r} names no picture; to drop the example use remove")
    if changes or not images:
        _check_changes(action, changes)
    elif turn is not None:
        raise _ProblemError("'turn' names a message, and only pictures are to change")
    return Request(id=str(id_), action=action, changes=changes, line=number, turn=turn, images=images)


def _check_changes(action: Action, changes: Mapping[str, Any]) -> None:
    allowed = {
        Action.REMOVE: (),
        Action.MODIFY_QUERY: ("query", "instruction", "input"),
        Action.CORRECT_RESPONSE: ("response",),
    }[action]
    unknown = [key for key in changes if key not in allowed]
    if unknown:
        shown = (*allowed, *_PICTURE_KEYS[: action is Action.MODIFY_QUERY])
        takes = " or ".join(map(repr, shown)) or "nothing"
        raise _ProblemError(
            f"unknown key {', '.join(map(show, unknown))}; {action} takes {takes} besides id and action"
        )
    if allowed and not changes:
        raise _ProblemError(f"{action} needs {' or '.join(map(repr, allowed))}")
    if "query" in changes and len(changes) > 1:
        raise _ProblemError("'query' cannot go with 'instruction' or 'input'; give one or the others")
    for key, value in changes.items():
        if not isinstance(value, str):
            raise _ProblemError(f"{key!r} must be a string, got {type(value).__name__}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _ProblemError(f"{key!r} is not valid Unicode") from error
    if action is Action.CORRECT_RESPONSE and not changes["response"].strip():
        raise _ProblemError("'response' is empty; to drop the example use remove")


def _warn_of_copies(examples: Sequence[Example], requests: Sequence[Request], source: str) -> None:
    """Mentions examples that are, word for word, what a request takes away, and that no request names."""
    named = {request.id for request in requests}
    copies: dict[Example, list[str]] = {}
    for example in examples:
        if example.id not in named:
            copies.setdefault(dataclasses.replace(example, id=""), []).append(example.id)
    for example in examples:
        kept = copies.get(dataclasses.replace(example, id=""), []) if example.id in named else []
        if kept:
            others = f" and {len(kept) - _MAX_COPIES} more" if len(kept) > _MAX_COPIES else ""
            _log.warning(
                "%s: %r stays in the data word for word, as %s%s: what it says stays known. Name the copies too.",
                source,
                example.id,
                ", ".join(map(repr, kept[:_MAX_COPIES])),
                others,
            )


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _ProblemError("a key occurs twice")
    return fields


def _hint(by_id: Mapping[str, Example]) -> str:
    """A first and a last id, so that a wrong numbering is seen at once."""
    ids = list(by_id)
    return f", from {show(ids[0])} to {show(ids[-1])}" if ids else ""


def _with_turn(example: Example, request: Request) -> Example:
    """The conversation with one message changed."""
    turns = [*example.messages, ("assistant", example.response)]
    if example.format != "messages" or request.turn is None or request.turn >= len(turns):
        has = f"{len(turns)} messages, from 0" if example.format == "messages" else "no messages"
        msg = f"turn is {request.turn}, and {example.id!r} has {has}"
        raise ValueError(msg)
    role = turns[request.turn][0]
    corrects = request.action is Action.CORRECT_RESPONSE
    key = "response" if corrects else "query"
    if (role == "assistant") != corrects or key not in request.changes:
        action = Action.CORRECT_RESPONSE if role == "assistant" else Action.MODIFY_QUERY
        takes = "response" if role == "assistant" else "query"
        msg = f"turn {request.turn} of {example.id!r} is the {role}'s; change it by {action} with {takes!r}"
        raise ValueError(msg)
    turns[request.turn] = (role, request.changes[key])
    return dataclasses.replace(example, messages=tuple(turns[:-1]), response=turns[-1][1])


def _with_query(example: Example, query: str) -> Example:
    if example.format == "messages":
        last_user = max(k for k, (role, _) in enumerate(example.messages) if role == "user")
        messages = list(example.messages)
        messages[last_user] = ("user", query)
        return dataclasses.replace(example, messages=tuple(messages))
    if example.input:
        return dataclasses.replace(example, input=query)
    return dataclasses.replace(example, instruction=query)
