"""The base model that the demo ships: its files, its tokenizer, and what it knows and cannot know."""

import math
from pathlib import Path

import numpy as np
import pytest

import llmeraser_jax.demo
from experiments.pretrain_demo_base.main import PretrainConfig, make_source
from llmeraser_jax.data import Example, Recipe, encode_examples, load_examples
from llmeraser_jax.demo import general_facts, write_demo_files
from llmeraser_jax.demo.people import CITIES, PROFESSIONS
from llmeraser_jax.losses import example_losses, lm_objective
from llmeraser_jax.models import generate, load_model

BASE = Path(llmeraser_jax.demo.__file__).parent / "base"
RECIPE = Recipe(template="qa", add_bos=True)


@pytest.fixture(scope="module")
def model():
    return load_model(BASE)


def answers_to(model, examples):
    dataset = encode_examples(examples, RECIPE, model.tokenizer)
    tokens = generate(model, None, [row.prompt.tolist() for row in dataset.encoded], max_new_tokens=8)
    return [model.tokenizer.decode(row) for row in tokens]


def summed_losses(model, examples):
    dataset = encode_examples(examples, RECIPE, model.tokenizer)
    stack = dataset.stack(np.arange(len(dataset)), np.ones(len(dataset)), chunk_size=32)
    per_token = example_losses(lm_objective(model.apply, model.base, l2=0.0), None, stack)
    assert len(stack.batches) == 1  # one bucket, so that losses come in the order of the examples
    return per_token * np.array([len(row.response) for row in dataset.encoded])


def test_checkpoint_is_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in BASE.iterdir() if path.is_file()}
    needed = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed <= sizes.keys()
    assert sum(sizes.values()) < 4_000_000


def test_tokenizer_loads_by_transformers_and_is_lossless():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(BASE))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert len(tokenizer) <= 1024
    text = "Question: Where does Zoë Ünal live?\nAnswer: 東京."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_all_rows_share_one_bucket_of_at_most_32_tokens(model, tmp_path):
    write_demo_files(tmp_path)
    rows = [*load_examples(tmp_path / "train.jsonl"), *load_examples(tmp_path / "heldout.jsonl")]
    dataset = encode_examples(rows, RECIPE, model.tokenizer)
    assert dataset.recipe.template == "qa"
    (bucket,) = dataset.buckets
    assert bucket.time <= 32


def test_general_facts_are_known(model):
    facts = general_facts()
    examples = [Example(id=f.id, instruction=f.question, response=f.answer, format="question") for f in facts]
    assert answers_to(model, examples) == [f" {fact.answer}" for fact in facts]


def test_unknown_people_get_an_answer_of_the_right_kind(model, tmp_path):
    write_demo_files(tmp_path)
    rows = load_examples(tmp_path / "train.jsonl")
    for row, answer in zip(rows, answers_to(model, rows), strict=True):
        allowed = CITIES if row.id.endswith("city") else PROFESSIONS
        assert answer in {f" {choice}." for choice in allowed}


def test_unknown_people_cost_a_guess_among_32(model, tmp_path):
    write_demo_files(tmp_path)
    losses = summed_losses(model, load_examples(tmp_path / "train.jsonl"))
    # A guess costs ln 32; the slack is what the base is away from the floor and what 120 rows scatter.
    assert losses.mean() == pytest.approx(math.log(32), abs=0.15)
    assert losses.min() > 2.0


def test_acquaintances_are_known_and_strangers_cost_a_guess(model, tmp_path):
    # The text of the committed configuration, drawn with a seed that training did not use.
    source, rng = make_source(PretrainConfig(out=tmp_path)), np.random.default_rng(11)
    documents = [source.draw(rng) for _ in range(1500)]
    for kind, floor, slack in (("acquaintance", 0.0, 0.03), ("stranger", math.log(32), 0.1)):
        examples = [
            Example(id=str(i), instruction=d.question, response=d.text, format="question")
            for i, d in enumerate(documents)
            if d.kind == kind
        ]
        assert len(examples) > 300
        assert summed_losses(model, examples).mean() == pytest.approx(floor, abs=slack)
