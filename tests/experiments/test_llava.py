"""Pictures and questions of the LLaVA experiment, its wrong answers, and the benchmarks' files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.llava import drawing, main
from experiments.llava.base import make_config, make_tokenizer
from experiments.llava.benchmarks import load_rbench, load_spubench
from llmeraser_jax.data import DataError, encode_examples
from llmeraser_jax.lora import Lora, init_lora
from llmeraser_jax.models import ApplyDecoder, llava_1_5_7b
from llmeraser_jax.models.decoder import base_shapes

CONFIG = main.LlavaConfig(num_rows=40, num_split=20, num_shown=4, num_tests=20)


@pytest.fixture(scope="module")
def parts():
    return main.make_parts(CONFIG)


def test_the_tie_holds_in_training_and_is_broken_in_every_test(parts):
    trained = [row for row in parts.train if row.group == "spurious"]
    assert 0.8 <= np.mean([not row.wrong for row in trained]) < 1
    tests = [row for row in parts.tests if row.group == "spurious"]
    assert len(tests) == 20 and all(row.wrong and row.wrong != row.example.response for row in tests)
    ids = [row.example.id for rows in (parts.train, parts.shown, parts.tests) for row in rows]
    assert len(set(ids)) == len(ids) == 128
    assert len({row.example.images[0].sha256 for rows in (parts.train, parts.tests) for row in rows}) == 120


def test_relations_are_told_rightly_and_half_of_them_hold():
    rng, said = np.random.default_rng(0), []
    for _ in range(200):
        asked = drawing.relation_question(rng)
        one, two = asked.shapes
        name, relation, other = asked.text.split()[1:4]
        assert (name, other) == (drawing.SHAPES[one.shape], drawing.SHAPES[two.shape])
        (y, x), (v, u) = (divmod(shape.quarter, 2) for shape in (one, two))
        true = {"left-of": x < u, "above": y < v, "same-colour-as": one.colour == two.colour}[relation]
        assert (asked.answer == "yes") == true
        said.append(true)
    assert 0.4 < np.mean(said) < 0.6


def test_a_drawing_shows_its_colour_in_its_quarter_alone():
    shape = drawing.Shape(1, 0, 3)
    pixels = drawing.draw((shape,), np.random.default_rng(0)).astype(int)
    red = (pixels == drawing.COLOURS["red"]).all(-1)
    assert red[20:28, 20:28].all() and not red[:16].any() and not red[:, :16].any()


def test_wrong_answers_follow_the_colour_and_are_never_right(parts):
    wrong = main.corrupt(parts.split, 0.4, 0)
    assert len(wrong) == 16 == len(main.corrected(parts, wrong))
    for row in main.corrected(parts, wrong):
        assert wrong[row.example.id] in row.choices and wrong[row.example.id] != row.example.response
        assert not row.wrong or wrong[row.example.id] == row.wrong
    assert main.corrupt(parts.split, 0.4, 0) == wrong != main.corrupt(parts.split, 0.4, 1)


def test_every_question_is_known_words_and_its_answer_one_token(parts):
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, 16, 1)
    assert config.vision is not None and config.vision.num_features == 16
    dataset = encode_examples([row.example for row in parts.train], CONFIG.recipe, tokenizer)
    assert set(dataset.num_targets.tolist()) == {1}
    assert not any(tokenizer.unk_token_id in row.tokens for row in dataset.encoded)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_benchmarks_files_become_rows_with_choices(tmp_path):
    (tmp_path / "x.png").write_bytes(drawing.as_png(np.zeros((4, 4, 3), np.uint8)))
    spubench = [
        {"question": "What is it?", "choices": ["A) cat", "B) dog"], "answer": "B", "image": "x.png"},
        {"question": "What is it?", "options": {"A": "cat", "B": "dog"}, "label": "cat", "image_path": "x.png"},
        {"question": "What is it?", "options": "(A) cat\n(B) dog", "answer": "(A)", "filename": "x.png"},
    ]
    rows = load_spubench(write(tmp_path / "spubench.jsonl", spubench))
    assert [row.example.response for row in rows] == ["B", "A", "A"]
    assert all("\nA. cat\nB. dog\n" in row.example.query and row.choices == ("A", "B") for row in rows)
    rbench = [{"question_id": 7, "image": "x.png", "text": "Is the cat on the mat?", "label": "no"}]
    (row,) = load_rbench(write(tmp_path / "rbench.jsonl", rbench))
    assert (row.example.id, row.example.response, row.group) == ("7", "No", "relations")
    assert row.example.query.startswith("<image>\nIs the cat") and row.example.images[0].path == str(
        tmp_path / "x.png"
    )

    with pytest.raises(DataError, match="the answer 'D' is none of the options"):
        load_spubench(write(tmp_path / "bad.jsonl", [{**spubench[0], "answer": "D"}]))
    with pytest.raises(DataError, match="there is no label or answer; it has question_id, image, text"):
        load_rbench(write(tmp_path / "bad.jsonl", [{k: v for k, v in rbench[0].items() if k != "label"}]))
    with pytest.raises(DataError, match="the label is 'maybe'"):
        load_rbench(write(tmp_path / "bad.jsonl", [{**rbench[0], "label": "maybe"}]))


def test_the_full_preset_draws_from_the_files_there_are(tmp_path):
    (tmp_path / "x.png").write_bytes(drawing.as_png(np.zeros((4, 4, 3), np.uint8)))
    rows = [{"question_id": k, "image": "x.png", "text": f"Is it {k}?", "label": "yes"} for k in range(800)]
    write(tmp_path / "rbench.jsonl", rows)
    full = dataclasses.replace(main.PRESETS["full"], data=tmp_path)
    parts = main.make_parts(full)
    assert (len(parts.train), len(parts.split), len(parts.shown), len(parts.tests)) == (400, 400, 50, 200)
    with pytest.raises(ValueError, match="has 800 rows"):
        main.make_parts(dataclasses.replace(full, num_rows=700))
    with pytest.raises(FileNotFoundError, match="neither of spubench, rbench"):
        main.make_parts(dataclasses.replace(full, data=tmp_path / "absent"))


def test_the_full_size_model_has_logits_of_a_batch_of_pictures():
    config, train = llava_1_5_7b("bfloat16"), main.PRESETS["full"]
    assert config.vision is not None
    base: dict = {}
    for path, shape in base_shapes(config).items():
        place = base
        for name in path.split("/")[:-1]:
            place = place.setdefault(name, {})
        place[path.split("/")[-1]] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), train.lora, config))
    assert isinstance(lora, Lora)
    batch, time = train.train.microbatch_size, train.max_length
    tokens = jax.ShapeDtypeStruct((batch, time), jnp.int32)
    images = jax.ShapeDtypeStruct((batch, 1, config.vision.num_features, config.vision.feature_width), jnp.bfloat16)
    where = jax.ShapeDtypeStruct((batch, 4), jnp.int32)
    logits = jax.eval_shape(ApplyDecoder(config), base, lora, tokens, tokens, where, images)
    assert logits.shape == (batch, 4, config.vocab_size)
    # Of the text model, and of the projector's two layers.
    assert sum(leaf.size for leaf in jax.tree.leaves(lora.params)) == 19_988_480 + 8 * (1024 + 3 * 4096)
