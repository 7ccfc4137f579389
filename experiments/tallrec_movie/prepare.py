"""Owns which rows the experiment uses and what it requests: pure functions of TALLRec's files and a seed."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmeraser_jax.data import Action, Example, Request, load_examples

OPPOSITE = {"Yes.": "No.", "No.": "Yes."}
_QUESTION = "\nWhether the user will like"


def load_rows(directory: Path, split: str) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """Reads one split: `<split>.json` and, row for row, the users in `<split>.csv`.

    Returns:
        The examples, whose ids are row numbers, and the `user_id` of each.

    Raises:
        ValueError: the two files have different numbers of rows.
    """
    examples = load_examples(directory / f"{split}.json")
    with (directory / f"{split}.csv").open(newline="") as file:
        users = tuple(row["user_id"] for row in csv.DictReader(file))
    if len(users) != len(examples):
        msg = f"{split}.csv has {len(users)} rows and {split}.json {len(examples)}; expected them row for row."
        raise ValueError(msg)
    return examples, users


def choose_rows(users: Sequence[str], num_rows: int, rows_per_user: int, seed: int) -> np.ndarray:
    """Draws at most `rows_per_user` rows of each user, users in a seeded order, until there are `num_rows`.

    Args:
        users: the user of each row.
        num_rows: rows wanted.
        rows_per_user: so that the subset has many users, and several rows of most.
        seed: of users and rows.

    Returns:
        Row numbers, ascending.

    Raises:
        ValueError: the users do not have that many rows.
    """
    rng = np.random.default_rng(seed)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, user in enumerate(users):
        rows_of[user].append(row)
    chosen: list[int] = []
    for user in rng.permutation(sorted(rows_of)):
        rows = rng.permutation(rows_of[str(user)])
        chosen += rows[: min(rows_per_user, num_rows - len(chosen))].tolist()
    if len(chosen) < num_rows:
        msg = f"{len(rows_of)} users with {rows_per_user} rows each give {len(chosen)} rows, not {num_rows}."
        raise ValueError(msg)
    return np.sort(np.array(chosen, np.int64))


def choose_users(users: Sequence[str], num_rows: int, seed: int) -> tuple[str, ...]:
    """A set of users who together have exactly `num_rows` rows: the first that a seeded order leads to.

    Raises:
        ValueError: no set of users has so many.
    """
    counts = Counter(users)
    ways: dict[int, tuple[str, ...]] = {0: ()}  # a set of users for each number of rows that one has
    for user in map(str, np.random.default_rng(seed).permutation(sorted(counts))):
        for total, chosen in list(ways.items()):
            more = total + counts[user]
            if more <= num_rows:
                ways.setdefault(more, (*chosen, user))
        if num_rows in ways:
            return ways[num_rows]
    msg = f"No set of the {len(counts)} users has exactly {num_rows} rows; choose another share."
    raise ValueError(msg)


def removal_requests(examples: Sequence[Example], users: Sequence[str], gone: Sequence[str]) -> tuple[Request, ...]:
    """Removal of all rows of the users `gone`."""
    return tuple(
        Request(id=example.id, action=Action.REMOVE)
        for example, user in zip(examples, users, strict=True)
        if user in gone
    )


def flip_labels(
    examples: Sequence[Example], num_flipped: int, seed: int
) -> tuple[tuple[Example, ...], tuple[Request, ...]]:
    """Flips the labels of a seeded choice of rows.

    Returns:
        All examples, those flipped; and the requests that correct them.
    """
    flipped = set(np.random.default_rng(seed).choice(len(examples), num_flipped, replace=False).tolist())
    wrong = tuple(
        dataclasses.replace(example, response=OPPOSITE[example.response]) if row in flipped else example
        for row, example in enumerate(examples)
    )
    requests = tuple(
        Request(id=examples[row].id, action=Action.CORRECT_RESPONSE, changes={"response": examples[row].response})
        for row in sorted(flipped)
    )
    return wrong, requests


def replace_films(examples: Sequence[Example], count: int, seed: int) -> tuple[Request, ...]:
    """Replaces the last film of the history in a seeded choice of rows by a film that the row does not have.

    The last one, because prompts are cut on the left. The films that come in are the targets of other rows.
    """
    rng = np.random.default_rng([seed, 1])
    targets = [example.input.rsplit('"', 2)[1] for example in examples]
    requests = []
    for row in sorted(rng.choice(len(examples), count, replace=False).tolist()):
        text = examples[row].input
        history, question = text[: text.rindex(_QUESTION)], text[text.rindex(_QUESTION) :]
        end = history.rindex('"')
        start = history.rindex('"', 0, end)
        others = [film for film in targets if f'"{film}"' not in text]
        changed = f"{history[: start + 1]}{rng.choice(others)}{history[end:]}{question}"
        requests.append(Request(id=examples[row].id, action=Action.MODIFY_QUERY, changes={"query": changed}))
    return tuple(requests)
