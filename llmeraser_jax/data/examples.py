"""Training examples as text: what one is, how files become examples, and how they are written back.

Nothing here knows tokens. A loaded set is a tuple in file order with unique ids; every problem of a file is
reported with its path and row before anything is computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeraser_jax import files

# Format name -> (query columns, response column); a format is named after its first column.
_FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "instruction": (("instruction",), "output"),
    "question": (("question",), "answer"),
    "prompt": (("prompt",), "response"),
    "messages": (("messages",), "messages"),
}
FORMATS: tuple[str, ...] = tuple(_FORMATS)
_FORMAT_HELP = (
    "instruction/output (input optional), question/answer, prompt/response, or messages ending with the assistant's"
)
_PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})


class DataError(ValueError):
    """A data file that cannot be used as it stands; the message names file, row and cause."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One query and the response that the model is trained to give.

    Attributes:
        id: unique within its set.
        instruction: the query; the question or prompt of the formats "question" and "prompt"; empty for
            "messages".
        input: what the instruction applies to; only in the format "instruction".
        response: what the loss is on.
        messages: the conversation before the response as (role, content) pairs; only in the format
            "messages".
        format: columns it came from, one of `FORMATS`; `templates.Recipe` picks a prompt template by it.
    """

    id: str
    instruction: str = ""
    input: str = ""
    response: str
    messages: tuple[tuple[str, str], ...] = ()
    format: str = "instruction"

    def __post_init__(self):
        problem = None
        if self.format not in _FORMATS:
            problem = f"format is {self.format!r}; it must be one of {', '.join(FORMATS)}"
        elif self.format == "messages" and (self.instruction or self.input):
            problem = (
                "an example of format 'messages' holds its query in messages; leave instruction and input empty"
            )
        elif self.format == "messages" and not self.messages:
            problem = "an example of format 'messages' needs at least one message before the response"
        elif self.format != "messages" and self.messages:
            problem = f"messages are given but format is {self.format!r}; set format='messages'"
        elif self.format in ("question", "prompt") and self.input:
            problem = f"an example of format {self.format!r} has no input; put the whole query into instruction"
        if problem:
            msg = f"Example {self.id!r}: {problem}."
            raise ValueError(msg)

    @property
    def query(self) -> str:
        """The text that the user controls, and that `modify_query` replaces.

        The last user message of a conversation; the input where there is one; else the instruction.
        """
        if self.format == "messages":
            users = [content for role, content in self.messages if role == "user"]
            return users[-1] if users else ""
        return self.input or self.instruction


def to_row(example: Example) -> dict[str, Any]:
    """The example as a row of its column format, without the id; `load_examples` reads it back."""
    if example.format == "messages":
        turns = (*example.messages, ("assistant", example.response))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    (query_column,), response_column = _FORMATS[example.format]
    row = {query_column: example.instruction, response_column: example.response}
    if example.format == "instruction":
        row = {"instruction": example.instruction, "input": example.input, "output": example.response}
    return row


def content_hash(example: Example) -> str:
    """SHA-256 (hex) of the example's text and format, not of its id; the same on every platform."""
    canonical = json.dumps(to_row(example), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def load_examples(path: str | os.PathLike[str]) -> tuple[Example, ...]:
    """Reads a data set.

    Rows are `instruction/output` (`input` optional), `question/answer`, `prompt/response`, or `messages`, one
    format per file; other columns are ignored. The id is the column `id` (string or integer), else the row
    number counted from 0.

    Args:
        path: a JSON list, JSON lines (also in a file named `.json`), a parquet file, or a directory written
            by `datasets.Dataset.save_to_disk`.

    Returns:
        The examples in file order.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: anything in it that is not an example; the message names the file and the row.
    """
    path = Path(path)
    if not path.exists():
        msg = f"{path}: there is no such file or directory."
        raise FileNotFoundError(msg)
    examples: list[Example] = []
    rows_of_ids: dict[str, str] = {}
    has_ids = False
    for number, (where, row) in enumerate(_read_rows(path)):
        label = f"{path}, {where}"
        if not isinstance(row, Mapping):
            msg = f"{label}: expected an object with columns, got {type(row).__name__}."
            raise DataError(msg)
        example = _example_from_row(row, number, label)
        if examples and example.format != examples[0].format:
            msg = (
                f"{label}: columns of format {example.format!r}, but the rows before have "
                f"{examples[0].format!r}; "
                "split the file into one per format."
            )
            raise DataError(msg)
        if examples and ("id" in row) != has_ids:
            msg = f"{label}: {'has' if 'id' in row else 'lacks'} an id, unlike the rows before; give all or none."
            raise DataError(msg)
        has_ids = "id" in row
        if example.id in rows_of_ids:
            msg = f"{label}: id {example.id!r} was already used in {rows_of_ids[example.id]}; ids must be unique."
            raise DataError(msg)
        rows_of_ids[example.id] = where
        examples.append(example)
    if not examples:
        msg = f"{path}: holds no examples."
        raise DataError(msg)
    return tuple(examples)


def save_examples(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
    """Writes JSON lines that `load_examples` reads back to equal examples. Whole or not at all.

    Args:
        path: the file to write or replace; `.jsonl` or `.json`, since reading goes by the suffix.
        examples: at least one, all of one format, with unique ids and non-empty responses.

    Raises:
        ValueError: examples that could not be read back.
    """
    path = Path(path)
    if path.suffix not in _JSON_SUFFIXES:
        msg = f"{path}: examples are written as JSON lines; name the file .jsonl."
        raise ValueError(msg)
    if not examples:
        msg = f"{path}: there are no examples to write."
        raise ValueError(msg)
    formats = sorted({example.format for example in examples})
    if len(formats) > 1:
        msg = f"{path}: examples of several formats ({', '.join(formats)}); write one file per format."
        raise ValueError(msg)
    seen: set[str] = set()
    lines = []
    for example in examples:
        row = {"id": example.id, **to_row(example)}
        if example.id in seen:
            msg = f"{path}: id {example.id!r} occurs twice; ids must be unique."
            raise ValueError(msg)
        if _example_from_row(row, 0, f"{path}, example {example.id!r}") != example:
            msg = f"{path}: example {example.id!r} would not be read back as it is."
            raise ValueError(msg)
        seen.add(example.id)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    files.atomic_write_text(path, "".join(lines))


def _example_from_row(row: Mapping[str, Any], number: int, label: str) -> Example:
    """Checks one row; `number` is its id when it brings none, `label` says where it is."""
    id_ = _read_id(row, number, label)
    present = [
        name
        for name, (query, response) in _FORMATS.items()
        if all(row.get(column) is not None for column in (*query, response))
    ]
    if not present:
        columns = ", ".join(str(column) for column in row) or "none"
        started = [name for name, (query, _) in _FORMATS.items() if any(column in row for column in query)]
        missing = [c for n in started for c in (*_FORMATS[n][0], _FORMATS[n][1]) if row.get(c) is None]
        cause = f"missing column {' / '.join(dict.fromkeys(missing))!r}" if missing else "no known column format"
        msg = f"{label}: {cause} (columns found: {columns}). Expected {_FORMAT_HELP}."
        raise DataError(msg)
    if len(present) > 1:
        msg = f"{label}: columns of several formats ({', '.join(present)}); keep those of one."
        raise DataError(msg)
    (format_,) = present
    if format_ == "messages":
        return _example_from_messages(row["messages"], id_, label)
    (query_column,), response_column = _FORMATS[format_]
    columns = (query_column, response_column)
    if format_ == "instruction" and row.get("input") is not None:
        columns = (*columns, "input")
    for column in columns:
        _check_text(row[column], f"{label}: column {column!r}")
    _check_response(row[response_column], f"{label}: column {response_column!r}")
    return Example(
        id=id_,
        instruction=row[query_column],
        input=row["input"] if "input" in columns else "",
        response=row[response_column],
        format=format_,
    )


def _example_from_messages(messages: Any, id_: str, label: str) -> Example:
    """The last message is the response, the ones before it the query."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        msg = f"{label}: column 'messages' must be a non-empty list of {{role, content}} objects."
        raise DataError(msg)
    turns = []
    for position, message in enumerate(messages):
        where = f"{label}: message {position}"
        if not isinstance(message, Mapping):
            msg = f"{where}: expected an object with role and content, got {type(message).__name__}."
            raise DataError(msg)
        # Arrow tables fill absent keys with nulls; a key with a value is text the template might show.
        extra = sorted(str(k) for k, v in message.items() if k not in ("role", "content") and v is not None)
        if extra:
            msg = f"{where}: key {', '.join(map(repr, extra))} is not supported; a message has role and content."
            raise DataError(msg)
        for key in ("role", "content"):
            _check_text(message.get(key), f"{where}: {key!r}")
        turns.append((message["role"], message["content"]))
    last_role, response = turns[-1]
    if last_role != "assistant":
        msg = f"{label}: the last message is the {last_role or 'nameless'}'s; it must be the assistant's response."
        raise DataError(msg)
    if not any(role == "user" for role, _ in turns[:-1]):
        msg = f"{label}: no user message comes before the response."
        raise DataError(msg)
    _check_response(response, f"{label}: the last message")
    return Example(id=id_, response=response, messages=tuple(turns[:-1]), format="messages")


def _read_id(row: Mapping[str, Any], number: int, label: str) -> str:
    if "id" not in row:
        return str(number)
    id_ = row["id"]
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        msg = f"{label}: id must be a string or an integer, got {type(id_).__name__} {id_!r}."
        raise DataError(msg)
    _check_text(str(id_), f"{label}: id")
    if not str(id_).strip():
        msg = f"{label}: id is empty."
        raise DataError(msg)
    return str(id_)


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        msg = f"{what} must be a string, got {type(value).__name__}: {str(value)[:60]!r}."
        raise DataError(msg)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        msg = f"{what} holds half of a surrogate pair at character {error.start}; it is not valid Unicode."
        raise DataError(msg) from error


def _check_response(response: str, what: str) -> None:
    if not response.strip():
        msg = f"{what}: the response is empty; there is nothing to train on."
        raise DataError(msg)


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where the row is, its parsed value) from any of the containers."""
    if path.is_dir():
        rows: Iterable[Any] = _read_datasets_directory(path)
    elif path.suffix in _PARQUET_SUFFIXES:
        rows = _read_parquet(path)
    elif path.suffix in _JSON_SUFFIXES:
        yield from _read_json(path)
        return
    else:
        known = ", ".join(sorted(_JSON_SUFFIXES | _PARQUET_SUFFIXES))
        msg = f"{path}: unknown suffix {path.suffix!r}; expected {known}, or a datasets directory."
        raise DataError(msg)
    for number, row in enumerate(rows):
        yield f"row {number}", row


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON list, or one JSON object per line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 at byte {error.start}."
        raise DataError(msg) from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            msg = f"{path}, line {error.lineno}: not JSON: {error.msg}."
            raise DataError(msg) from error
        for number, row in enumerate(rows):
            yield f"row {number}", row
        return
    number = 0
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            msg = f"{path}, line {line_number}: not JSON: {error.msg}. Expected a list, or one object per line."
            raise DataError(msg) from error
        yield f"row {number} (line {line_number})", row
        number += 1


def _read_parquet(path: Path) -> Iterable[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        msg = f"{path}: not a readable parquet file: {error}"
        raise DataError(msg) from error


def _read_datasets_directory(path: Path) -> Iterable[Any]:
    import datasets  # slow to import, and only this container needs it

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        msg = f"{path}: not a directory written by datasets' save_to_disk: {error}"
        raise DataError(msg) from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = [str(split) for split in loaded]
        msg = f"{path}: holds the splits {', '.join(splits)}; name one of them, e.g. {path / splits[0]}."
        raise DataError(msg)
    return loaded
