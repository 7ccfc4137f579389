"""Scores and generated titles against the library's own scoring and generation, one candidate at a time."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.llara import hybrid, scoring
from experiments.llara.prepare import Question, item_text, make_example
from experiments.llara.scoring import HIT_RATIO_GENERATED, HIT_RATIO_OF_VALID, Scorer, match_answers
from llmeraser_jax import trees
from llmeraser_jax.data import Recipe, encode_examples
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import ModelConfig, layers, load_model
from llmeraser_jax.models.decoder import ApplyDecoder, init_base
from llmeraser_jax.models.generation import pad_left
from llmeraser_jax.rivals import ensemble_model, make_ensemble
from tests.training import tiny

# Words are split at white space, so a title's line break is no token here.
RECIPE = Recipe(template="{instruction}", response_prefix=" ", add_eos=True, max_length=32)
TITLES = ("red", "blue now", "green s1 s2", "grey")
LORA = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"))


def _questions(suffixes):
    """Prompts of several lengths, the right answer at another place in each."""
    return [
        Question(
            example=make_example(f"q{k}", f"colour of {'now ' * k}s{k}{suffix}", TITLES[k % 4]),
            titles=TITLES[k % 3 :] + TITLES[: k % 3],
        )
        for k, suffix in enumerate(suffixes)
    ]


@pytest.fixture(scope="module", params=["text", "hybrid"])
def setting(request, tmp_path_factory):
    model = load_model(tiny.save_tiny_model(tmp_path_factory.mktemp("base") / "model", seed=4))
    suffixes = ["", "", "", "", ""]
    if request.param == "hybrid":
        table = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
        model = hybrid.make_hybrid(model, table)
        suffixes = [f" {item_text(k)} of {item_text(0)}" for k in range(5)]
    fresh = model.init_lora(jax.random.key(1), LORA)
    lora = trees.tree_axpy(0.3, trees.tree_random_normal(jax.random.key(2), fresh), fresh)
    questions = _questions(suffixes)
    like = encode_examples([q.example for q in questions], RECIPE, model.tokenizer)
    return model, lora, questions, like


def _one_by_one(model, lora, questions):
    """Every title as the response of an example of its own."""
    out = []
    for question in questions:
        examples = [
            dataclasses.replace(question.example, id=str(k), response=title + "\n")
            for k, title in enumerate(question.titles)
        ]
        out.append(score_examples(model, lora, encode_examples(examples, RECIPE, model.tokenizer)))
    return out


def test_scores_are_the_log_probabilities_of_whole_responses(setting):
    model, lora, questions, like = setting
    expected = _one_by_one(model, lora, questions)
    got = Scorer(model, questions, like, batch_size=2).candidate_scores(lora)
    np.testing.assert_allclose(got, [scores.log_probs for scores in expected], atol=1e-4)
    assert got.std() > 0.1


@pytest.mark.parametrize(("window", "num_kv_heads"), [(None, 4), (7, 2), (3, 1)])
@pytest.mark.parametrize("block", [5, 128])
def test_packed_titles_do_not_see_each_other(window, num_kv_heads, block, monkeypatch):
    """Against a plain pass over prompt and title, for titles of 1 to 9 tokens that share their beginnings."""
    monkeypatch.setattr(scoring, "_PROMPT_BLOCK", block)
    monkeypatch.setattr(layers, "CHUNK_QUERIES_ABOVE", 16)
    monkeypatch.setattr(layers, "QUERY_CHUNK", 6)
    jax.clear_caches()
    config = ModelConfig(
        vocab_size=50,
        width=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        mlp_width=24,
        max_position=128,
        sliding_window=window,
        model_type="llama" if window is None else "mistral",
        initializer_range=0.3,
    )
    base = init_base(config, jax.random.key(0))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 50, size).tolist() for size in (3, 11, 33)]
    stem = rng.integers(1, 50, 9)
    titles = [
        [rng.permutation(stem)[:size] if size % 2 else stem[:size] for size in (9, 1, 4, 2, 6)] for _ in prompts
    ]
    apply = ApplyDecoder(config)
    tokens, mask = pad_left(prompts)
    got = scoring._candidate_log_probs(apply, base, None, tokens, mask, scoring._pack(titles))
    texts = [np.array([*prompt, *title]) for prompt, of in zip(prompts, titles, strict=True) for title in of]
    rows, real = np.zeros((15, 42), np.int32), np.zeros((15, 42), np.int32)
    for row, text in enumerate(texts):
        rows[row, : len(text)], real[row, : len(text)] = text, 1
    log_probs = np.asarray(jax.nn.log_softmax(jax.jit(apply)(base, None, rows, real)))
    expected = np.zeros((3, 5))
    for k, prompt in enumerate(prompts):
        for c, title in enumerate(titles[k]):
            places = len(prompt) - 1 + np.arange(len(title))
            expected[k, c] = log_probs[5 * k + c, places, title].sum()
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4)
    jax.clear_caches()


def test_an_ensembles_scores_are_those_of_its_mean_prediction(setting):
    model, lora, questions, like = setting
    other = trees.tree_axpy(0.4, trees.tree_random_normal(jax.random.key(5), lora), lora)
    ensemble = make_ensemble([lora, other])
    expected = [scores.log_probs for scores in _one_by_one(ensemble_model(model), ensemble, questions)]
    got = Scorer(model, questions, like, batch_size=2).candidate_scores(ensemble)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert not np.allclose(got, Scorer(model, questions, like).candidate_scores(lora), atol=1e-2)
    with pytest.raises(ValueError, match="under 'probabilities' only"):
        Scorer(model, questions, like).candidate_scores(
            dataclasses.replace(ensemble, aggregation="log-probabilities")
        )


def test_the_most_probable_title_is_the_answer(setting):
    model, lora, questions, like = setting
    scorer = Scorer(model, questions, like, batch_size=5)
    chosen = scorer.candidate_scores(lora).argmax(1)
    expected = [question.titles.index(question.example.response.strip()) for question in questions]
    metric = scorer.scored_metric(lora)
    assert metric.correct == sum(c == e for c, e in zip(chosen.tolist(), expected, strict=True))
    assert (metric.valid, metric.total) == (5, 5)


def test_counts_of_generated_titles():
    questions = _questions([""] * 4)  # right: red, blue now, green s1 s2, grey
    hit_ratio, of_valid = match_answers([" red\nblue", "GREY.", "red or grey", "grey"], questions)
    assert (hit_ratio.name, hit_ratio.correct, hit_ratio.valid, hit_ratio.total) == (HIT_RATIO_GENERATED, 2, 3, 4)
    assert hit_ratio.value == 0.5
    assert hit_ratio.valid_ratio == 0.75
    assert (of_valid.name, of_valid.value) == (HIT_RATIO_OF_VALID, pytest.approx(2 / 3))


def test_a_question_whose_answer_is_no_title_is_refused():
    with pytest.raises(ValueError, match="must be one of its titles, once"):
        Question(example=make_example("q", "colour of s1", "black"), titles=TITLES)


def test_a_tokenization_that_depends_on_the_prompt_is_refused(setting):
    model, _, questions, _ = setting
    joint = dataclasses.replace(RECIPE, tokenization="joint")
    like = encode_examples([q.example for q in questions], joint, model.tokenizer)
    with pytest.raises(ValueError, match="tokenization is 'joint'"):
        Scorer(model, questions, like)
