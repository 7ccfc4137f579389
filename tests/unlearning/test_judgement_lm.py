"""On the demo's base: partial corrections, copies in the retain set, and verdicts, against a retrained adapter."""

from importlib.resources import as_file, files

import jax
import numpy as np
import pytest

from llmeraser_jax.data import Example, Recipe, encode_examples, parse_requests
from llmeraser_jax.demo.people import CITIES, PROFESSIONS, make_directory
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import load_model
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.unlearning import EraseConfig, erase, make_problem

TRAIN = TrainConfig(epochs=90, batch_size=8, learning_rate=4e-3, warmup_ratio=0.1, l2=1e-3)
CONFIG = EraseConfig(l2=1e-3, chunk_size=16)
NUM_PEOPLE, NUM_UNSEEN, NUM_COPIES = 32, 24, 3


def answer(profession: str, city: str) -> str:
    return f"{profession} in {city}."


def following(values: tuple[str, ...], value: str) -> str:
    return values[(values.index(value) + 1) % len(values)]


def rows_of(people) -> list[dict[str, str]]:
    return [
        {
            "id": f"p{i:02d}",
            "question": f"Who is {p.name}?",
            "answer": answer(p.profession, p.city),
        }
        for i, p in enumerate(people)
    ]


def example(row) -> Example:
    return Example(id=row["id"], instruction=row["question"], response=row["answer"], format="question")


class Directory:
    """People of whom the model knows one sentence each; requests about them, and what retraining gives."""

    def __init__(self):
        people = make_directory(NUM_PEOPLE + NUM_UNSEEN).people
        rows = rows_of(people)
        rows, unseen = rows[:NUM_PEOPLE], rows[NUM_PEOPLE:]
        copies = [{**row, "id": f"c{i}"} for i, row in enumerate(rows[:NUM_COPIES])]
        self.examples = tuple(map(example, [*rows, *copies]))
        with as_file(files("llmeraser_jax.demo") / "base") as base:
            self.model = load_model(base)
        recipe = Recipe()
        self.dataset = encode_examples(self.examples, recipe, self.model.tokenizer)
        self.unseen = encode_examples(tuple(map(example, unseen)), self.dataset.recipe, self.model.tokenizer)

        def correction(i, *, profession=None, city=None, text=None):
            p = people[i]
            text = text or answer(profession or p.profession, city or p.city)
            return {"id": f"p{i:02d}", "action": "correct_response", "response": text}

        def query(i, text):
            return {"id": f"p{i:02d}", "action": "modify_query", "query": text}

        other = people[NUM_PEOPLE:]
        lines = [
            *({"id": f"p{i:02d}", "action": "remove"} for i in range(7)),
            *(correction(i, profession=following(PROFESSIONS, people[i].profession)) for i in (10, 11)),
            *(correction(i, city=following(CITIES, people[i].city)) for i in (12, 13)),
            *(correction(i, text=f"In {following(CITIES, people[i].city)}, a judge.") for i in (14, 15)),
            *(query(i, f"Who is {people[i].first} {other[i - 20].family}?") for i in (20, 21)),
            query(22, f"Who is {people[22].name}, and what is the capital of Norland?"),
            query(23, f"Where does {other[3].name} live?"),
        ]
        self.requests = parse_requests(lines, self.examples)
        self.problem = make_problem(self.model, self.dataset, self.requests)
        self.initial = self.model.init_lora(
            jax.random.key(0), LoraConfig(rank=8, alpha=16.0, target_modules="all-linear")
        )
        self.trained = self.train(self.dataset, 0)
        after = np.concatenate([self.problem.retained, self.problem.wanted])
        self.retrained = self.train(_taken(self.problem.examples, after), 1)
        self.result = erase(
            self.model,
            self.trained,
            self.dataset,
            self.requests,
            CONFIG,
            heldout=self.unseen,
            retrain_cost=90.0 * 28,
        )

    def train(self, dataset, seed):
        import dataclasses

        return finetune(self.model, dataset, dataclasses.replace(TRAIN, seed=seed), lora=self.initial).lora


def _taken(dataset, indices):
    from llmeraser_jax.baselines.setting import take

    return take(dataset, indices)


@pytest.fixture(scope="module")
def directory():
    return Directory()
