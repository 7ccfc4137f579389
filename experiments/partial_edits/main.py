"""Corrections of one word, of the end and of all of a response, queries alike, and copies in the retain set.

    python -m experiments.partial_edits.main

Each person of a made-up directory has one row, "Who is NAME?" with "PROFESSION in CITY." The demo's base learns the
rows by heart, is asked for edits of every extent, and is compared with a retraining from the same initial adapter.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import jax
import numpy as np
import tyro

from experiments.common import load_demo_base
from llmeraser_jax.data import Example, Recipe, encode_examples, parse_requests
from llmeraser_jax.demo.people import CITIES, PROFESSIONS, Person, make_directory
from llmeraser_jax.evaluation.render import Table, render_text
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.unlearning import UnlearningTask, erase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Main:
    """What is run.

    Attributes:
        people: rows of the directory.
        each: rows of each kind of request.
        epochs: passes over the data.
        seed: of the retraining; the adapter that is edited has seed 0.
    """

    people: int = 96
    each: int = 2
    epochs: int = 80
    seed: int = 1


def following(values: Sequence[str], value: str) -> str:
    """The value after one, around the end."""
    return values[(values.index(value) + 1) % len(values)]


def answer(profession: str, city: str) -> str:
    """The response of a row."""
    return f"{profession} in {city}."


def row(id_: str, person: Person) -> Example:
    """The row of a person."""
    response = answer(person.profession, person.city)
    return Example(id=id_, instruction=f"Who is {person.name}?", response=response, format="question")


def requests_of(people: Sequence[Person], strangers: Sequence[Person], each: int) -> dict[str, list[dict]]:
    """Request lines by kind, `each` of every kind, for the first people in order."""
    ids = iter(range(len(people)))

    def lines(action: str, **texts) -> list[dict]:
        chosen = [next(ids) for _ in range(each)]
        changes = [{field: text(people[i], strangers[i]) for field, text in texts.items()} for i in chosen]
        return [{"id": str(i), "action": action, **change} for i, change in zip(chosen, changes, strict=True)]

    def other_all(p: Person, _: Person) -> str:
        return f"{following(CITIES, p.city)} and {following(PROFESSIONS, p.profession)}."

    def other_work(p: Person, _: Person) -> str:
        return answer(following(PROFESSIONS, p.profession), p.city)

    def other_city(p: Person, _: Person) -> str:
        return answer(p.profession, following(CITIES, p.city))

    return {
        "removed, a copy stays": lines("remove"),
        "removed": lines("remove"),
        "corrected: one word": lines("correct_response", response=other_work),
        "corrected: the end": lines("correct_response", response=other_city),
        "corrected: all": lines("correct_response", response=other_all),
        "query: one word": lines("modify_query", query=lambda p, o: f"Who is {p.first} {o.family}?"),
        "query: the end": lines(
            "modify_query", query=lambda p, o: f"Who is {p.name}, and what is the work of {o.name}?"
        ),
        "query: all": lines("modify_query", query=lambda p, o: f"Where does {o.name} live?"),
    }


def main(config: Main) -> None:
    """Runs it and prints the table."""
    people = make_directory(config.people + 48).people
    people, strangers, unseen = people[: config.people], people[config.people :][:24] * 4, people[-24:]
    kinds = requests_of(people, strangers, config.each)
    lines = [line for of_kind in kinds.values() for line in of_kind]
    copied = [int(line["id"]) for line in kinds["removed, a copy stays"]]
    examples = (*(row(str(i), p) for i, p in enumerate(people)), *(row(f"copy of {i}", people[i]) for i in copied))
    model = load_demo_base()
    dataset = encode_examples(examples, Recipe(), model.tokenizer)
    outside = [row(f"u{i}", person) for i, person in enumerate(unseen)]
    calibration = encode_examples(outside, dataset.recipe, model.tokenizer)
    requests = parse_requests(lines, examples)
    train = TrainConfig(epochs=config.epochs, batch_size=8, learning_rate=4e-3, warmup_ratio=0.1, l2=1e-3)
    initial = model.init_lora(jax.random.key(0), LoraConfig(rank=8, alpha=16.0, target_modules="all-linear"))
    before = finetune(model, dataset, train, lora=initial).lora
    task = UnlearningTask(
        model=model,
        adapter=before,
        data=dataset,
        requests=requests,
        training=train,
        calibration=calibration,
        initial=initial,
    )
    problem, again = task.problem, dataclasses.replace(train, seed=config.seed)
    retrained = finetune(model, task.edited, again, lora=initial).lora
    result = erase(task)
    receipt = result.receipt
    assert receipt is not None  # of the package's own methods

    place = {dataset.examples[i].id: k for k, i in enumerate(problem.named)}
    groups = {}
    for kind, of_kind in kinds.items():
        chosen = np.array([place[line["id"]] for line in of_kind])
        groups[kind] = (problem.examples, problem.named[chosen])
        if problem.replacements[chosen[0]] >= 0:
            groups[f"{kind} (new)"] = (problem.examples, problem.replacements[chosen])
    groups["retained"] = (problem.examples, problem.retained)
    groups["not trained on"] = (calibration, None)
    adapters = (before, result.params, retrained)
    rows = tuple(
        (name, *(f"{score_examples(model, lora, *of).losses.mean():.3f}" for lora in adapters))
        for name, of in groups.items()
    )
    table = Table(("mean loss, nats per token", "before", "erased", "retrained"), rows)
    share = result.cost.share_of_retraining
    sys.stdout.write(f"{render_text([table])}outcome: {receipt.outcome}\ncost: {share:.2f} of a retraining\n")


if __name__ == "__main__":
    main(tyro.cli(Main))
