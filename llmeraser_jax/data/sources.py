"""Where rows come from: files, directories and Python objects, as columns by name and where each row stands.

Nothing here knows what a row means; `examples` does.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeraser_jax import files
from llmeraser_jax.text import one_line

JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
_PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
_CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PANDAS_INDEX = "__index_level_0__"  # the column in which pandas stores an index without a name
# datasets would open the files that cells of these types name.
_MEDIA_FEATURES = ("Image", "Audio", "Video", "Pdf")
_PICTURE_COLUMNS = ("image", "images")


class DataError(ValueError):
    """Data that cannot be used as it stands; the message names file, row and cause."""


def describe(source: Any) -> str:
    """What messages call a source."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"the {type(source).__name__} given"


def directory_of(source: Any) -> Path:
    """What relative paths in a source start from: its own directory, or the current one."""
    if not isinstance(source, str | os.PathLike):
        return Path()
    path = Path(source)
    return path if path.is_dir() else path.parent


def read_rows(source: Any) -> Iterator[tuple[str, Any]]:
    """Yields (where the row is, the row) from any source that `load_examples` describes.

    The index that pandas stored becomes the column `id` where there is none.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a source of another kind, or one that cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            msg = f"{path}: there is no such file or directory."
            raise FileNotFoundError(msg)
        if path.suffix in JSON_SUFFIXES and not path.is_dir():
            yield from _read_json(path)
            return
        rows = _read_file(path)
    elif hasattr(source, "to_dict") and hasattr(source, "index"):
        rows = _read_frame(source)
    elif hasattr(source, "select_columns") and hasattr(source, "column_names"):
        rows = _read_dataset(source)
    elif isinstance(source, Sequence) and not isinstance(source, str | bytes):
        rows = source
    else:
        msg = (
            f"data is a {type(source).__name__}; expected a path, a list of dicts, a datasets.Dataset or a pandas "
            "frame."
        )
        raise DataError(msg)
    for number, row in enumerate(rows):
        yield f"row {number}", _with_index_as_id(row)


def _with_index_as_id(row: Any) -> Any:
    if not isinstance(row, Mapping) or _PANDAS_INDEX not in row:
        return row
    rest = {column: value for column, value in row.items() if column != _PANDAS_INDEX}
    return rest if "id" in rest else {**rest, "id": row[_PANDAS_INDEX]}


def _read_file(path: Path) -> Iterable[Any]:
    if path.is_dir():
        return _read_datasets_directory(path)
    if path.suffix in _PARQUET_SUFFIXES:
        return _read_parquet(path)
    if path.suffix in _CSV_DELIMITERS:
        return _read_csv(path)
    known = ", ".join(sorted(JSON_SUFFIXES | _PARQUET_SUFFIXES | _CSV_DELIMITERS.keys()))
    msg = f"{path}: unknown suffix {path.suffix!r}; expected {known}, or a datasets directory."
    raise DataError(msg)


def problem_of_json(error: ValueError | RecursionError) -> str:
    """What is wrong with a JSON text, in words."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else one_line(error, 200)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 at byte {error.start}."
        raise DataError(msg) from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON list, or one JSON object per line."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            where = f"{path}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
            msg = f"{where}: not JSON: {problem_of_json(error)}."
            raise DataError(msg) from error
        for number, row in enumerate(rows):
            yield f"row {number}", _with_index_as_id(row)
        return
    number = 0
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = problem_of_json(error)
            msg = f"{path}, line {line_number}: not JSON: {problem}. Expected a list, or one object per line."
            raise DataError(msg) from error
        yield f"row {number} (line {line_number})", _with_index_as_id(row)
        number += 1


def _read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Rows of texts; the first line names the columns."""
    reader = csv.DictReader(
        io.StringIO(_read_text(path), newline=""), delimiter=_CSV_DELIMITERS[path.suffix], strict=True
    )
    try:
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                got = "more" if None in row else "fewer"
                where = f"{path}, row {number} (line {reader.line_num})"
                msg = f"{where}: {got} fields than the first line names columns."
                raise DataError(msg)
            yield row
    except csv.Error as error:
        msg = f"{path}, line {reader.line_num}: not CSV: {error}."
        raise DataError(msg) from error


def _read_parquet(path: Path) -> Iterable[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        table.validate(full=True)  # else offsets in a damaged file end the process
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        msg = f"{path}: not a readable parquet file: {error}"
        raise DataError(msg) from error
    # pandas writes a plain range of indices as numbers beside the table.
    try:
        written = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}"))
        index = (written.get("index_columns") or [None])[0]
        if isinstance(index, Mapping) and (index.get("start"), index.get("step")) != (0, 1):
            indices = range(index["start"], index["stop"], index["step"])
            return [{**row, _PANDAS_INDEX: i} for row, i in zip(rows, indices, strict=True)]
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        msg = f"{path}: what pandas stored of its index cannot be read ({one_line(error, 200)}); write it without."
        raise DataError(msg) from error
    return rows


def _read_datasets_directory(path: Path) -> Iterable[Any]:
    import datasets  # slow to import, and only this container needs it

    try:
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.Dataset):
            loaded.data.validate(full=True)  # else offsets in a damaged file end the process
    except Exception as error:  # whatever wrong types in its JSON files make datasets raise
        if files.lfs_pointers(path):
            raise  # `files.reading` says so
        told = f"{type(error).__name__}: {one_line(error, 300)}"
        msg = f"{path}: not a directory written by datasets' save_to_disk ({told})."
        raise DataError(msg) from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = [str(split) for split in loaded]
        msg = f"{path}: holds the splits {', '.join(splits)}; name one of them, e.g. {path / splits[0]}."
        raise DataError(msg)
    return _read_dataset(loaded)


def _read_dataset(dataset: Any) -> Iterable[Any]:
    """A datasets.Dataset. Pictures stay as they are stored; other columns that would open files are left out."""
    for name in _PICTURE_COLUMNS:
        if "Image" in str(dataset.features.get(name)):
            dataset = dataset.cast_column(name, _undecoded(dataset.features[name]))
    media = [name for name, feature in dataset.features.items()
             if type(feature).__name__ in _MEDIA_FEATURES and name not in _PICTURE_COLUMNS]  # fmt: skip
    if not media:
        return dataset
    # Their cells stay closed: what is in them is neither used nor passed over in silence.
    return (
        {**row, **dict.fromkeys(media, "(not opened)")}
        for row in dataset.select_columns([name for name in dataset.column_names if name not in media])
    )


def _undecoded(feature: Any) -> Any:
    """The feature of a picture, or of a list of them, whose cells are its bytes or its path."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    return datasets.List(_undecoded(feature.feature)) if isinstance(feature, datasets.List) else feature


def _read_frame(frame: Any) -> Iterable[Any]:
    """A pandas frame; its index is the id, and missing values are nulls."""
    records = frame.to_dict("records")
    for index, record in zip(frame.index, records, strict=True):
        row = {str(c): None if _is_missing(value) else _plain(value) for c, value in record.items()}
        yield row if "id" in row else {**row, "id": _plain(index)}


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's own, an array as a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_missing(value: Any) -> bool:
    """NaN, NaT and pandas' NA are not equal to themselves; NA cannot even say so."""
    try:
        return value is not None and not isinstance(value, str | list | dict) and bool(value != value)
    except (TypeError, ValueError):
        return type(value).__name__ == "NAType"
