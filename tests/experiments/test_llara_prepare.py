"""Rows, candidates and requests of LLaRA's task, on eight users who each watched thirteen of forty films."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.llara import prepare as prompts
from experiments.llara.data import Corpus, Row
from experiments.llara.prepare import (
    SCENARIOS,
    Draws,
    choose_interactions,
    draw_candidates,
    prepare,
    split_by_user,
    write_prepared,
)
from llmeraser_jax.data import Action, apply_requests, load_examples, load_requests

NUM_ITEMS = 40
TITLES = {k: f"Film {chr(65 + k // 26)}{chr(65 + k % 26)}" for k in range(NUM_ITEMS)}


def _make_corpus() -> Corpus:
    rng = np.random.default_rng(0)
    train = []
    for user in range(8):
        items = rng.permutation(NUM_ITEMS)[:13].tolist()
        train += [
            Row(id=f"{user}-{k}", user=str(user), history=tuple(items[max(0, k - 10) : k]), target=items[k])
            for k in range(3, 13)
        ]
    last = Row(id="val-0", user="", history=(1, 2, 3), target=4)
    return Corpus(
        domain="movie",
        titles=TITLES,
        train=tuple(train),
        val=(last,),
        test=(dataclasses.replace(last, id="test-0"),),
    )


CORPUS = _make_corpus()
CONFIG = Draws(num_rows=24, rows_per_user=6, num_heldout=6, heldout_rows_per_user=3, num_candidates=8, template=0)


def _history_titles(prompt: str) -> list[str]:
    """The titles before the candidates begin, read back from the text alone."""
    return prompt.removeprefix("This user has watched ").split(" in the previous")[0].split(", ")


def test_no_user_is_both_trained_on_and_held_out():
    train, outside = split_by_user(CORPUS.train, CONFIG)
    assert len(train) == 24
    assert len(outside) == 6
    assert not {row.user for row in train} & {row.user for row in outside}


def test_all_rows_of_the_other_users_are_taken_where_no_number_is_given():
    train, outside = split_by_user(CORPUS.train, dataclasses.replace(CONFIG, num_rows=None))
    assert len(train) == 10 * (8 - len({row.user for row in outside}))


def test_rows_without_a_user_cannot_be_held_out():
    with pytest.raises(ValueError, match="do not say whose they are"):
        split_by_user(CORPUS.val, CONFIG)


def test_candidates_hold_the_target_once_and_nothing_of_the_history():
    positions = []
    for row in CORPUS.train:
        candidates = draw_candidates(row, TITLES, 20, 0)
        assert len(set(candidates)) == 20
        assert not set(candidates) & set(row.history)
        positions.append(candidates.index(row.target))
    assert len(set(positions)) > 10  # the place of the target tells nothing


def test_candidates_depend_on_seed_and_row_alone():
    row = CORPUS.train[5]
    alone = draw_candidates(row, TITLES, 8, 3)
    draw_candidates(CORPUS.train[0], TITLES, 8, 3)
    assert draw_candidates(row, TITLES, 8, 3) == alone
    assert draw_candidates(row, TITLES, 8, 4) != alone


def test_no_title_is_a_candidate_twice():
    titles = {**TITLES, 38: "film aa", 39: "FILM AA"}  # three items of one title
    for seed in range(20):
        row = Row(id=str(seed), user="u", history=(3,), target=5)
        chosen = [titles[item].casefold() for item in draw_candidates(row, titles, 37, seed)]
        assert len(set(chosen)) == 37


def test_too_few_items_are_an_error():
    with pytest.raises(ValueError, match="only 37 of 39 candidates"):
        draw_candidates(Row(id="a", user="u", history=(0, 1, 2), target=3), TITLES, 39, 0)


def test_interactions_are_a_share_of_pairs_and_empty_no_history():
    rows = [Row(id=str(k), user="u", history=(k, 20), target=30) for k in range(10)]
    chosen = choose_interactions(rows, 0.9, 0)
    assert len(chosen) == round(0.9 * 11)
    for row in rows:
        assert any((row.user, item) not in chosen for item in row.history)
    with pytest.raises(ValueError, match="without emptying a history"):
        choose_interactions([Row(id="a", user="u", history=(1,), target=2)], 0.5, 0)


def test_query_removal_takes_an_interaction_out_of_every_history_and_nothing_else():
    prepared = prepare(CORPUS, "query-removal", CONFIG)
    wanted = {e.id: e for e in apply_requests(prepared.train, prepared.requests)}
    rows = {row.id: row for row in CORPUS.train}
    gone, kept = set(), set()
    for example in prepared.train:
        row = rows[example.id]
        before, after = _history_titles(example.instruction), _history_titles(wanted[example.id].instruction)
        assert before == [TITLES[item] for item in row.history]
        assert after == [title for title in before if title in after]
        gone |= {(row.user, title) for title in before if title not in after}
        kept |= {(row.user, title) for title in after}
        # Candidates and sentence stay.
        assert example.instruction.split(": ")[-1] == wanted[example.id].instruction.split(": ")[-1]
    assert not gone & kept
    assert len(gone) == prepared.counts["interactions"] == round(0.1 * len(gone | kept))
    assert {r.action for r in prepared.requests} == {Action.MODIFY_QUERY}


def test_query_replacement_restores_the_true_history():
    # Many items, so that what comes in is seldom among a row's own.
    corpus = dataclasses.replace(CORPUS, titles={k: f"Film {k}" for k in range(400)})
    config = dataclasses.replace(CONFIG, replaced_interactions=0.2)
    prepared = prepare(corpus, "query-replacement", config)
    true = {e.id: e for e in prepare(corpus, "query-removal", config).train}
    restored = apply_requests(prepared.train, prepared.requests)
    assert [true[e.id] for e in restored] == list(restored)
    named = {r.id for r in prepared.requests}
    replaced_by = {}
    for noisy, clean in zip(prepared.train, restored, strict=True):
        assert (noisy != clean) == (noisy.id in named)
        before, after = _history_titles(noisy.instruction), _history_titles(clean.instruction)
        assert len(before) == len(after) == len(set(before))
        candidates = noisy.instruction.split(": ")[1].removesuffix(". Answer")
        for b, a in zip(before, after, strict=True):
            if a != b:
                assert b not in candidates.split(", ")
                replaced_by.setdefault((noisy.id.split("-")[0], a), []).append(b)
    assert len(replaced_by) == prepared.counts["interactions"]
    shared = [noise for noise in replaced_by.values() if len(noise) > 1]
    assert len(shared) >= 5
    assert np.mean([len(set(noise)) == 1 for noise in shared]) > 0.5  # wrong in one way, but for such clashes


def test_flipped_targets_are_other_candidates_and_corrections_restore_them():
    prepared = prepare(CORPUS, "correction", CONFIG)
    true = {e.id: e for e in prepare(CORPUS, "query-removal", CONFIG).train}
    named = {r.id for r in prepared.requests}
    assert len(named) == round(0.1 * 24)
    for example in prepared.train:
        assert (example.response != true[example.id].response) == (example.id in named)
        assert example.response.strip() in example.instruction
        assert example.response.strip() not in _history_titles(example.instruction)
    assert apply_requests(prepared.train, prepared.requests) == tuple(true[e.id] for e in prepared.train)


def test_removal_names_all_rows_of_whole_users():
    prepared = prepare(CORPUS, "removal", CONFIG)
    named = {r.id for r in prepared.requests}
    users_gone = {user for e, user in zip(prepared.train, prepared.users, strict=True) if e.id in named}
    expected = {e.id for e, user in zip(prepared.train, prepared.users, strict=True) if user in users_gone}
    assert named == expected
    assert 0 < len(named) < 24


def test_a_shorter_history_changes_no_candidate():
    long = prepare(CORPUS, "removal", CONFIG)
    short = prepare(CORPUS, "removal", dataclasses.replace(CONFIG, max_history=2))
    for a, b in zip(long.questions["held-out"], short.questions["held-out"], strict=True):
        assert a.titles == b.titles
        assert _history_titles(b.example.instruction) == _history_titles(a.example.instruction)[-2:]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_is_written_as_files_that_the_library_reads(tmp_path, scenario):
    prepared = prepare(CORPUS, scenario, CONFIG)
    write_prepared(tmp_path, prepared)
    examples = load_examples(tmp_path / "train.jsonl")
    assert examples == prepared.train
    read = load_requests(tmp_path / "requests.jsonl", examples)
    assert apply_requests(examples, read) == apply_requests(prepared.train, prepared.requests)
    rows = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    assert [row["titles"] for row in rows] == [list(q.titles) for q in prepared.questions["held-out"]]
    assert [row["user"] for row in map(json.loads, (tmp_path / "train.jsonl").open())] == list(prepared.users)
    assert prepare(CORPUS, scenario, CONFIG) == prepared


def test_prompts_are_llaras_sentences():
    prompt = prompts.make_prompt(prompts.TEMPLATES["movie"][0], {0: "Heat", 1: "Big", 2: "Up"}, (0, 1), (2, 1))
    assert prompt == (
        "This user has watched Heat, Big in the previous. Please predict the next movie this user will watch. "
        "Choose the answer from the following 2 movie titles: Up, Big. Answer:"
    )
    hybrid = prompts.make_prompt("{history}|{candidates}", {0: "Heat", 1: "Big"}, (0,), (1, 0), hybrid=True)
    assert hybrid == "Heat <|item_0|>|Big <|item_1|>, Heat <|item_0|>"


def test_each_row_draws_its_sentence_where_none_is_named():
    questions = prepare(CORPUS, "removal", dataclasses.replace(CONFIG, template=None)).questions["held-out"]
    ends = {question.example.instruction.split(" ")[-1] for question in questions}
    assert ends <= {"Answer:", "is:", "Recommendation:"}
    assert len(ends) > 1


@pytest.mark.parametrize(
    "changes", [{"removed_share": 0.0}, {"flipped_share": 1.0}, {"num_candidates": 1}, {"template": 3}]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(CONFIG, **changes)
