"""The script that makes the shipped base: its encoding, its floors, and that it learns and writes a checkpoint."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.pretrain_demo_base.main import (
    PretrainConfig,
    encode,
    main,
    make_source,
    make_tokenizer,
    measure,
)
from llmeraser_jax.demo import Document
from llmeraser_jax.models import ApplyDecoder, ModelConfig, init_base, load_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return PretrainConfig(
        out=tmp_path_factory.mktemp("pretrain") / "base",
        num_acquaintances=4,
        num_steps=40,
        batch_size=16,
        warmup_steps=5,
        learning_rate=1e-2,
        width=16,
        mlp_width=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        num_heldout=64,
        num_tokenizer_documents=500,
    )


@pytest.fixture(scope="module")
def documents(config):
    rng = np.random.default_rng(0)
    return [make_source(config).draw(rng) for _ in range(64)]


def test_questions_are_encoded_as_fine_tuning_does_and_statements_whole(documents):
    tokenizer = make_tokenizer(documents, 400)
    asked = Document(kind="general", question="Which country is Torvik in?", text="Norland.", nats=1.0)
    stated = Document(kind="statement", question="", text="The baker Ada Bara lives in Torvik.", nats=1.0)
    text = encode([asked, stated], tokenizer, 64)
    rows = [tokenizer.decode(text.tokens[i][text.mask[i]]) for i in (0, 1)]
    assert rows[0] == "<s>Question: Which country is Torvik in?\nAnswer: Norland.</s>"
    assert rows[1] == "<s>The baker Ada Bara lives in Torvik.</s>"
    assert tokenizer.decode(text.tokens[0][text.is_answer[0]]) == " Norland.</s>"
    assert not text.is_answer[1].any()
    with pytest.raises(ValueError, match="tokens, but rows have 5"):
        encode([asked], tokenizer, 5)


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary_per_token(documents):
    tokenizer = make_tokenizer(documents, 400)
    shape = ModelConfig(
        vocab_size=len(tokenizer),
        width=8,
        mlp_width=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        tied_embeddings=True,
    )
    base = jax.tree.map(np.zeros_like, init_base(shape, jax.random.key(0)))
    text = encode(documents, tokenizer)
    scores = measure(ApplyDecoder(shape), base, documents, text)
    per_token = np.log(len(tokenizer))
    assert scores.loss == pytest.approx(per_token * (text.mask.sum(axis=1) - 1).mean(), rel=1e-5)
    assert scores.floor == pytest.approx(np.mean([document.nats for document in documents]))
    strangers = [i for i, document in enumerate(documents) if document.kind == "stranger"]
    num_answer = text.is_answer[strangers].sum(axis=1).mean()
    assert scores.answer_loss["stranger"] == pytest.approx(per_token * num_answer, rel=1e-5)
    assert scores.answer_floor["stranger"] == pytest.approx(np.log(32))
    assert scores.answer_floor["acquaintance"] == scores.answer_floor["general"] == 0.0
    assert "statement" not in scores.answer_loss


def test_training_lowers_the_loss_and_writes_a_loadable_checkpoint_with_its_card(config, documents):
    main(config)
    model = load_model(config.out)
    text = encode(documents, model.tokenizer)
    trained = measure(model.apply, model.base, documents, text)
    fresh = measure(model.apply, init_base(model.config, jax.random.key(0)), documents, text)
    assert trained.floor < trained.loss < 0.6 * fresh.loss
    card = (config.out / "README.md").read_text(encoding="utf-8")
    assert "40 steps of 16 documents" in card and "apache-2.0" in card
    with pytest.raises(FileExistsError):
        main(dataclasses.replace(config, num_steps=20, warmup_steps=2))


def test_impossible_configurations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="width is 90; it must be a multiple of num_heads = 4"):
        PretrainConfig(out=tmp_path, width=90)
    with pytest.raises(ValueError, match="warmup_steps = 100 and decay_share"):
        PretrainConfig(out=tmp_path, num_steps=100)
