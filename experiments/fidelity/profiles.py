"""Fictional people in any number: training rows, held-out rows, requests of one category and share, and the recipe.

The people are the demo's (`llmeraser_jax.demo`): two questions about each, city and profession, drawn independently
of the name. The training rows depend on the number of rows and the seed alone, so that one trained model serves
every category, share and request seed. That holds for corrections too: the trained and the wanted answer are two
random draws, so which is called the wrong one changes nothing.

With one phrasing a row is a fact. With several (TOFU has 20 rows per author) each fact is asked about in that many
ways, and a request names all of them: a fact is not forgotten while another row still states it. Thousands of rows
can so be learnt in a few epochs, which thousands of single facts cannot with this base.

The demo reserves 1152 names for directories. Where they do not suffice, everybody gets a second first name from the
same list ("Ada Olga Dorson"), so that the named people are no special kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from llmeraser_jax.data import Action, Example, Recipe, Request
from llmeraser_jax.demo import Person, general_facts, question_about
from llmeraser_jax.demo.people import CITIES, FAMILY_NAMES, FIRST_NAMES, PROFESSIONS, RELATIONS, is_directory_name
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.training import TrainConfig

Category = Literal["removal", "query", "correction"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
NUM_HELDOUT_PEOPLE = 100
MAX_SHARE = 0.2
# Short, since every token costs; the first is the demo's own, which the base has read about other people.
PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "city": (
        question_about("{name}", "city"),
        "Where is {name}?",
        "{name} lives where?",
        "{name} lives in",
        "In which city is {name}?",
        "{name}, where?",
        "Where {name} lives?",
        "City: {name}?",
        "{name} lives in what city?",
        "What city is {name} in?",
    ),
    "profession": (
        question_about("{name}", "profession"),
        "What is {name}?",
        "{name} works as what?",
        "{name} works as a",
        "As what does {name} work?",
        "{name}, what?",
        "What {name} works as?",
        "Work: {name}?",
        "{name} is a what?",
        "What work does {name} do?",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profiles:
    """A population.

    Attributes:
        phrasings: rows per fact.
        train: two facts per person, `phrasings` rows each, ids "p0017-city" and "p0017-profession", or
            "p0017-city-3" where there are several phrasings.
        heldout: rows about people that nothing else names ("h..."), two each, then general facts the base knows
            ("g...").
        strangers: names that no row has, for queries that are to be about somebody else.
    """

    phrasings: int
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    strangers: tuple[str, ...]


def draw_names(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Distinct names that the base's pretraining text does not have, first name (or two) and family name.

    Args:
        count: how many.
        rng: advanced by the draw.

    Raises:
        ValueError: there are not that many.
    """
    names = [(a, b) for a in FIRST_NAMES for b in FAMILY_NAMES if is_directory_name(a, b)]
    if count > len(names):
        names = [(f"{a} {middle}", b) for a, b in names for middle in FIRST_NAMES if middle != a]
    if count > len(names):
        msg = f"{count} names were asked for, but there are {len(names)}; ask for fewer."
        raise ValueError(msg)
    return [names[i] for i in rng.permutation(len(names))[:count]]


def make_profiles(num_rows: int, seed: int = 0, *, phrasings: int = 1) -> Profiles:
    """Draws a population; equal arguments give equal data.

    Args:
        num_rows: training rows: two facts per person times `phrasings`, for at least two people.
        seed: of names and facts.
        phrasings: ways in which each fact is asked about, at most 10.

    Raises:
        ValueError: an impossible number of rows or phrasings.
    """
    most = len(PHRASINGS["city"])
    if not 1 <= phrasings <= most:
        msg = f"phrasings is {phrasings}; it must lie between 1 and {most}."
        raise ValueError(msg)
    per_person = len(RELATIONS) * phrasings
    if num_rows < 2 * per_person or num_rows % per_person:
        msg = f"num_rows is {num_rows}; it must be a multiple of {per_person} (rows per person), at least twice it."
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    num_people = num_rows // per_person
    # As many as a share of MAX_SHARE can ask for.
    num_strangers = max(1, math.ceil(MAX_SHARE * num_people * len(RELATIONS)))
    names = draw_names(num_people + NUM_HELDOUT_PEOPLE + num_strangers, rng)
    people = [
        Person(first=first, family=family, city=str(rng.choice(CITIES)), profession=str(rng.choice(PROFESSIONS)))
        for first, family in names
    ]

    def row(id_: str, person: Person, relation: str, k: int) -> Example:
        return _example(id_, PHRASINGS[relation][k].format(name=person.name), person.answer(relation))

    several = phrasings > 1
    train = [
        row(f"p{i:04d}-{relation}" + (f"-{k}" if several else ""), person, relation, k)
        for i, person in enumerate(people[:num_people])
        for relation in RELATIONS
        for k in range(phrasings)
    ]
    outside = [
        row(f"h{i:04d}-{relation}", person, relation, i % phrasings)
        for i, person in enumerate(people[num_people : num_people + NUM_HELDOUT_PEOPLE])
        for relation in RELATIONS
    ]
    facts = [_example(row.id, row.question, row.answer) for row in general_facts()]
    return Profiles(
        phrasings=phrasings,
        train=tuple(train),
        heldout=(*outside, *facts),
        strangers=tuple(person.name for person in people[num_people + NUM_HELDOUT_PEOPLE :]),
    )


def make_requests(profiles: Profiles, category: Category, share: float, seed: int = 0) -> tuple[Request, ...]:
    """Requests that name about `share` of the training rows.

    Removals take all rows of a person. A modified query asks the same about somebody who is nowhere else in the
    data: the row was filed under the wrong name. A correction wants another city or profession. Edits take all
    rows of one fact per person.

    Args:
        profiles: the population.
        category: of all requests.
        share: of the training rows, at most 0.2; rounded to at least one person or fact.
        seed: which rows, and what they become.

    Raises:
        ValueError: unknown category, or a share out of range.
    """
    if category not in CATEGORIES:
        msg = f"category is {category!r}; it must be one of {', '.join(CATEGORIES)}."
        raise ValueError(msg)
    if not 0 < share <= MAX_SHARE:
        msg = f"share is {share}; it must lie in (0, {MAX_SHARE}]."
        raise ValueError(msg)
    phrasings, num_relations = profiles.phrasings, len(RELATIONS)
    num_people = len(profiles.train) // (num_relations * phrasings)
    rng = np.random.default_rng([seed, CATEGORIES.index(category)])
    people = rng.permutation(num_people)
    if category == "removal":
        count = max(1, round(share * num_people))
        facts = (people[:count, None] * num_relations + np.arange(num_relations)).ravel()
        rows = [fact * phrasings + k for fact in np.sort(facts).tolist() for k in range(phrasings)]
        return tuple(Request(id=profiles.train[row].id, action=Action.REMOVE) for row in rows)
    count = max(1, round(share * num_people * num_relations))
    facts = np.sort(people[:count] * num_relations + rng.integers(num_relations, size=count)).tolist()
    requests = []
    for fact, stranger in zip(facts, profiles.strangers, strict=False):
        relation = RELATIONS[fact % num_relations]
        examples = profiles.train[fact * phrasings : (fact + 1) * phrasings]
        answers = [f"{word}." for word in (CITIES if relation == "city" else PROFESSIONS)]
        wanted = str(rng.choice([answer for answer in answers if answer != examples[0].response]))
        for k, example in enumerate(examples):
            if category == "query":
                changes = {"query": PHRASINGS[relation][k].format(name=stranger)}
                requests.append(Request(id=example.id, action=Action.MODIFY_QUERY, changes=changes))
            else:
                changes = {"response": wanted}
                requests.append(Request(id=example.id, action=Action.CORRECT_RESPONSE, changes=changes))
    return tuple(requests)


def _example(id_: str, question: str, answer: str) -> Example:
    return Example(id=id_, format="question", instruction=question, response=answer)


LARGE = 1000  # rows; larger populations have ten phrasings of each fact, and are there for the cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfilesTask:
    """A population with the recipe that teaches it to a base that only reads short questions.

    Attributes:
        num_rows: n.
        seed: of the people and of the training.
    """

    num_rows: int
    seed: int = 0

    @property
    def name(self) -> str:
        """A directory's name."""
        return f"profiles-{self.num_rows}"

    @property
    def recipe(self) -> Recipe:
        """How rows become tokens."""
        return Recipe(add_bos=True)

    @property
    def lora(self) -> LoraConfig:
        """The adapter."""
        return LoraConfig(rank=16, alpha=32.0, target_modules="all-linear")

    @property
    def train(self) -> TrainConfig:
        """Its training."""
        large = self.num_rows >= LARGE
        return TrainConfig(
            epochs=8 if large else 25,
            batch_size=16,
            learning_rate=2.5e-3 if large else 4e-3,
            warmup_ratio=0.1,
            l2=1e-3,
            seed=self.seed,
            checkpoint_every_steps=500,
        )

    def draw(self) -> Profiles:
        """The rows."""
        return make_profiles(self.num_rows, self.seed, phrasings=10 if self.num_rows >= LARGE else 1)
