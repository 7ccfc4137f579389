"""Training examples as text: what one is, how files become examples, and how they are written back.

Nothing here knows tokens. A loaded set is a tuple in file order with unique ids; every problem of a file is
reported with its path and row before anything is computed. `sources` opens the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeraser_jax import files
from llmeraser_jax.data.pictures import PICTURE_MARK, Picture, copy_pictures, read_pictures
from llmeraser_jax.data.sources import (
    JSON_SUFFIXES,
    DataError,
    describe,
    directory_of,
    problem_of_json,
    read_rows,
)
from llmeraser_jax.data.template_arguments import problem_of_template_arguments
from llmeraser_jax.text import show

_log = logging.getLogger(__name__)

# Format name -> (query column, names of the response column); a format is named after its first column.
_FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "instruction": ("instruction", ("output", "response")),
    "question": ("question", ("answer",)),
    "prompt": ("prompt", ("response", "completion")),
    "messages": ("messages", ("messages",)),
    "text": ("text", ("text",)),
}
FORMATS: tuple[str, ...] = tuple(_FORMATS)
_FORMAT_HELP = (
    "instruction/output (input optional), question/answer, prompt/response, prompt/completion, text, or messages "
    "(or conversations) ending with the assistant's"
)
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # what a chat template takes besides the messages
# Columns that other trainers show to the model, so that passing them over would change what was trained.
_NOT_PASSED_OVER = (*_TEMPLATE_COLUMNS, "system", "system_prompt", "history", "context")
_PICTURE_COLUMNS = ("image", "images")
_PICTURE_KEYS = ("image", "path")  # of a content part of type "image"
_ROLES = {  # ShareGPT's names
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One query and the response that the model is trained to give.

    Attributes:
        id: unique within its set.
        instruction: the query; the question or prompt of the formats "question" and "prompt"; empty for
            "messages" and "text".
        input: what the instruction applies to; only in the format "instruction".
        response: what the loss is on; the whole text of the format "text".
        messages: the conversation before the response as (role, content) pairs; only in the format
            "messages".
        format: columns it came from, one of `FORMATS`; `templates.Recipe` picks a prompt template by it.
        tools: JSON of the functions that the chat template is told of, or nothing; only in the format "messages".
        chat_template_kwargs: JSON of the row's own arguments for the chat template, or nothing; likewise.
        images: the pictures, in the order of the `<image>` marks in the texts.
    """

    id: str
    instruction: str = ""
    input: str = ""
    response: str
    messages: tuple[tuple[str, str], ...] = ()
    format: str = "instruction"
    tools: str = ""
    chat_template_kwargs: str = ""
    images: tuple[Picture, ...] = ()

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
        elif self.format == "text" and (self.instruction or self.input):
            problem = "an example of format 'text' is its response alone; leave instruction and input empty"
        elif self.format != "messages" and (self.tools or self.chat_template_kwargs):
            problem = f"tools and chat_template_kwargs go with format 'messages', not {self.format!r}"
        elif self.images and len(self.images) != self.num_picture_places:
            problem = (
                f"{len(self.images)} pictures ({', '.join(picture.name for picture in self.images)}) for "
                f"{self.num_picture_places} places; write {PICTURE_MARK} once in the text for each picture"
            )
        if problem:
            msg = f"Example {self.id!r}: {problem}."
            raise ValueError(msg)

    @property
    def num_picture_places(self) -> int:
        """How often `<image>` stands in the example's texts."""
        texts = (self.instruction, self.input, self.response, *(content for _, content in self.messages))
        return sum(text.count(PICTURE_MARK) for text in texts)

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
    """The example as a row of its column format, without the id; `load_examples` reads it back.

    Pictures are named by their paths; `save_examples` names copies.
    """
    row = _text_row(example)
    return {**row, "images": [picture.path for picture in example.images]} if example.images else row


def _text_row(example: Example) -> dict[str, Any]:
    if example.format == "messages":
        turns = (*example.messages, ("assistant", example.response))
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        stated = {column: getattr(example, column) for column in _TEMPLATE_COLUMNS}
        return {**row, **{column: json.loads(value) for column, value in stated.items() if value}}
    if example.format == "text":
        return {"text": example.response}
    query_column, (response_column, *_) = _FORMATS[example.format]
    row = {query_column: example.instruction, response_column: example.response}
    if example.format == "instruction":
        row = {"instruction": example.instruction, "input": example.input, "output": example.response}
    return row


def content_hash(example: Example) -> str:
    """SHA-256 (hex) of the example's text, format and pictures, not of its id; the same on every platform."""
    row = to_row(example)
    if example.images:
        row["images"] = [picture.sha256 for picture in example.images]
    canonical = json.dumps(row, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def load_examples(source: Any) -> tuple[Example, ...]:
    """Reads a data set.

    Rows are `instruction/output` (`input` optional), `question/answer`, `prompt/response` or `prompt/completion`
    (texts or messages), `text`, `messages`, or ShareGPT's `conversations`; one format per file. Messages may bring
    `tools` and `chat_template_kwargs`. Any row may bring pictures in `image` or `images`: paths, relative ones from
    the data file's directory, or the bytes, one for each `<image>` in its texts; content parts of type `image`
    become `<image>`. Other columns are ignored and listed, except those that a trainer shows to the model
    (`system`, `history`, `context`), which are refused. The id is the column `id` (string or integer),
    else the index that pandas wrote, else the row number counted from 0.

    Args:
        source: a JSON list, JSON lines (also in a file named `.json`), CSV, a parquet file, or a directory written
            by `datasets.Dataset.save_to_disk`; or, from Python, a list of dicts, a `datasets.Dataset`, or a pandas
            frame.

    Returns:
        The examples in order.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: anything in it that is not an example; the message names the file and the row.
    """
    name = describe(source)
    with files.reading(name, DataError):
        return _read_examples(source, name, directory_of(source))


def _read_examples(source: Any, name: str, directory: Path) -> tuple[Example, ...]:
    examples: list[Example] = []
    rows_of_ids: dict[str, str] = {}
    ignored: dict[str, None] = {}
    has_ids = False
    for number, (where, row) in enumerate(read_rows(source)):
        label = f"{name}, {where}"
        if not isinstance(row, Mapping):
            msg = f"{label}: expected an object with columns, got {type(row).__name__}."
            raise DataError(msg)
        example, used = _example_from_row(row, number, label, directory)
        ignored.update(dict.fromkeys(str(c) for c in row if c not in used and row[c] is not None))
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
            first = rows_of_ids[example.id]
            msg = f"{label}: id {show(example.id)} was already used in {first}; ids must be unique."
            raise DataError(msg)
        rows_of_ids[example.id] = where
        examples.append(example)
    if not examples:
        msg = f"{name}: holds no examples."
        raise DataError(msg)
    if ignored:
        _log.warning("%s: these columns are ignored: %s.", name, ", ".join(map(show, ignored)))
    return tuple(examples)


def save_examples(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
    """Writes JSON lines that `load_examples` reads back to equal examples. Whole or not at all.

    Pictures are copied to `pictures` beside the file, so that the data needs nothing of where it came from.

    Args:
        path: the file to write or replace; `.jsonl` or `.json`, since reading goes by the suffix.
        examples: at least one, all of one format, with unique ids and non-empty responses.

    Raises:
        ValueError: examples that could not be read back.
    """
    path = Path(path)
    if path.suffix not in JSON_SUFFIXES:
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
        row = {"id": example.id, **_text_row(example)}
        if example.images:
            row["images"] = list(copy_pictures(path.parent, example.images))
        if example.id in seen:
            msg = f"{path}: id {example.id!r} occurs twice; ids must be unique."
            raise ValueError(msg)
        if _example_from_row(row, 0, f"{path}, example {example.id!r}", path.parent)[0] != example:
            msg = f"{path}: example {example.id!r} would not be read back as it is."
            raise ValueError(msg)
        seen.add(example.id)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    files.atomic_write_text(path, "".join(lines))


def _example_from_row(row: Mapping[str, Any], number: int, label: str, directory: Path) -> tuple[Example, set[str]]:
    """Checks one row; `number` is its id when it brings none, `label` says where it is.

    Returns:
        The example, and the columns that it was made of.
    """
    id_ = _read_id(row, number, label)
    found = _columns_of(row, label)
    format_, query_column, response_column = found
    used = {"id", query_column, response_column, *_PICTURE_COLUMNS}
    pictures = _read_picture_columns(row, label, directory)
    if format_ == "messages":
        messages = row[query_column]
        if response_column != query_column:
            _check_completion(row[response_column], f"{label}: column {response_column!r}")
            messages = [*messages, *row[response_column]]
        stated = {column: _read_json_column(row, column, label) for column in _TEMPLATE_COLUMNS}
        parts: list[Any] = []
        example = _example_from_messages(messages, query_column, id_, label, stated, parts)
        given = [part for part in parts if part is not None]
        if bool(given) == bool(pictures) and parts:
            both = "pictures in a column and in its messages; keep them in one place"
            problem = both if given else "a part of type 'image' and no picture; name it in the column 'images'"
            msg = f"{label}: has {problem}."
            raise DataError(msg)
        pictures = pictures or read_pictures(given, directory, f"{label}: column {query_column!r}")
        used.update(_TEMPLATE_COLUMNS)
    else:
        inputs = [c for c in ("input", "context") if row.get(c) is not None] if format_ == "instruction" else []
        if len(inputs) > 1:
            msg = f"{label}: has both 'input' and 'context'; put what the instruction applies to into 'input'."
            raise DataError(msg)
        used.update(inputs or ["input"])
        for column in (query_column, response_column, *inputs):
            _check_text(row[column], f"{label}: column {column!r}")
        _check_response(row[response_column], f"{label}: column {response_column!r}")
        example = Example(
            id=id_,
            instruction="" if format_ == "text" else row[query_column],
            input=row[inputs[0]] if inputs else "",
            response=row[response_column],
            format=format_,
        )
    if pictures:
        try:
            example = dataclasses.replace(example, images=pictures)
        except ValueError as error:
            msg = f"{label}: {error}"
            raise DataError(msg) from error
    shown = [c for c in _NOT_PASSED_OVER if c not in used and not _is_empty(row.get(c))]
    if shown:
        msg = (
            f"{label}: column {', '.join(map(repr, shown))} would be passed over in data of format {format_!r}. If "
            "the model was trained to see it, put it into messages, prompt or input; else drop the column."
        )
        raise DataError(msg)
    return example, used


def _read_picture_columns(row: Mapping[str, Any], label: str, directory: Path) -> tuple[Picture, ...]:
    given = [column for column in _PICTURE_COLUMNS if not _is_empty(row.get(column))]
    if len(given) > 1:
        msg = f"{label}: has both 'image' and 'images'; keep one of them."
        raise DataError(msg)
    return read_pictures(row[given[0]], directory, f"{label}: column {given[0]!r}") if given else ()


def _columns_of(row: Mapping[str, Any], label: str) -> tuple[str, str, str]:
    """The row's format with its query and response columns."""
    if row.get("conversations") is not None and row.get("messages") is None:
        return "messages", "conversations", "conversations"
    present = []
    for name, (query, responses) in _FORMATS.items():
        given = [response for response in responses if row.get(response) is not None]
        if row.get(query) is not None and len(given) > 1:
            msg = f"{label}: has both {' and '.join(map(repr, given))}; keep the one that was trained on."
            raise DataError(msg)
        # A text beside a query and its response is the two of them written out.
        if row.get(query) is not None and given and not (name == "text" and present):
            present.append((name, query, given[0]))
    if not present:
        columns = ", ".join(str(column) for column in row) or "none"
        missing = [
            (query if row.get(query) is None else " or ".join(responses))
            for query, responses in _FORMATS.values()
            if query in row or (responses[0] in row and responses[0] != query)
        ]
        cause = f"missing column {' / '.join(dict.fromkeys(missing))!r}" if missing else "no known column format"
        msg = f"{label}: {cause} (columns found: {columns}). Expected {_FORMAT_HELP}."
        raise DataError(msg)
    if len(present) > 1:
        msg = f"{label}: columns of several formats ({', '.join(p[0] for p in present)}); keep those of one."
        raise DataError(msg)
    (found,) = present
    name, query, response = found
    conversational = [c for c in (query, response) if _is_list(row[c])]
    if name == "prompt" and len(conversational) == 2:
        return "messages", query, response
    return found


def _check_completion(completion: Any, what: str) -> None:
    if len(completion) != 1:
        msg = f"{what} has {len(completion)} messages; the response must be one message of the assistant's."
        raise DataError(msg)


def _example_from_messages(
    messages: Any, column: str, id_: str, label: str, stated: Mapping[str, Any], pictures: list[Any]
) -> Example:
    """The last message is the response, the ones before it the query; `pictures` gets what content parts bring."""
    if not _is_list(messages) or not len(messages):
        msg = f"{label}: column {column!r} must be a non-empty list of {{role, content}} objects."
        raise DataError(msg)
    turns = [_read_message(message, f"{label}: message {k}", pictures) for k, message in enumerate(messages)]
    last_role, response = turns[-1]
    if last_role != "assistant":
        msg = f"{label}: the last message is the {last_role or 'nameless'}'s; it must be the assistant's response."
        raise DataError(msg)
    if not any(role == "user" for role, _ in turns[:-1]):
        msg = f"{label}: no user message comes before the response."
        raise DataError(msg)
    _check_response(response, f"{label}: the last message")
    return Example(id=id_, response=response, messages=tuple(turns[:-1]), format="messages", **stated)


def _read_message(message: Any, where: str, pictures: list[Any]) -> tuple[str, str]:
    """Role and content of {role, content}, or of ShareGPT's {from, value}."""
    if not isinstance(message, Mapping):
        msg = f"{where}: expected an object with role and content, got {type(message).__name__}."
        raise DataError(msg)
    sharegpt = message.get("role") is None and message.get("from") is not None
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    # Arrow tables fill absent keys with nulls; a key with a value is text the template might show.
    extra = sorted(str(k) for k, v in message.items() if k not in (role_key, content_key) and not _is_empty(v))
    if extra:
        msg = f"{where}: key {', '.join(map(repr, extra))} is not supported; a message has role and content."
        raise DataError(msg)
    role, content = message.get(role_key), message.get(content_key)
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_text_of_parts(content, f"{where}: {content_key!r}", pictures))
    role = _check_text(role, f"{where}: {role_key!r}")
    content = _check_text(content, f"{where}: {content_key!r}")
    return (_ROLES.get(role, role) if sharegpt else role), content


def _text_of_parts(parts: Sequence[Any], what: str, pictures: list[Any]) -> Iterator[str]:
    """The texts of OpenAI's content parts, which a template writes one after the other; a mark for each picture."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "image":
            pictures.append(next((part[key] for key in _PICTURE_KEYS if part.get(key)), None))
            yield PICTURE_MARK
            continue
        if kind != "text":
            msg = f"{what} has a part of type {kind!r}; only parts of type 'text' and 'image' are supported."
            raise DataError(msg)
        yield _check_text(part.get("text"), f"{what}: 'text'")


def _read_json_column(row: Mapping[str, Any], column: str, label: str) -> str:
    """A column that holds JSON, as values or as text, in one way of writing; an empty list is not nothing."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            msg = f"{label}: column {column!r} is not JSON: {problem_of_json(error)}."
            raise DataError(msg) from error
    if value is None or (_is_empty(value) and not _is_list(value)):
        return ""
    problem = None
    if column == "chat_template_kwargs":
        problem = problem_of_template_arguments(value)
    elif not _is_list(value) or not all(isinstance(tool, Mapping) for tool in value):
        problem = "it must be a list of JSON schemas"
    if problem:
        msg = f"{label}: column {column!r}: {problem}."
        raise DataError(msg)
    # The order of keys is the template's to write out.
    return json.dumps(value if isinstance(value, Mapping) else list(value), ensure_ascii=False)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_empty(value: Any) -> bool:
    """Whether a column says nothing: null, or an empty text, list or table."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and not len(value))


def _read_id(row: Mapping[str, Any], number: int, label: str) -> str:
    if "id" not in row:
        return str(number)
    id_ = row["id"]
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        msg = f"{label}: id must be a string or an integer, got {type(id_).__name__} {show(id_)}."
        raise DataError(msg)
    _check_text(str(id_), f"{label}: id")
    if not str(id_).strip():
        msg = f"{label}: id is empty."
        raise DataError(msg)
    return str(id_)


def _check_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        msg = f"{what} must be a string, got {type(value).__name__}: {show(value)}."
        raise DataError(msg)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        msg = f"{what} holds half of a surrogate pair at character {error.start}; it is not valid Unicode."
        raise DataError(msg) from error
    return value


def _check_response(response: str, what: str) -> None:
    if not response.strip():
        msg = f"{what}: the response is empty; there is nothing to train on."
        raise DataError(msg)
