"""Reads the published benchmarks' files, as their users have them, into rows with choices.

* MM-SpuBench (Ye et al. 2024, arXiv 2406.17126, on the Hugging Face hub as mmbench/MM-SpuBench): a picture, a
  question, options A to D and the right one. Copies differ in names, so each field is read under several.
* R-Bench (Wu et al. 2024, arXiv 2406.16449, github.com/mrwu-mac/R-Bench): `question_id`, `image`, `text` and
  `label` (yes or no), the fields of POPE; the F1 of its script `eval.py` takes yes as the positive answer.

Files are JSON lists, JSON lines or parquet. Pictures are paths, from the file's directory on, or bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeraser_jax.data import DataError, Example, load_examples
from llmeraser_jax.data.pictures import read_pictures
from llmeraser_jax.data.sources import read_rows

LETTERS = "ABCD"
_SPUBENCH_FIELDS = {
    "question": ("question", "Question"),
    "options": ("options", "choices", "Options"),
    "answer": ("answer", "label", "correct_option", "Answer"),
    "image": ("image", "image_path", "filename"),
}
_RBENCH_FIELDS = {"question": ("text", "question"), "answer": ("label", "answer"), "image": ("image",)}
_OPTION = re.compile(r"^\s*\(?([A-D])\)?[.):\s]\s*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A question with its right answer.

    Attributes:
        example: question, picture and right answer.
        choices: all answers that are offered.
        group: what accuracy is averaged over.
        wrong: the answer that a corruption gives, where only one will do.
    """

    example: Example
    choices: tuple[str, ...]
    group: str
    wrong: str = ""


def load_spubench(path: Path) -> list[Row]:
    """Multiple-choice rows; the answer is the letter.

    Raises:
        DataError: a row without one of the fields, or whose answer is none of its options.
    """
    rows = []
    for where, row in read_rows(path):
        fields = _fields(row, _SPUBENCH_FIELDS, f"{path}, {where}")
        options = fields["options"]
        if isinstance(options, str):
            options = [line for line in options.split("\n") if line.strip()]
        elif isinstance(options, Mapping):
            options = [options[letter] for letter in sorted(options)]
        texts = [_OPTION.sub("", str(option)).strip() for option in options]
        answer = str(fields["answer"]).strip()
        letter = texts.index(answer) if answer in texts else LETTERS.find(answer.strip("(). ")[:1].upper())
        if not 2 <= len(texts) <= len(LETTERS) or not 0 <= letter < len(texts) or not answer:
            msg = f"{path}, {where}: the answer {answer!r} is none of the options {texts}."
            raise DataError(msg)
        listed = "\n".join(f"{LETTERS[k]}. {text}" for k, text in enumerate(texts))
        question = (
            f"{fields['question']}\n{listed}\nAnswer with the option's letter from the given choices directly."
        )
        example = _example(str(row.get("id", len(rows))), question, LETTERS[letter], fields["image"], path, where)
        rows.append(Row(example=example, choices=tuple(LETTERS[: len(texts)]), group="spurious"))
    return rows


def load_rbench(path: Path) -> list[Row]:
    """Yes/no rows.

    Raises:
        DataError: a row without one of the fields, or whose label is neither yes nor no.
    """
    rows = []
    for where, row in read_rows(path):
        fields = _fields(row, _RBENCH_FIELDS, f"{path}, {where}")
        answer = str(fields["answer"]).strip(" .").capitalize()
        if answer not in ("Yes", "No"):
            msg = f"{path}, {where}: the label is {fields['answer']!r}; it must be yes or no."
            raise DataError(msg)
        question = f"{fields['question']}\nAnswer the question using a single word or phrase."
        id_ = str(row.get("question_id", len(rows)))
        example = _example(id_, question, answer, fields["image"], path, where)
        rows.append(Row(example=example, choices=("Yes", "No"), group="relations"))
    return rows


def _fields(row: Any, names: Mapping[str, Sequence[str]], label: str) -> dict[str, Any]:
    """The row's fields, each under the first of its names that is there."""
    if not isinstance(row, Mapping):
        msg = f"{label}: expected an object with fields, got {type(row).__name__}."
        raise DataError(msg)
    found = {field: next((row[n] for n in known if row.get(n) is not None), None) for field, known in names.items()}
    missing = [" or ".join(names[field]) for field, value in found.items() if value is None]
    if missing:
        msg = f"{label}: there is no {', no '.join(missing)}; it has {', '.join(map(str, row))}."
        raise DataError(msg)
    return found


def _example(id_: str, question: str, answer: str, image: Any, path: Path, where: str) -> Example:
    messages = [
        {"role": "user", "content": f"<image>\n{question}"},
        {"role": "assistant", "content": answer},
    ]
    (example,) = load_examples([{"id": id_, "messages": messages}])
    return dataclasses.replace(example, images=read_pictures(image, path.parent, f"{path}, {where}"))
