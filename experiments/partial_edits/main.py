"""Corrections of one word, of the end and of all of a response, queries alike, and copies in the retain set.

    python -m experiments.partial_edits.main

Each person of a made-up directory has one row, "Who is NAME?" with "PROFESSION in CITY." The demo's base learns the
rows by heart, is asked for edits of every extent, and is compared with a retraining from the same initial adapter.
"""

from __future__ import annotations

import dataclasses
import sys
from importlib.resources import as_file, files

import jax
import numpy as np
import tyro
from llmeraser_jax.baselines.setting import response_losses, take

from llmeraser_jax.data import Example, Recipe, TokenDataset, encode_examples, parse_requests
from llmeraser_jax.demo.people import CITIES, PROFESSIONS, Person, make_directory
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import load_model
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.unlearning import EraseConfig, erase, make_problem


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


def following(values: tuple[str, ...], value: str) -> str:
    """The value after one, around the end."""
    return values[(values.index(value) + 1) % len(values)]


def answer(profession: str, city: str) -> str:
    """The response of a row."""
    return f"{profession} in {city}."


def row(id_: str, person: Person) -> Example:
    """The row of a person."""
    response = answer(person.profession, person.city)
    return Example(id=id_, instruction=f"Who is {person.name}?", response=response, format="question")


def requests_of(people: tuple[Person, ...], strangers: tuple[Person, ...], each: int) -> dict[str, list[dict]]:
    """Request lines by kind, `each` of every kind, for the first people in order."""
    ids = iter(range(len(people)))

    def correction(text) -> list[dict]:
        chosen = [next(ids) for _ in range(each)]
        return [{"id": str(i), "action": "correct_response", "response": text(people[i])} for i in chosen]

    def query(text) -> list[dict]:
        chosen = [next(ids) for _ in range(each)]
        return [{"id": str(i), "action": "modify_query", "query": text(people[i], strangers[i])} for i in chosen]

    def removal() -> list[dict]:
        return [{"id": str(next(ids)), "action": "remove"} for _ in range(each)]

    return {
        "removed, a copy stays": removal(),
        "removed": removal(),
        "corrected: one word": correction(lambda p: answer(following(PROFESSIONS, p.profession), p.city)),
        "corrected: the end": correction(lambda p: answer(p.profession, following(CITIES, p.city))),
        "corrected: all": correction(
            lambda p: f"{following(CITIES, p.city)} and {following(PROFESSIONS, p.profession)}."
        ),
        "query: one word": query(lambda p, other: f"Who is {p.first} {other.family}?"),
        "query: the end": query(lambda p, other: f"Who is {p.name}, and what is the work of {other.name}?"),
        "query: all": query(lambda p, other: f"Where does {other.name} live?"),
    }


def main(config: Main) -> int:
    """Runs it and prints the table."""
    people = make_directory(config.people + 48).people
    people, strangers, unseen = people[: config.people], people[config.people :][:24] * 4, people[-24:]
    kinds = requests_of(people, strangers, config.each)
    lines = [line for of_kind in kinds.values() for line in of_kind]
    copied = [int(line["id"]) for line in kinds["removed, a copy stays"]]
    examples = (
        *(row(str(i), person) for i, person in enumerate(people)),
        *(row(f"copy of {i}", people[i]) for i in copied),
    )
    with as_file(files("llmeraser_jax.demo") / "base") as base:
        model = load_model(base)
    dataset = encode_examples(examples, Recipe(), model.tokenizer)
    calibration = encode_examples(
        tuple(row(f"u{i}", p) for i, p in enumerate(unseen)), dataset.recipe, model.tokenizer
    )
    requests = parse_requests(lines, examples)
    problem = make_problem(model, dataset, requests)
    train = TrainConfig(epochs=config.epochs, batch_size=8, learning_rate=4e-3, warmup_ratio=0.1, l2=1e-3)
    initial = model.init_lora(jax.random.key(0), LoraConfig(rank=8, alpha=16.0, target_modules="all-linear"))
    before = finetune(model, dataset, train, lora=initial).lora
    edited = take(problem.examples, np.concatenate([problem.retained, problem.wanted]))
    oracle = finetune(model, edited, dataclasses.replace(train, seed=config.seed), lora=initial).lora
    result = erase(
        model,
        before,
        dataset,
        requests,
        EraseConfig(l2=train.l2, chunk_size=16),
        heldout=calibration,
        retrain_cost=float(config.epochs * len(edited)),
    )
    _print(model, dataset, problem, kinds, (before, result.lora, oracle), calibration)
    receipt = result.receipt
    sys.stdout.write(f"outcome: {receipt.outcome}\n")
    sys.stdout.write(f"cost: {receipt.gradient_equivalents.share_of_retraining:.2f} of a retraining\n")
    return 0


def _print(model, dataset, problem, kinds, adapters, calibration) -> None:
    place = {dataset.examples[i].id: k for k, i in enumerate(problem.named)}
    rows: list[tuple[str, TokenDataset, np.ndarray]] = []
    for kind, lines in kinds.items():
        chosen = np.array([place[line["id"]] for line in lines])
        rows.append((kind, problem.examples, problem.named[chosen]))
        if problem.replacements[chosen[0]] >= 0:
            rows.append((f"{kind} (new)", problem.examples, problem.replacements[chosen]))
    rows.append(("retained", problem.examples, problem.retained))
    rows.append(("not trained on", calibration, np.arange(len(calibration))))
    sys.stdout.write(f"{'mean loss, nats per token':<30}{'before':>9}{'erased':>9}{'retrained':>11}\n")
    for kind, examples, indices in rows:
        cells = [response_losses(model, lora, examples, indices).mean() for lora in adapters]
        sys.stdout.write(f"{kind:<30}{cells[0]:>9.3f}{cells[1]:>9.3f}{cells[2]:>11.3f}\n")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Main)))
