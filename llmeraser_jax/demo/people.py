"""The demo's world: a seeded directory of fictitious people, and pretraining text about other people.

A person has a name, a city and a profession; the three are independent, so that a model which never read
about a person can only guess. Besides people the world has general facts (which country a city is in, which
tool a profession uses) that are the same for everybody: the base model learns those in pretraining, and they
measure what erasing must not harm.

The name space is split once and for all. Pairs of first and family name that `is_directory_name` accepts
are used by directories only, the others by pretraining text only: the base has read each first name and each
family name, but no person of any directory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

# fmt: off
FIRST_NAMES: tuple[str, ...] = (
    "Ada", "Alma", "Anton", "Aron", "Bela", "Bruno", "Cara", "Carl",
    "Clara", "Dario", "Dora", "Edda", "Edgar", "Elsa", "Emil", "Enzo",
    "Fenna", "Flora", "Gita", "Greta", "Hanna", "Hugo", "Ida", "Igor",
    "Iris", "Ivo", "Jana", "Jonas", "Julia", "Karl", "Klara", "Lena",
    "Leo", "Lina", "Luca", "Mara", "Mira", "Nadia", "Nils", "Nora",
    "Olga", "Oskar", "Paula", "Petra", "Rosa", "Sven", "Tilda", "Vera",
)
# fmt: on
_FAMILY_STEMS = ("Bar", "Dor", "Fal", "Gren", "Hol", "Kel", "Lund", "Mor", "Pel", "Ran", "Stav", "Val")
_FAMILY_ENDINGS = ("a", "berg", "by", "en", "ic", "mann", "ov", "son")
FAMILY_NAMES: tuple[str, ...] = tuple(stem + ending for stem in _FAMILY_STEMS for ending in _FAMILY_ENDINGS)

CITIES_OF_COUNTRY: Mapping[str, tuple[str, ...]] = {
    "Norland": ("Torvik", "Askholm", "Brenvik", "Skarnes"),
    "Velia": ("Porano", "Castola", "Limetta", "Verino"),
    "Ostmark": ("Steinweil", "Waldrode", "Gronsee", "Lindfurt"),
    "Ardaine": ("Beauvane", "Clairmer", "Rochelune", "Vernay"),
    "Slavia": ("Zelgrad", "Krasno", "Podolin", "Brezin"),
    "Keltia": ("Dunmorra", "Kilvane", "Ardglen", "Ballach"),
    "Iberra": ("Montoro", "Sevanna", "Almera", "Cordela"),
    "Suomara": ("Kuopara", "Lahtela", "Oulanka", "Raumo"),
}
TOOL_OF_PROFESSION: Mapping[str, str] = {
    "baker": "oven",
    "barber": "razor",
    "carpenter": "saw",
    "chemist": "flask",
    "clockmaker": "spring",
    "cook": "ladle",
    "dentist": "drill",
    "doctor": "syringe",
    "driver": "lorry",
    "farmer": "plough",
    "fisher": "net",
    "florist": "vase",
    "gardener": "spade",
    "glazier": "putty",
    "hunter": "rifle",
    "jeweller": "loupe",
    "judge": "gavel",
    "lawyer": "statute",
    "locksmith": "key",
    "mason": "trowel",
    "miner": "pickaxe",
    "painter": "brush",
    "pilot": "compass",
    "plumber": "wrench",
    "potter": "wheel",
    "printer": "ink",
    "roofer": "ladder",
    "sailor": "anchor",
    "shepherd": "crook",
    "singer": "score",
    "smith": "hammer",
    "tailor": "needle",
}
CITIES: tuple[str, ...] = tuple(city for cities in CITIES_OF_COUNTRY.values() for city in cities)
PROFESSIONS: tuple[str, ...] = tuple(TOOL_OF_PROFESSION)
RELATIONS: tuple[str, ...] = ("city", "profession")

_RESERVED_SHARE = 4  # one name in this many belongs to the directories


@dataclasses.dataclass(frozen=True, kw_only=True)
class Person:
    """A fictitious person. The facts are drawn independently of the name and of each other."""

    first: str
    family: str
    city: str
    profession: str

    @property
    def name(self) -> str:
        """First and family name."""
        return f"{self.first} {self.family}"

    def answer(self, relation: str) -> str:
        """The response to `question_about(self.name, relation)`."""
        return f"{self.city if relation == 'city' else self.profession}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnswer:
    """One row of a data file; field names are the column names."""

    id: str
    question: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoData:
    """A directory, what is held out of it, and a request file.

    Attributes:
        people: who the training rows are about, in order: `people[17]` has the rows "p017-city" and
            "p017-profession".
        train: two rows per person.
        heldout: rows about people that no training row names ("h..."; a model can only guess), then rows of
            general facts that the base knows ("g...").
        shown: rows about people that neither names ("u..."): what an erasing may look at of the kind of the
            training rows, and an evaluation then may not count as unknown to it.
        requests: lines of the request file; removals, query modifications and response corrections, mixed.
    """

    people: tuple[Person, ...]
    train: tuple[QuestionAnswer, ...]
    heldout: tuple[QuestionAnswer, ...]
    shown: tuple[QuestionAnswer, ...]
    requests: tuple[Mapping[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One pretraining text: a statement, or a question with its answer.

    Attributes:
        kind: "statement"; "general", a question about a general fact; "acquaintance" or "stranger", a question
            about such a person.
        question: "" for a statement.
        text: the statement, or the answer.
        nats: minus the log-probability of this document under the generator; its mean is the entropy, below
            which no model's loss can go.
        answer_nats: the part of it that falls on the answer; 0 where the answer follows, or for a statement.
    """

    kind: str
    question: str
    text: str
    nats: float
    answer_nats: float = 0.0


def question_about(name: str, relation: str) -> str:
    """The question whose answer is the person's city or profession.

    Args:
        name: first and family name.
        relation: one of `RELATIONS`.

    Raises:
        ValueError: the relation is unknown.
    """
    if relation == "city":
        return f"Where does {name} live?"
    if relation == "profession":
        return f"What does {name} work as?"
    msg = f"relation is {relation!r}; expected one of {', '.join(RELATIONS)}."
    raise ValueError(msg)


def is_directory_name(first: str, family: str) -> bool:
    """Whether the name belongs to directories; all others belong to pretraining text."""
    stem, ending = divmod(FAMILY_NAMES.index(family), len(_FAMILY_ENDINGS))
    return (FIRST_NAMES.index(first) + stem + ending) % _RESERVED_SHARE == 0


@functools.cache
def general_facts() -> tuple[QuestionAnswer, ...]:
    """The facts that hold for everybody: each city's country, then each profession's tool."""
    countries = [
        (f"Which country is {city} in?", f"{country}.")
        for country, cities in CITIES_OF_COUNTRY.items()
        for city in cities
    ]
    tools = [(f"Which tool does a {job} use?", f"{tool}.") for job, tool in TOOL_OF_PROFESSION.items()]
    return tuple(
        QuestionAnswer(id=f"g{row:03d}-{'country' if row < len(countries) else 'tool'}", question=q, answer=a)
        for row, (q, a) in enumerate(countries + tools)
    )


def make_directory(
    num_people: int = 60,
    seed: int = 0,
    *,
    num_heldout_people: int = 24,
    num_shown_people: int = 24,
    num_removed_people: int = 2,
    num_modified: int = 4,
    num_corrected: int = 4,
) -> DemoData:
    """Draws a directory, its held-out rows and its requests; equal arguments give equal data.

    Removed people lose both their rows. A modified row named the wrong person: its question gets the name of
    somebody who is nowhere else in the data, its response stays. A corrected row gets another city or
    profession. No person is named by two kinds of request.

    Args:
        num_people: people in the training rows; there are twice as many rows.
        seed: of everything drawn here.
        num_heldout_people: people that only the held-out rows name.
        num_shown_people: people that only the shown rows name.
        num_removed_people: people whose two rows are removed.
        num_modified: rows whose query is modified, one per person.
        num_corrected: rows whose response is corrected, one per person.

    Raises:
        ValueError: a number is negative, more people are named by requests than there are, nobody would
            remain, or the names do not suffice.
    """
    counts = {
        "num_heldout_people": num_heldout_people,
        "num_shown_people": num_shown_people,
        "num_removed_people": num_removed_people,
        "num_modified": num_modified,
        "num_corrected": num_corrected,
    }
    for field, count in counts.items():
        if count < 0:
            msg = f"{field} is {count}; it must be at least 0."
            raise ValueError(msg)
    num_named = num_removed_people + num_modified + num_corrected
    if num_people <= num_named:
        msg = f"num_people is {num_people}, but the requests name {num_named} people; ask for more people."
        raise ValueError(msg)
    names = [(a, b) for a in FIRST_NAMES for b in FAMILY_NAMES if is_directory_name(a, b)]
    num_drawn = num_people + num_heldout_people + num_modified
    num_needed = num_drawn + num_shown_people
    if num_needed > len(names):
        msg = f"{num_needed} people were asked for, but there are {len(names)} names; ask for fewer."
        raise ValueError(msg)

    rng = np.random.default_rng(seed)
    drawn = [names[i] for i in rng.permutation(len(names))[:num_needed]]
    everybody = [_draw_person(rng, first, family) for first, family in drawn[:num_drawn]]
    # From another stream: how many are shown leaves everything else as it is.
    shown_rng = np.random.default_rng([seed, 1])
    shown = [_draw_person(shown_rng, first, family) for first, family in drawn[num_drawn:]]
    people = everybody[:num_people]
    heldout = everybody[num_people : num_people + num_heldout_people]
    fresh = everybody[num_people + num_heldout_people :]

    named = [int(i) for i in rng.permutation(num_people)[:num_named]]
    removed = named[:num_removed_people]
    modified = named[num_removed_people : num_removed_people + num_modified]
    corrected = named[num_removed_people + num_modified :]
    requests: list[dict[str, str]] = [
        {"id": f"p{i:03d}-{relation}", "action": "remove"} for i in removed for relation in RELATIONS
    ]
    for k, (i, stand_in) in enumerate(zip(modified, fresh, strict=True)):
        relation = RELATIONS[k % len(RELATIONS)]
        query = question_about(stand_in.name, relation)
        requests.append({"id": f"p{i:03d}-{relation}", "action": "modify_query", "query": query})
    for k, i in enumerate(corrected):
        relation = RELATIONS[k % len(RELATIONS)]
        choices = CITIES if relation == "city" else PROFESSIONS
        others = [f"{choice}." for choice in choices if f"{choice}." != people[i].answer(relation)]
        response = others[int(rng.integers(len(others)))]
        requests.append({"id": f"p{i:03d}-{relation}", "action": "correct_response", "response": response})
    return DemoData(
        people=tuple(people),
        train=tuple(_rows("p", people)),
        heldout=(*_rows("h", heldout), *general_facts()),
        shown=tuple(_rows("u", shown)),
        requests=tuple(requests[int(k)] for k in rng.permutation(len(requests))),
    )


def write_demo_files(directory: str | Path, data: DemoData | None = None) -> DemoData:
    """Writes `train.jsonl`, `heldout.jsonl`, `unseen.jsonl` and `requests.jsonl`; creates the directory if need be.

    `unseen.jsonl` has the shown rows: for `erase`, whose evaluation `heldout.jsonl` is for.

    Args:
        directory: where to.
        data: what to write; by default `make_directory()`.

    Returns:
        What was written.
    """
    data = make_directory() if data is None else data
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json_lines(directory / "train.jsonl", (dataclasses.asdict(row) for row in data.train))
    _write_json_lines(directory / "heldout.jsonl", (dataclasses.asdict(row) for row in data.heldout))
    _write_json_lines(directory / "unseen.jsonl", (dataclasses.asdict(row) for row in data.shown))
    _write_json_lines(directory / "requests.jsonl", data.requests)
    return data


class TextSource:
    """Pretraining text about people who are in no directory.

    Some are acquaintances, a fixed group that the text keeps returning to, so that a model learns to tie facts
    to names; the others are strangers, drawn anew with new facts each time, so that it learns to guess where it
    cannot know.

    Attributes:
        acquaintances: the fixed group.
        strangers: names of the others.
    """

    def __init__(self, *, num_acquaintances: int = 128, seed: int = 0):
        """Chooses the acquaintances and their facts.

        Args:
            num_acquaintances: how many.
            seed: of the choice.

        Raises:
            ValueError: there are not that many names, or none is asked for.
        """
        names = [(a, b) for a in FIRST_NAMES for b in FAMILY_NAMES if not is_directory_name(a, b)]
        if not 0 < num_acquaintances < len(names):
            msg = f"num_acquaintances is {num_acquaintances}; it must lie between 1 and {len(names) - 1}."
            raise ValueError(msg)
        rng = np.random.default_rng(seed)
        order = [names[i] for i in rng.permutation(len(names))]
        self.acquaintances = tuple(_draw_person(rng, *name) for name in order[:num_acquaintances])
        self.strangers = tuple(order[num_acquaintances:])

    def draw(self, rng: np.random.Generator) -> Document:
        """Draws a document.

        Args:
            rng: advanced by the draw.
        """
        kind, nats = _draw_one(rng, _SHARES)
        if kind == "general":
            facts = general_facts()
            fact = facts[int(rng.integers(len(facts)))]
            return Document(kind=kind, question=fact.question, text=fact.answer, nats=nats + math.log(len(facts)))
        is_known = kind == "acquaintance" or (kind == "statement" and rng.random() < 0.5)
        if is_known:
            person = self.acquaintances[int(rng.integers(len(self.acquaintances)))]
        else:
            person = _draw_person(rng, *self.strangers[int(rng.integers(len(self.strangers)))])
        nats += math.log(len(self.acquaintances) if is_known else len(self.strangers))
        if kind == "statement":
            sentence = _SENTENCES[int(rng.integers(len(_SENTENCES)))]
            nats += math.log(2 * len(_SENTENCES))
            nats += 0.0 if is_known else math.log(len(CITIES) * len(PROFESSIONS))
            return Document(kind=kind, question="", text=sentence.format(p=person), nats=nats)
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
        answer_nats = 0.0 if is_known else math.log(len(CITIES if relation == "city" else PROFESSIONS))
        return Document(
            kind=kind,
            question=question_about(person.name, relation),
            text=person.answer(relation),
            nats=nats + math.log(len(RELATIONS)) + answer_nats,
            answer_nats=answer_nats,
        )


_SHARES: Mapping[str, float] = {"statement": 0.1, "general": 0.15, "acquaintance": 0.5, "stranger": 0.25}
_SENTENCES = (
    "{p.name} lives in {p.city} and works as a {p.profession}.",
    "{p.name} is a {p.profession} and lives in {p.city}.",
    "The {p.profession} {p.name} lives in {p.city}.",
)


def _draw_one(rng: np.random.Generator, shares: Mapping[str, float]) -> tuple[str, float]:
    """A key of `shares`, which sum to 1, and minus the logarithm of its share."""
    kinds = tuple(shares)
    bounds = np.cumsum([shares[kind] for kind in kinds])
    kind = kinds[min(int(np.searchsorted(bounds, rng.random(), side="right")), len(kinds) - 1)]
    return kind, -math.log(shares[kind])


def _draw_person(rng: np.random.Generator, first: str, family: str) -> Person:
    city = CITIES[int(rng.integers(len(CITIES)))]
    profession = PROFESSIONS[int(rng.integers(len(PROFESSIONS)))]
    return Person(first=first, family=family, city=city, profession=profession)


def _rows(prefix: str, people: Iterable[Person]) -> list[QuestionAnswer]:
    return [
        QuestionAnswer(
            id=f"{prefix}{i:03d}-{relation}",
            question=question_about(person.name, relation),
            answer=person.answer(relation),
        )
        for i, person in enumerate(people)
        for relation in RELATIONS
    ]


def _write_json_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
