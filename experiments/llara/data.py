"""Owns reading sequences of items: LLaRA's task as JSON lines, and MovieLens-100K's raw files.

Everything becomes a `Corpus`: rows "history, then the next item" with titles for the items. Pickles are refused:
unpickling runs whatever the file says.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

Domain = Literal["movie", "artist", "game"]

HISTORY_LENGTH = 10  # items of a history at most, as in LLaRA
MIN_HISTORY = 3  # shorter histories are left out, as in LLaRA
LIKED = 3  # stars; lower ratings are no interaction, as in LLaRA's MovieLens
_PICKLES = frozenset({".pkl", ".pickle", ".df", ".pt", ".pth"})
_SHARES = (0.8, 0.1)  # of the users: training, validation; the rest is the test


class CorpusError(ValueError):
    """Files that cannot be used as they stand; the message names the file and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One prediction to make.

    Attributes:
        id: unique in its corpus; `<user>-<position>` where the user is known.
        user: whose history; empty where the files do not say.
        history: earlier items, earliest first, without padding.
        target: the item that came next.
    """

    id: str
    user: str
    history: tuple[int, ...]
    target: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Rows of all three splits.

    Attributes:
        domain: what the items are; chooses the wording of the prompts.
        titles: of each item; only items with a title are here.
        train: rows of the training users, one for each position.
        val: one row of each validation user.
        test: one row of each test user.
    """

    domain: Domain
    titles: Mapping[int, str]
    train: tuple[Row, ...]
    val: tuple[Row, ...]
    test: tuple[Row, ...]

    def __post_init__(self):
        seen: set[str] = set()
        for row in (*self.train, *self.val, *self.test):
            missing = [item for item in (*row.history, row.target) if item not in self.titles]
            if missing:
                msg = f"Row {row.id}: item {missing[0]} has no title; the corpus has {len(self.titles)} titles."
                raise CorpusError(msg)
            if row.id in seen:
                msg = f"Row id {row.id!r} occurs twice."
                raise CorpusError(msg)
            seen.add(row.id)

    @property
    def num_items(self) -> int:
        """One more than the largest item; the padding item of a table of embeddings comes after them."""
        return max(self.titles) + 1


def load_corpus(directory: Path) -> Corpus:
    """Reads whichever of these files the directory holds.

    * LLaRA's task as JSON lines: `train.jsonl`, `val.jsonl`, `test.jsonl` and MovieLens' `u.item`, or `id2name.txt`
      as with its LastFM and Steam
    * MovieLens-100K: `u.data` and `u.item`

    Raises:
        FileNotFoundError: there is no such directory.
        CorpusError: it holds none of these, or pickles only, or a file is not what its name says.
    """
    if not directory.is_dir():
        msg = f"{directory}: there is no such directory."
        raise FileNotFoundError(msg)
    found = {path.name for path in directory.iterdir()}
    for names, read in _KINDS:
        if set(names) <= found:
            return read(directory)
    pickles = sorted(name for name in found if Path(name).suffix in _PICKLES)
    if pickles:
        msg = (
            f"{directory / pickles[0]} is a pickle, which is not read: unpickling runs whatever code it holds. "
            "Where it may be trusted, write the frames with pandas' to_json(..., orient='records', lines=True) as "
            "train.jsonl (columns user, seq, next), val.jsonl and test.jsonl (seq, next), and put u.item "
            "(MovieLens) or id2name.txt (LastFM, Steam) beside them."
        )
        raise CorpusError(msg)
    kinds = "; ".join(" + ".join(names) for names, _ in _KINDS)
    msg = f"{directory} holds no known kind of data. Expected one of: {kinds}."
    raise CorpusError(msg)


def _read(path: Path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with where it stands.

    Not splitlines: it also splits at characters that names hold, such as U+0085, an ellipsis read as Latin-1.
    """
    try:
        text = path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        msg = f"{path} is not {encoding} at byte {error.start}."
        raise CorpusError(msg) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, line in _read(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            msg = f"{where}: not JSON: {error.msg}."
            raise CorpusError(msg) from error
        if not isinstance(row, Mapping):
            msg = f"{where}: expected an object, got {type(row).__name__}."
            raise CorpusError(msg)
        yield where, row


def _table(path: Path, separator: str, num_columns: int, encoding: str = "utf-8") -> Iterator[list[str]]:
    for where, line in _read(path, encoding):
        cells = line.split(separator)
        if len(cells) < num_columns:
            msg = f"{where}: {len(cells)} columns, expected at least {num_columns}: {line[:60]!r}."
            raise CorpusError(msg)
        yield cells


def movie_title(title: str) -> str:
    """`Usual Suspects, The (1995)` as `The Usual Suspects`: the year goes, a trailing article comes first.

    LLaRA also takes off the last seven characters and moves an article to the front, wherever in the title it
    finds `, The`, `, A` or `, An`; here it must stand at the end, so that words that begin with these letters
    stay. A title without a year is kept whole: LLaRA's is then empty.
    """
    bare = re.sub(r"\s*\(\d{4}\)\s*$", "", title).strip()
    match = re.fullmatch(r"(.*), (The|A|An)", bare)
    return f"{match[2]} {match[1]}" if match else bare


def load_movie_titles(path: Path) -> dict[int, str]:
    """Titles of `u.item`, by item = MovieLens' number - 1; items without one are left out."""
    cells = _table(path, "|", 2, encoding="iso-8859-1")
    titles = {int(cell[0]) - 1: movie_title(cell[1]) for cell in cells}
    return {item: title for item, title in titles.items() if title}


def load_movielens(directory: Path, seed: int = 0) -> Corpus:
    """MovieLens-100K from `u.data` and `u.item`.

    Interactions are ratings of at least 3 stars in the order of their times. As for LLaRA's files users are
    shared out 8:1:1 and histories have the last 10 items; which user is in which part is drawn here from `seed`,
    and equal times are ordered by item: neither is published.
    """
    events: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for user, item, rating, time in (cells[:4] for cells in _table(directory / "u.data", "\t", 4)):
        if int(rating) >= LIKED:
            events[user].append((int(time), int(item) - 1))
    titles = load_movie_titles(directory / "u.item")
    return _split("movie", titles, events, seed)


def _split(
    domain: Domain, titles: Mapping[int, str], events: Mapping[str, Iterable[tuple[int, int]]], seed: int
) -> Corpus:
    """Items of each user by (time, item), each once. Users are shared out 8:1:1: every position of training users,
    the last one of the others.
    """
    titles = {item: title for item, title in titles.items() if title}
    ordered = {user: dict.fromkeys(item for _, item in sorted(events[user])) for user in events}
    kept = {user: [item for item in items if item in titles] for user, items in ordered.items()}
    users = [user for user in sorted(kept) if len(kept[user]) > MIN_HISTORY]
    if len(users) < 3:
        msg = f"{len(users)} users have more than {MIN_HISTORY} items with titles; at least 3 are needed."
        raise CorpusError(msg)
    order = [users[k] for k in np.random.default_rng(seed).permutation(len(users))]
    first, second = (round(sum(_SHARES[:k]) * len(users)) for k in (1, 2))
    first, second = min(first, len(users) - 2), min(max(second, first + 1), len(users) - 1)

    def row(user: str, position: int) -> Row:
        items = kept[user]
        history = tuple(items[max(0, position - HISTORY_LENGTH) : position])
        return Row(id=f"{user}-{position}", user=user, history=history, target=items[position])

    parts = order[:first], order[first:second], order[second:]
    train = tuple(row(user, k) for user in sorted(parts[0]) for k in range(MIN_HISTORY, len(kept[user])))
    val, test = (tuple(row(user, len(kept[user]) - 1) for user in sorted(part)) for part in parts[1:])
    return Corpus(domain=domain, titles=titles, train=train, val=val, test=test)


def load_llara(directory: Path) -> Corpus:
    """LLaRA's MovieLens as JSON lines: `seq` and `next` of `[item, rating]`, and MovieLens' `u.item`.

    Only training rows name their user. Histories of fewer than 3 items are left out, as LLaRA does when it loads
    them; padding items, which have no title, are dropped.
    """
    return _llara_corpus("movie", directory, load_movie_titles(directory / "u.item"))


def load_llara_by_id(directory: Path) -> Corpus:
    """LLaRA's LastFM and Steam as JSON lines: the same with items alone, and titles as `id::name` in `id2name.txt`.

    An optional key `domain` (movie, artist or game) in the first line of `train.jsonl` chooses the wording; it is
    game otherwise.
    """
    domain: Domain = "game"
    for where, row in itertools.islice(_json_lines(directory / "train.jsonl"), 1):
        domain = row.get("domain", "game")
        if domain not in get_args(Domain):
            msg = f"{where}: domain is {domain!r}; it must be one of {', '.join(get_args(Domain))}."
            raise CorpusError(msg)
    names = {int(cells[0]): cells[1].strip() for cells in _table(directory / "id2name.txt", "::", 2)}
    return _llara_corpus(domain, directory, {item: name for item, name in names.items() if name})


def _llara_corpus(domain: Domain, directory: Path, titles: Mapping[int, str]) -> Corpus:
    splits = {
        name: tuple(_llara_rows(directory / f"{name}.jsonl", name, titles)) for name in ("train", "val", "test")
    }
    return Corpus(domain=domain, titles=titles, **splits)


def _llara_rows(path: Path, split: str, titles: Mapping[int, str]) -> Iterator[Row]:
    positions: dict[str, int] = defaultdict(int)
    for where, fields in _json_lines(path):
        try:
            history = tuple(_item(event) for event in fields["seq"])
            target = _item(fields["next"])
        except (KeyError, TypeError, ValueError) as error:
            msg = f"{where}: expected seq, a list of items or [item, rating] pairs, and next, one of them."
            raise CorpusError(msg) from error
        user = str(fields.get("user", ""))
        position = positions[user]
        positions[user] += 1
        history = tuple(item for item in history if item in titles)
        if len(history) >= MIN_HISTORY:
            id_ = f"{user}-{position}" if user else f"{split}-{position}"
            yield Row(id=id_, user=user, history=history[-HISTORY_LENGTH:], target=target)


def _item(event: Any) -> int:
    """The item of an event: itself, or of a pair with a rating."""
    if isinstance(event, Sequence) and not isinstance(event, str):
        event, _ = event
    return int(event)


_KINDS = (
    (("train.jsonl", "val.jsonl", "test.jsonl", "u.item"), load_llara),
    (("train.jsonl", "val.jsonl", "test.jsonl", "id2name.txt"), load_llara_by_id),
    (("u.data", "u.item"), load_movielens),
)
