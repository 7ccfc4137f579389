"""Owns which rows are used, their prompts and candidates, and the requests: pure functions of a corpus and a seed.

The sentences are those of `prompt/{movie,artist,game}.txt` in github.com/ljy0ustc/LLaRA, with one difference: where
they say "10" they say so whatever the number of candidates is (20 in its own scripts); here it is the number given.
LLaRA ends the target with a line break and no end-of-sequence token; so do responses here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from experiments.common import require_shares
from experiments.llara.data import Corpus, Domain, Row
from experiments.tallrec_movie.prepare import choose_rows
from llmeraser_jax import files
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.data import Action, Example, Request, request_to_json

Scenario = Literal["removal", "query-removal", "query-replacement", "correction"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
TERMINATOR = "\n"
TEMPLATES: Mapping[Domain, tuple[str, str, str]] = {
    "movie": (
        "This user has watched {history} in the previous. Please predict the next movie this user will watch. "
        "Choose the answer from the following {count} movie titles: {candidates}. Answer:",
        "This user has watched {history} in the previous. Given the following {count} movie titles: {candidates}, "
        "recommend one movie for this user to watch next. The movie title you recommend is:",
        "The visit history of this user is: {history}. Recommend a next movie for this user to watch from the "
        "following movie title set: {candidates}. The recommendation should contain one movie title only. "
        "Recommendation:",
    ),
    "artist": (
        "This user has listened to {history} in the previous. Please predict the next music artist this user will "
        "listen to. The artist name candidates are {candidates}. Choose only one artist from the candidates. "
        "The answer is",
        "This user has listened to {history} in the previous. Given the following {count} music artist names, "
        "{candidates}, recommend one artist for this user to listen to next. The artist name you recommend is",
        "The listening history of this user is {history}. Recommend the next music artist for this user to listen "
        "to from the following artist name set, {candidates}. The recommendation should contain one artist's name "
        "only. The recommendation is",
    ),
    "game": (
        "This user has played {history} in the previous. Please predict the next game this user will play. "
        "The game title candidates are {candidates}. Choose only one game from the candidates. The answer is",
        "This user has played {history} in the previous. Given the following {count} game titles, {candidates}, "
        "recommend one game for this user to play next. The game title you recommend is",
        "The visit history of this user is {history}. Recommend a next game for this user to play from the "
        "following game title set, {candidates}. The recommendation should contain one game title only. "
        "The recommendation is",
    ),
}


def item_text(item: int) -> str:
    """What stands for an item's embedding in a hybrid prompt; `hybrid.with_item_tokens` makes it one token."""
    return f"<|item_{item}|>"


def make_prompt(
    template: str,
    titles: Mapping[int, str],
    history: Sequence[int],
    candidates: Sequence[int],
    *,
    hybrid: bool = False,
) -> str:
    """The query: history, earliest first, and candidates by their titles.

    Of hybrid prompts every title is followed by its item's embedding, as LLaRA's `[HistoryEmb]` and `[CansEmb]`.
    """

    def listed(items: Sequence[int]) -> str:
        return ", ".join(f"{titles[i]} {item_text(i)}" if hybrid else titles[i] for i in items)

    return template.format(history=listed(history), candidates=listed(candidates), count=len(candidates))


def make_example(id_: str, prompt: str, title: str) -> Example:
    """The row as the library's example: its query is the whole prompt, its response the title and a line's end."""
    return Example(id=id_, instruction=prompt, response=title + TERMINATOR, format="prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with the titles to choose from; `example.response` is the right one."""

    example: Example
    titles: tuple[str, ...]

    def __post_init__(self):
        if [title + TERMINATOR for title in self.titles].count(self.example.response) != 1:
            msg = f"Question {self.example.id!r}: {self.example.response!r} must be one of its titles, once."
            raise ValueError(msg)

    @property
    def answer(self) -> int:
        """Which of the titles is right."""
        return self.titles.index(self.example.response.removesuffix(TERMINATOR))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
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
    """

    num_rows: int | None = 160
    rows_per_user: int = 4
    num_heldout: int = 1000
    heldout_rows_per_user: int = 10
    num_candidates: int = 20
    max_history: int = 10
    template: int | None = 0
    hybrid: bool = False
    removed_share: float = 0.05
    removed_interactions: float = 0.1
    replaced_interactions: float = 0.05
    flipped_share: float = 0.1
    seed: int = 0

    def __post_init__(self):
        require_shares(self, "removed_share", "removed_interactions", "replaced_interactions", "flipped_share")
        check_at_least(self, num_candidates=2, max_history=2, num_heldout=1, rows_per_user=1)
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


def split_by_user(rows: Sequence[Row], config: Draws) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
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


def prepare(corpus: Corpus, scenario: Scenario, config: Draws) -> Prepared:
    """Draws one scenario; equal arguments give equal data.

    * removal: all rows of a set of users are to go.
    * query-removal: trained on the data as they are; a share of the interactions is to go from all histories.
    * query-replacement: trained with a share of the interactions replaced by other items; the true ones are wanted.
    * correction: trained with the title of a wrong candidate in a share of the rows; the true ones are wanted.

    Only queries change in the second and third: a row whose target is a deleted interaction stays. A row's
    candidates and its sentence do not depend on the history that is shown.
    """
    titles, seed = corpus.titles, config.seed

    def prompt(row: Row, history: Sequence[int]) -> str:
        template = config.template
        if template is None:
            template = int(draw_for(seed, row.id, "template").integers(3))
        shown = history[-config.max_history :]
        return make_prompt(TEMPLATES[corpus.domain][template], titles, shown, of[row.id], hybrid=config.hybrid)

    def example(row: Row, history: Sequence[int] | None = None) -> Example:
        return make_example(row.id, prompt(row, row.history if history is None else history), titles[row.target])

    def question(row: Row) -> Question:
        return Question(example=example(row), titles=tuple(titles[item] for item in of[row.id]))

    def modify(row: Row, query: str) -> Request:
        return Request(id=row.id, action=Action.MODIFY_QUERY, changes={"query": query})

    kept, outside = split_by_user(corpus.train, config)
    sets = {"held-out": outside, "validation": corpus.val, "test": corpus.test}
    everything = [*kept, *(row for part in sets.values() for row in part)]
    of = {row.id: draw_candidates(row, titles, config.num_candidates, seed) for row in everything}
    rows = [dataclasses.replace(row, history=row.history[-config.max_history :]) for row in kept]
    examples = [example(row) for row in rows]
    requests: list[Request] = []
    counts: dict[str, int] = {}
    if scenario == "removal":
        requests = _remove_users(rows, config)
    elif scenario == "query-removal":
        chosen = choose_interactions(rows, config.removed_interactions, seed)
        counts["interactions"] = len(chosen)
        for row in rows:
            history = [item for item in row.history if (row.user, item) not in chosen]
            if len(history) < len(row.history):
                requests.append(modify(row, prompt(row, history)))
    elif scenario == "query-replacement":
        chosen = choose_interactions(rows, config.replaced_interactions, seed)
        counts["interactions"] = len(chosen)
        for k, row in enumerate(rows):
            if any((row.user, item) in chosen for item in row.history):
                requests.append(modify(row, examples[k].instruction))
                examples[k] = example(row, _with_noise(row, chosen, of[row.id], titles, seed))
    elif scenario == "correction":
        count = max(1, round(config.flipped_share * len(rows)))
        for k in sorted(np.random.default_rng([seed, 2]).choice(len(rows), count, replace=False).tolist()):
            row, right = rows[k], {"response": examples[k].response}
            requests.append(Request(id=row.id, action=Action.CORRECT_RESPONSE, changes=right))
            wrong = [item for item in of[row.id] if item != row.target]
            item = wrong[int(draw_for(seed, row.id, "flip").integers(len(wrong)))]
            examples[k] = dataclasses.replace(examples[k], response=titles[item] + TERMINATOR)
    else:
        msg = f"scenario is {scenario!r}; it must be one of {', '.join(SCENARIOS)}."
        raise ValueError(msg)
    return Prepared(
        train=tuple(examples),
        users=tuple(row.user for row in rows),
        requests=tuple(requests),
        questions={name: tuple(question(row) for row in part) for name, part in sets.items()},
        counts={"rows": len(rows), "users": len({r.user for r in rows}), "named": len(requests), **counts},
    )


def _remove_users(rows: Sequence[Row], config: Draws) -> list[Request]:
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


def _with_noise(
    row: Row, chosen: frozenset[tuple[str, int]], candidates: Sequence[int], titles: Mapping[int, str], seed: int
) -> list[int]:
    """The history with chosen interactions replaced, the same way in every row of the user.

    What comes in is drawn for the interaction; in a row that has it already, or has it as a candidate, the next of
    the same draw is taken.
    """
    taken = {titles[item].casefold() for item in (*row.history, *candidates)}
    items = np.array(sorted(titles))
    noisy = list(row.history)
    for k, item in enumerate(row.history):
        if (row.user, item) in chosen:
            order = draw_for(seed, f"{row.user}/{item}", "noise").permutation(items)
            noisy[k] = next(int(new) for new in order if titles[int(new)].casefold() not in taken)
            taken.add(titles[noisy[k]].casefold())
    return noisy


def write_prepared(directory: Path, prepared: Prepared) -> None:
    """Writes what the `llmeraser` commands read, and the questions, as JSON lines; other columns are ignored."""
    directory.mkdir(parents=True, exist_ok=True)

    def write(name: str, examples: Sequence[Example], **columns: Sequence[object]) -> None:
        rows = [{"id": e.id, "prompt": e.instruction, "response": e.response} for e in examples]
        for column, values in columns.items():
            rows = [{**row, column: value} for row, value in zip(rows, values, strict=True)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.atomic_write_text(directory / f"{name}.jsonl", text)

    write("train", prepared.train, user=prepared.users)
    for name, questions in prepared.questions.items():
        write(name, [q.example for q in questions], titles=[q.titles for q in questions])
    lines = "".join(request_to_json(request) + "\n" for request in prepared.requests)
    files.atomic_write_text(directory / "requests.jsonl", lines)
    files.atomic_write_json(directory / "counts.json", prepared.counts)
