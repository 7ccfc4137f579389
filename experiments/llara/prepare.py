"""Owns which rows are used, their candidates, and the requests: pure functions of a corpus and a seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from experiments.llara.data import Corpus, Row
from experiments.llara.prompts import TEMPLATES, make_example, make_prompt, make_response
from experiments.llara.scoring import Question
from experiments.tallrec_movie.prepare import choose_rows
from llmeraser_jax import files
from llmeraser_jax.data import Action, Example, Request, request_to_json

Scenario = Literal["removal", "query-removal", "query-replacement", "correction"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is drawn from a corpus.

    Attributes:
        num_rows: training rows; None takes all that are not held out.
        rows_per_user: training rows of each user at most.
        num_heldout: rows held out by user from the training users, besides the released ones.
        heldout_rows_per_user: of each user that is held out.
        num_candidates: titles to choose from, the right one among them.
        max_history: items of a history that are shown, the latest ones.
        template: which of the three sentences; None draws one for each row.
        hybrid: titles are followed by item tokens.
        removed_share: of the training rows, all those of a set of users ("removal").
        removed_interactions: share of the interactions in histories that are deleted ("query-removal").
        replaced_interactions: share of them that are noise when training ("query-replacement").
        flipped_share: of the training rows, trained on with the title of a wrong candidate ("correction").
        seed: of everything that is drawn here.
    """

    num_rows: int | None = None
    rows_per_user: int = 1000
    num_heldout: int = 1000
    heldout_rows_per_user: int = 10
    num_candidates: int = 20
    max_history: int = 10
    template: int | None = None
    hybrid: bool = False
    removed_share: float = 0.05
    removed_interactions: float = 0.1
    replaced_interactions: float = 0.05
    flipped_share: float = 0.1
    seed: int = 0

    def __post_init__(self):
        for name in ("removed_share", "removed_interactions", "replaced_interactions", "flipped_share"):
            if not 0 < getattr(self, name) < 1:
                msg = f"{name} is {getattr(self, name)}; it must lie between 0 and 1."
                raise ValueError(msg)
        for name, least in (("num_candidates", 2), ("max_history", 2), ("num_heldout", 1), ("rows_per_user", 1)):
            if getattr(self, name) < least:
                msg = f"{name} is {getattr(self, name)}; it must be at least {least}."
                raise ValueError(msg)
        if self.template not in (None, 0, 1, 2):
            msg = f"template is {self.template}; it must be 0, 1, 2 or None."
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """One scenario's data.

    Attributes:
        train: as trained on.
        users: of each training row.
        requests: what is wanted.
        questions: to be answered, by set: "held-out", "validation", "test".
        counts: what was drawn, for the record.
    """

    train: tuple[Example, ...]
    users: tuple[str, ...]
    requests: tuple[Request, ...]
    questions: Mapping[str, tuple[Question, ...]]
    counts: Mapping[str, int]


def draw_for(seed: int, id_: str, what: str) -> np.random.Generator:
    """A generator that depends on its arguments alone, so that a row's draws are the same in every selection."""
    digest = hashlib.sha256(f"{what}\0{id_}".encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, np.uint32).tolist()])


def draw_candidates(row: Row, titles: Mapping[int, str], num: int, seed: int) -> tuple[int, ...]:
    """The target among `num - 1` other items in a random order: never one of the history, no title twice.

    LLaRA draws anew at every epoch and at every evaluation; here a row has its candidates once for all models.

    Raises:
        ValueError: there are too few items.
    """
    rng = draw_for(seed, row.id, "candidates")
    taken = {titles[item].casefold() for item in (*row.history, row.target)}
    chosen = [row.target]
    items = sorted(titles)
    for k in rng.permutation(len(items)):
        if len(chosen) == num:
            break
        title = titles[items[k]].casefold()
        if title not in taken:
            taken.add(title)
            chosen.append(items[k])
    if len(chosen) < num:
        msg = f"Row {row.id}: only {len(chosen)} of {num} candidates could be drawn from {len(items)} items."
        raise ValueError(msg)
    return tuple(chosen[k] for k in rng.permutation(num))


def split_by_user(rows: Sequence[Row], config: PrepareConfig) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Training and held-out rows; no user is in both.

    Raises:
        ValueError: rows without a user, or too few of them.
    """
    users = [row.user for row in rows]
    if "" in users:
        msg = "Some training rows do not say whose they are; rows cannot be held out by user."
        raise ValueError(msg)
    outside = choose_rows(users, config.num_heldout, config.heldout_rows_per_user, config.seed)
    gone = {users[k] for k in outside}
    rest = [row for row in rows if row.user not in gone]
    if config.num_rows is not None:
        chosen = choose_rows([row.user for row in rest], config.num_rows, config.rows_per_user, config.seed)
        rest = [rest[k] for k in chosen]
    return tuple(rest), tuple(rows[k] for k in outside)


def choose_interactions(rows: Sequence[Row], share: float, seed: int) -> frozenset[tuple[str, int]]:
    """A share of the (user, item) pairs that occur in histories; no history loses all its items.

    An interaction is one event of one user, so it goes from, or is wrong in, every row whose history shows it.
    """
    pairs = sorted({(row.user, item) for row in rows for item in row.history})
    wanted = max(1, round(share * len(pairs)))
    left = {row.id: len(set(row.history)) for row in rows}
    rows_of: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        for item in set(row.history):
            rows_of.setdefault((row.user, item), []).append(row.id)
    chosen: set[tuple[str, int]] = set()
    for k in np.random.default_rng([seed, 1]).permutation(len(pairs)):
        if len(chosen) == wanted:
            break
        if all(left[id_] > 1 for id_ in rows_of[pairs[k]]):
            chosen.add(pairs[k])
            for id_ in rows_of[pairs[k]]:
                left[id_] -= 1
    if len(chosen) < wanted:
        msg = f"Only {len(chosen)} of {wanted} interactions could be chosen without emptying a history."
        raise ValueError(msg)
    return frozenset(chosen)


class _Writer:
    """Prompts of a corpus under a configuration."""

    def __init__(self, corpus: Corpus, config: PrepareConfig):
        self.corpus, self.config = corpus, config
        self._candidates: dict[str, tuple[int, ...]] = {}

    def shown(self, row: Row) -> Row:
        """The row with the part of its history that prompts show; its candidates are drawn from the whole row."""
        config = self.config
        self._candidates[row.id] = draw_candidates(row, self.corpus.titles, config.num_candidates, config.seed)
        return dataclasses.replace(row, history=row.history[-config.max_history :])

    def candidates(self, row: Row) -> tuple[int, ...]:
        """Of a row that `shown` has seen."""
        return self._candidates[row.id]

    def prompt(self, row: Row, history: Sequence[int]) -> str:
        """The row's prompt with this history: its candidates and its sentence do not depend on the history."""
        template = self.config.template
        if template is None:
            template = int(draw_for(self.config.seed, row.id, "template").integers(3))
        return make_prompt(
            TEMPLATES[self.corpus.domain][template],
            self.corpus.titles,
            history,
            self.candidates(row),
            hybrid=self.config.hybrid,
        )

    def example(self, row: Row, history: Sequence[int] | None = None) -> Example:
        prompt = self.prompt(row, row.history if history is None else history)
        return make_example(row.id, prompt, self.corpus.titles[row.target])

    def question(self, row: Row) -> Question:
        titles = tuple(self.corpus.titles[item] for item in self.candidates(row))
        return Question(example=self.example(row), titles=titles)


def prepare(corpus: Corpus, scenario: Scenario, config: PrepareConfig) -> Prepared:
    """Draws one scenario; equal arguments give equal data.

    * removal: all rows of a set of users are to go.
    * query-removal: trained on the data as they are; a share of the interactions is to go from all histories.
    * query-replacement: trained with a share of the interactions replaced by other items; the true ones are wanted.
    * correction: trained with the title of a wrong candidate in a share of the rows; the true ones are wanted.

    Only queries change in the second and third: a row whose target is a deleted interaction stays.
    """
    writer = _Writer(corpus, config)
    kept, outside = split_by_user(corpus.train, config)
    rows = [writer.shown(row) for row in kept]
    examples = [writer.example(row) for row in rows]
    counts: dict[str, int] = {}
    if scenario == "removal":
        requests = _remove_users(rows, config)
    elif scenario == "query-removal":
        chosen = choose_interactions(rows, config.removed_interactions, config.seed)
        counts["interactions"] = len(chosen)
        requests = []
        for row in rows:
            history = [item for item in row.history if (row.user, item) not in chosen]
            if len(history) < len(row.history):
                requests.append(_query_request(row.id, writer.prompt(row, history)))
    elif scenario == "query-replacement":
        chosen = choose_interactions(rows, config.replaced_interactions, config.seed)
        counts["interactions"] = len(chosen)
        requests = []
        for k, row in enumerate(rows):
            if any((row.user, item) in chosen for item in row.history):
                noisy = _with_noise(row, chosen, writer)
                requests.append(_query_request(row.id, examples[k].instruction))
                examples[k] = writer.example(row, noisy)
    elif scenario == "correction":
        flipped = np.random.default_rng([config.seed, 2]).choice(
            len(rows), max(1, round(config.flipped_share * len(rows))), replace=False
        )
        requests = []
        for k in sorted(flipped.tolist()):
            requests.append(
                Request(id=rows[k].id, action=Action.CORRECT_RESPONSE, changes={"response": examples[k].response})
            )
            wrong = [item for item in writer.candidates(rows[k]) if item != rows[k].target]
            item = wrong[int(draw_for(config.seed, rows[k].id, "flip").integers(len(wrong)))]
            response = make_response(corpus.titles[item])
            examples[k] = dataclasses.replace(examples[k], response=response)
    else:
        msg = f"scenario is {scenario!r}; it must be one of {', '.join(SCENARIOS)}."
        raise ValueError(msg)
    sets = {"held-out": outside, "validation": corpus.val, "test": corpus.test}
    return Prepared(
        train=tuple(examples),
        users=tuple(row.user for row in rows),
        requests=tuple(requests),
        questions={name: tuple(writer.question(writer.shown(row)) for row in part) for name, part in sets.items()},
        counts={"rows": len(rows), "users": len({r.user for r in rows}), "named": len(requests), **counts},
    )


def _query_request(id_: str, prompt: str) -> Request:
    return Request(id=id_, action=Action.MODIFY_QUERY, changes={"query": prompt})


def _remove_users(rows: Sequence[Row], config: PrepareConfig) -> list[Request]:
    """All rows of users in a seeded order, until the share is reached."""
    wanted = max(1, round(config.removed_share * len(rows)))
    users = np.random.default_rng([config.seed, 3]).permutation(sorted({row.user for row in rows}))
    gone: set[str] = set()
    for user in users:
        if sum(row.user in gone for row in rows) >= wanted:
            break
        gone.add(str(user))
    if len(gone) == len(users):
        msg = f"A share of {config.removed_share} takes the rows of all {len(users)} users; lower it."
        raise ValueError(msg)
    return [Request(id=row.id, action=Action.REMOVE) for row in rows if row.user in gone]


def _with_noise(row: Row, chosen: frozenset[tuple[str, int]], writer: _Writer) -> list[int]:
    """The history with chosen interactions replaced, the same way in every row of the user.

    What comes in is drawn for the interaction; in a row that has it already, or has it as a candidate, the next of
    the same draw is taken.
    """
    titles = writer.corpus.titles
    taken = {titles[item].casefold() for item in (*row.history, *writer.candidates(row))}
    items = np.array(sorted(titles))
    noisy = list(row.history)
    for k, item in enumerate(row.history):
        if (row.user, item) in chosen:
            order = draw_for(writer.config.seed, f"{row.user}/{item}", "noise").permutation(items)
            noisy[k] = next(int(new) for new in order if titles[int(new)].casefold() not in taken)
            taken.add(titles[noisy[k]].casefold())
    return noisy


def write_prepared(directory: Path, prepared: Prepared) -> None:
    """Writes what the `llmeraser` commands read, and what is needed besides, as JSON lines.

    `train.jsonl`, `requests.jsonl`, and one file for each set of questions; other columns than id, prompt and
    response (user, titles) are ignored by `load_examples`.
    """
    directory.mkdir(parents=True, exist_ok=True)

    def write(name: str, rows: Sequence[Mapping[str, object]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.atomic_write_text(directory / name, text)

    write(
        "train.jsonl",
        [{**_columns(e), "user": user} for e, user in zip(prepared.train, prepared.users, strict=True)],
    )
    for name, questions in prepared.questions.items():
        write(f"{name}.jsonl", [{**_columns(q.example), "titles": q.titles} for q in questions])
    files.atomic_write_text(
        directory / "requests.jsonl", "".join(request_to_json(r) + "\n" for r in prepared.requests)
    )
    files.atomic_write_json(directory / "counts.json", prepared.counts)


def _columns(example: Example) -> dict[str, str]:
    return {"id": example.id, "prompt": example.instruction, "response": example.response}
