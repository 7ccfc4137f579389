"""A run is erased from with the tokens that it was trained on, or refused with the example named."""

# The fixtures that a test takes are imported, and so redefined by its arguments.
# ruff: noqa: F811

import copy
import dataclasses
import datetime
import hashlib
import json
import shutil
import types

import numpy as np
import pytest

from llmeraser_jax import data, runs
from llmeraser_jax.data import templates
from llmeraser_jax.training.adopt import adopt
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.unlearning import make_problem
from tests.test_runs import write
from tests.training import tiny
from tests.training.conftest import data_path, finished_run, model, model_path  # noqa: F401
from tests.training.test_adopt import RECIPE, write_toml

# Ends every turn with the month as a word: s1 to s11 are in the vocabulary.
DATED = "{% for m in messages %}{{ m.content }} s{{ strftime_now('%-m') }} {% endfor %}"


def with_template(model, template):
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(model, tokenizer=tokenizer)


def tokenizer_with(words):
    """The tiny tokenizer with words in other places."""
    tokenizer = tiny.word_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {word: k for k, word in enumerate(words)}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return tokenizer


def on(monkeypatch, year, month, day):
    """Lets the package believe that it is another day."""

    class Date(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date(year, month, day)

    monkeypatch.setattr(templates, "datetime", types.SimpleNamespace(date=Date))


@pytest.fixture
def messages_path(tmp_path):
    rows = [
        {"id": row["id"], "messages": [
            {"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}
        ]}
        for row in tiny.rows()
    ]  # fmt: skip
    return tiny.write_rows(tmp_path / "messages.jsonl", rows)


def test_a_run_records_a_hash_of_the_tokens_and_mask_of_every_row(finished_run, model):
    dataset = finished_run.encode(finished_run.load_examples(), model.tokenizer)
    row = dataset.encoded[3]
    mask = np.arange(len(row.tokens)) >= row.response_start
    expected = hashlib.sha256(row.tokens.astype("<i4").tobytes() + np.packbits(mask).tobytes()).hexdigest()
    assert row.sha256 == expected
    assert finished_run.keys is not None and finished_run.token_hashes is not None
    assert finished_run.token_hashes == tuple(finished_run.keys.tokens(e.sha256) for e in dataset.encoded)


def test_one_other_token_is_refused_with_the_row_named(finished_run):
    examples = finished_run.load_examples()
    other = tokenizer_with([{"red": "blue", "blue": "red"}.get(word, word) for word in tiny.WORDS])
    with pytest.raises(runs.RunError, match=r"6 of 10 examples do not become the tokens .*: 'r0', 'r1', 'r4'"):
        finished_run.encode(examples, other)
    with pytest.raises(runs.RunError, match=r"1 of 1 examples .*: 'r1'\. Tokenizer, chat template or date"):
        finished_run.encode(examples[1:3:2], other)
    # Rows that were not trained on have no tokens to be compared with.
    edited = dataclasses.replace(examples[1], response="grey")
    assert finished_run.encode([edited], other).ids == ("r1",)


def test_a_run_without_hashes_loads_and_says_that_nothing_is_checked(tmp_path, finished_run, model, caplog):
    shutil.copytree(finished_run.path, tmp_path / "old")
    recorded = json.loads((tmp_path / "old" / "run.json").read_text())
    recorded["data"]["tokens"] = None
    del recorded["recipe"]["truncate"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(recorded))
    old = runs.load_run(tmp_path / "old")
    assert old.token_hashes is None and old.recipe.truncate == "prompt"
    assert len(old.encode(old.load_examples(), model.tokenizer)) == 10
    assert "records no token hashes" in caplog.text


def test_a_row_that_was_dropped_in_training_has_no_hash_and_stays_dropped(tmp_path, model, data_path):
    recipe = dataclasses.replace(tiny.RECIPE, max_length=5, truncation_side="right")
    examples = data.load_examples(data_path)
    dataset = data.encode_examples(examples, recipe, model.tokenizer)
    run = write(tmp_path / "run", model, examples, recipe=dataset.recipe, dataset=dataset)
    assert run.token_hashes is not None
    dropped = [k for k, digest in enumerate(run.token_hashes) if digest is None]
    assert dropped == [0, 3, 6, 9]  # those with an input
    assert run.encode(run.load_examples(), model.tokenizer).dropped_ids == ("r0", "r3", "r6", "r9")


def test_a_dropped_row_cannot_be_erased_and_an_edit_may_not_drop_its_row(model, data_path):
    recipe = dataclasses.replace(tiny.RECIPE, max_length=5, truncation_side="right")
    examples = data.load_examples(data_path)
    dataset = data.encode_examples(examples, recipe, model.tokenizer)
    requests = data.parse_requests([{"id": "r3", "action": "remove"}], examples)
    with pytest.raises(ValueError, match="Example 'r3' was dropped: within max_length = 5"):
        make_problem(model, dataset, requests)
    longer = {"id": "r1", "action": "modify_query", "query": "colour of s1 now"}
    with pytest.raises(ValueError, match="The changed example 'r1' has no token under the loss within max_length"):
        make_problem(model, dataset, data.parse_requests([longer], examples))


def test_a_dated_template_is_told_the_day_of_training_again(tmp_path, model, messages_path, monkeypatch):
    dated = with_template(model, DATED)
    config = dataclasses.replace(tiny.CONFIG, epochs=1)
    on(monkeypatch, 2026, 3, 14)
    run = finetune_run(dated, messages_path, tmp_path / "run", lora=tiny.LORA, config=config)
    assert run.recipe.date == "2026-03-14"
    on(monkeypatch, 2026, 4, 2)
    tokens = run.encode(run.load_examples(), dated.tokenizer).encoded[0].tokens
    assert tokens.tolist() == dated.tokenizer("colour of s0 s3 red s3", add_special_tokens=False)["input_ids"]
    # Started again on another day it is the same training.
    assert finetune_run(dated, messages_path, tmp_path / "run", lora=tiny.LORA, config=config) == run
    undated = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, date="2026-04-02"))
    with pytest.raises(runs.RunError, match="10 of 10 examples do not become the tokens"):
        undated.encode(run.load_examples(), dated.tokenizer)


def test_adopting_under_a_dated_template_asks_for_the_date(tmp_path, model, messages_path, finished_run):
    recipe = {k: v for k, v in RECIPE.items() if k not in ("add_bos", "add_eos")} | {"template": "chat"}
    path = write_toml(tmp_path / "recipe.toml", recipe)
    dated, adapter = with_template(model, DATED), finished_run.path / "adapter"
    with pytest.raises(ValueError, match=r'does not state the one it wrote in training; add date = "YYYY-MM-DD"'):
        adopt(dated, adapter, messages_path, path, tmp_path / "run", force=True)
    write_toml(path, {**recipe, "date": "2026-02-28"})
    run = adopt(dated, adapter, messages_path, path, tmp_path / "run", force=True)
    tokens = run.encode(run.load_examples(), dated.tokenizer).encoded[0].tokens
    assert tokens.tolist() == dated.tokenizer("colour of s0 s2 red s2", add_special_tokens=False)["input_ids"]


def test_the_tokenizer_beside_the_adapter_is_the_one_of_the_run_and_of_runs_derived_from_it(
    tmp_path, model, model_path, data_path, finished_run
):
    adapter = tmp_path / "adapter"
    shutil.copytree(finished_run.path / "adapter", adapter)
    other = tokenizer_with([*tiny.WORDS[:4], *tiny.WORDS[:3:-1]])
    other.save_pretrained(adapter)
    recipe = write_toml(tmp_path / "recipe.toml", RECIPE)
    run = adopt(model, adapter, data_path, recipe, tmp_path / "run", force=True)
    shutil.rmtree(adapter)
    examples = run.load_examples()
    row = run.encode(examples, model.tokenizer).encoded[0]
    assert row.tokens.tolist() == [1, *other("colour of s0 now red", add_special_tokens=False)["input_ids"], 2]
    loaded = run.load_model()
    assert loaded.tokenizer.get_vocab() == other.get_vocab()
    run.verify_model(loaded)
    with pytest.raises(runs.RunError, match="has a tokenizer of its own, and the model given"):
        run.verify_model(model)
    derived = write(tmp_path / "derived", loaded, examples[:3], recipe=run.recipe)
    assert derived.encode(examples[:3], model.tokenizer).encoded[0].sha256 == row.sha256


def test_a_template_beside_the_adapter_goes_before_the_bases(tmp_path, model, messages_path, finished_run):
    adapter = tmp_path / "adapter"
    shutil.copytree(finished_run.path / "adapter", adapter)
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}now {{ m.content }} {% endfor %}")
    stated = {k: v for k, v in RECIPE.items() if k not in ("add_bos", "add_eos")} | {"template": "chat"}
    path = write_toml(tmp_path / "recipe.toml", stated)
    run = adopt(with_template(model, DATED), adapter, messages_path, path, tmp_path / "run", force=True)
    row = run.encode(run.load_examples(), model.tokenizer).encoded[0]
    assert model.tokenizer.decode(row.tokens) == "now colour of s0 now red"
