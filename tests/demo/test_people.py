"""The demo's world: what the generator promises about people, rows, requests and pretraining text."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from llmeraser_jax.data import apply_requests, load_examples, load_requests
from llmeraser_jax.demo import (
    TextSource,
    general_facts,
    is_directory_name,
    make_directory,
    question_about,
    write_demo_files,
)
from llmeraser_jax.demo.people import CITIES, FAMILY_NAMES, FIRST_NAMES, PROFESSIONS, RELATIONS


def first_and_family(name):
    first, family = name.split(" ")
    return first, family


def test_equal_arguments_give_equal_data_and_another_seed_gives_other_people():
    assert make_directory(seed=3) == make_directory(seed=3)
    assert make_directory(seed=3).people != make_directory(seed=4).people


def test_data_do_not_depend_on_hash_randomisation(tmp_path):
    code = "import sys; from llmeraser_jax.demo import write_demo_files; write_demo_files(sys.argv[1])"
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True, env=env)
    for name in ("train.jsonl", "heldout.jsonl", "unseen.jsonl", "requests.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_rows_state_the_people_and_ids_are_unique():
    data = make_directory(num_people=30, seed=1)
    assert len(data.train) == 60
    ids = [row.id for row in data.train + data.heldout]
    assert len(set(ids)) == len(ids)
    by_id = {row.id: row for row in data.train}
    for number in (0, 17, 29):
        person = data.people[number]
        city, profession = by_id[f"p{number:03d}-city"], by_id[f"p{number:03d}-profession"]
        assert (city.question, city.answer) == (f"Where does {person.name} live?", f"{person.city}.")
        assert profession.question == f"What does {person.name} work as?"
        assert profession.answer == f"{person.profession}."


def test_heldout_people_and_stand_ins_are_nowhere_else():
    data = make_directory(seed=5)
    trained = {person.name for person in data.people}
    assert len(trained) == len(data.people)
    heldout = [row.question for row in data.heldout if row.id.startswith("h")]
    queries = [request["query"] for request in data.requests if request["action"] == "modify_query"]
    assert len(heldout) == 2 * 24 and len(queries) == 4
    for question in (*heldout, *queries):
        assert not any(f" {name} " in question for name in trained)
    assert not set(heldout) & set(queries)


def test_shown_people_are_nowhere_else_and_change_nothing_else():
    data = make_directory(seed=5)
    questions = [row.question for row in data.shown]
    assert len(set(questions)) == 2 * 24 and {row.id[0] for row in data.shown} == {"u"}
    queries = {request.get("query") for request in data.requests}
    assert not set(questions) & ({row.question for row in (*data.train, *data.heldout)} | queries)
    without = make_directory(seed=5, num_shown_people=0)
    assert without.shown == ()
    assert (without.train, without.heldout, without.requests) == (data.train, data.heldout, data.requests)


def test_general_heldout_rows_are_the_general_facts():
    data = make_directory()
    assert tuple(row for row in data.heldout if row.id.startswith("g")) == general_facts()
    answers = {fact.question: fact.answer for fact in general_facts()}
    assert len(answers) == len(CITIES) + len(PROFESSIONS) == 64
    assert answers["Which country is Torvik in?"] == "Norland."
    assert answers["Which tool does a baker use?"] == "oven."


def test_requests_load_apply_and_mix_the_actions(tmp_path):
    data = write_demo_files(tmp_path)
    examples = load_examples(tmp_path / "train.jsonl")
    assert [(e.id, e.instruction, e.response) for e in examples] == [
        (r.id, r.question, r.answer) for r in data.train
    ]
    requests = load_requests(tmp_path / "requests.jsonl", examples)
    assert Counter(r["action"] for r in data.requests) == {"remove": 4, "modify_query": 4, "correct_response": 4}
    edited = {e.id: e for e in apply_requests(examples, requests)}
    assert len(edited) == len(examples) - 4
    before = {e.id: e for e in examples}
    for request in data.requests:
        number, relation = request["id"].split("-")
        old = before[request["id"]]
        if request["action"] == "remove":
            assert f"{number}-city" not in edited and f"{number}-profession" not in edited
        elif request["action"] == "modify_query":
            new = edited[request["id"]]
            assert new.response == old.response and new.instruction == request["query"] != old.instruction
            old_name = data.people[int(number[1:])].name
            assert old.instruction == question_about(old_name, relation)
        else:
            new = edited[request["id"]]
            assert new.instruction == old.instruction and new.response == request["response"] != old.response
            assert new.response.rstrip(".") in (CITIES if relation == "city" else PROFESSIONS)
    # Each edit is asked for of both relations, so that none depends on one kind of answer.
    for action in ("modify_query", "correct_response"):
        ids = [r["id"] for r in data.requests if r["action"] == action]
        assert Counter(i.split("-")[1] for i in ids) == {"city": 2, "profession": 2}
    people = defaultdict(set)
    for request in data.requests:
        people[request["id"].split("-")[0]].add(request["action"])
    assert all(len(actions) == 1 for actions in people.values())


def test_facts_do_not_follow_from_names():
    # Guessing from somebody else of the same first or family name is right as often as by chance.
    people = make_directory(num_people=800, num_heldout_people=0, seed=0).people
    for part in ("first", "family"):
        for relation in RELATIONS:
            groups = defaultdict(list)
            for person in people:
                groups[getattr(person, part)].append(person.answer(relation))
            pairs = [(a, b) for g in groups.values() for i, a in enumerate(g) for b in g[:i]]
            agreeing = sum(a == b for a, b in pairs)
            expected = len(pairs) / 32
            assert len(pairs) > 2000
            assert abs(agreeing - expected) < 4 * math.sqrt(expected)
    for choices, relation in ((CITIES, "city"), (PROFESSIONS, "profession")):
        counts = Counter(person.answer(relation) for person in people)
        assert len(counts) == len(choices) == 32
        chi_squared = sum((count - 25) ** 2 / 25 for count in counts.values())
        assert chi_squared < 61.1  # 31 degrees of freedom: exceeded with probability 0.001


def test_a_quarter_of_the_names_is_reserved_and_all_parts_occur_on_both_sides():
    reserved = [(a, b) for a in FIRST_NAMES for b in FAMILY_NAMES if is_directory_name(a, b)]
    assert len(reserved) == len(FIRST_NAMES) * len(FAMILY_NAMES) // 4
    others = [(a, b) for a in FIRST_NAMES for b in FAMILY_NAMES if not is_directory_name(a, b)]
    for pairs in (reserved, others):
        assert {a for a, _ in pairs} == set(FIRST_NAMES) and {b for _, b in pairs} == set(FAMILY_NAMES)
    assert all(is_directory_name(*first_and_family(p.name)) for p in make_directory().people)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_people": 10}, "num_people is 10, but the requests name 10 people"),
        ({"num_people": 2000}, "there are 1152 names"),
        ({"num_modified": -1}, "num_modified is -1"),
    ],
)
def test_impossible_directories_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_directory(**arguments)


def test_unknown_relation_is_refused():
    with pytest.raises(ValueError, match="relation is 'age'; expected one of city, profession"):
        question_about("Mira Valen", "age")


def test_written_rows_have_the_columns_of_question_answer_data(tmp_path):
    write_demo_files(tmp_path, make_directory(num_people=12))
    for name in ("train.jsonl", "heldout.jsonl", "unseen.jsonl"):
        for line in (tmp_path / name).read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) == {"id", "question", "answer"}


def test_pretraining_text_never_names_a_directory_person():
    source, rng = TextSource(num_acquaintances=64, seed=0), np.random.default_rng(0)
    reserved = {f"{a} {b}" for a in FIRST_NAMES for b in FAMILY_NAMES if is_directory_name(a, b)}
    for _ in range(3000):
        document = source.draw(rng)
        words = f"{document.question} {document.text}".replace(".", "").replace("?", "").split()
        assert not {" ".join(pair) for pair in itertools.pairwise(words)} & reserved


def test_acquaintances_keep_their_facts_and_strangers_do_not():
    source, rng = TextSource(num_acquaintances=4, seed=0), np.random.default_rng(0)
    answers = defaultdict(set)
    strangers = []
    for _ in range(4000):
        document = source.draw(rng)
        if document.kind == "acquaintance":
            answers[document.question].add(document.text)
        elif document.kind == "stranger":
            strangers.append(document)
    assert len(answers) == 8 and all(len(found) == 1 for found in answers.values())
    facts = {question_about(p.name, r): p.answer(r) for p in source.acquaintances for r in RELATIONS}
    assert {question: found.pop() for question, found in answers.items()} == facts
    assert not {document.question for document in strangers} & facts.keys()
    assert len({document.text for document in strangers}) == 64


def test_document_nats_are_minus_log_of_observed_frequencies():
    # With two acquaintances the questions about them and the general facts recur often enough to be counted.
    source, rng = TextSource(num_acquaintances=2, seed=0), np.random.default_rng(1)
    draws = [source.draw(rng) for _ in range(40000)]
    counts = Counter(draws)
    recurring = {d: c for d, c in counts.items() if d.kind in ("acquaintance", "general")}
    assert len(recurring) == 4 + 64
    for document, count in recurring.items():
        expected = len(draws) * math.exp(-document.nats)
        assert abs(count - expected) < 5 * math.sqrt(expected)
    kinds = Counter(d.kind for d in draws)
    assert kinds["stranger"] / len(draws) == pytest.approx(0.25, abs=0.02)
    stranger = next(d for d in draws if d.kind == "stranger")
    num_strangers = len(FIRST_NAMES) * len(FAMILY_NAMES) * 3 // 4 - 2
    assert stranger.nats == pytest.approx(-math.log(0.25) + math.log(num_strangers * 2 * 32))
    assert stranger.answer_nats == pytest.approx(math.log(32))
    acquaintance = next(d for d in draws if d.kind == "acquaintance")
    assert acquaintance.answer_nats == 0.0


@pytest.mark.parametrize("count", [0, 3456])
def test_impossible_numbers_of_acquaintances_are_refused(count):
    with pytest.raises(ValueError, match=f"num_acquaintances is {count}"):
        TextSource(num_acquaintances=count)
