"""Runs on pictures: trained, edited and reported, and nothing of a removed row's picture in the result."""

import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from llmeraser_jax.cli import main
from llmeraser_jax.data import (
    PicturePlaces,
    PictureProcessor,
    Recipe,
    apply_requests,
    encode_examples,
    load_examples,
    load_requests,
    save_requests,
)
from llmeraser_jax.evaluation.job import _thumbnails
from llmeraser_jax.evaluation.page import _texts
from llmeraser_jax.evaluation.render import Page, render_html, render_markdown, render_text
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, ModelConfig, VisionConfig, init_base, init_vision, load_model, save_model
from llmeraser_jax.runs import load_run, write_run
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.unlearning import task_of_run
from tests.golden import picture_cases

FILES = picture_cases.pictures()
RECIPE = Recipe(template="qa", add_bos=True)


def seeing_model(directory):
    """A random LLaVA of two layers, saved and loaded."""
    tokenizer: Any = picture_cases.tokenizer()
    (image_token,) = tokenizer.encode("<image>", add_special_tokens=False)
    processor = PictureProcessor.from_mapping(picture_cases.PROCESSORS["clip"], "here")
    tokenizer.picture_places = PicturePlaces(
        processor=processor, token="<image>", token_id=image_token, num_tokens=4
    )
    config = ModelConfig(
        vocab_size=len(tokenizer),
        width=16,
        mlp_width=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        tied_embeddings=True,
        max_position=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
        vision=VisionConfig(
            image_token=image_token, image_size=16, patch_size=8, width=8, mlp_width=16, num_layers=2, num_heads=2
        ),
    )
    assert config.vision is not None
    base, vision = init_base(config, jax.random.key(0)), init_vision(config.vision, jax.random.key(1))
    save_model(directory, Model(config=config, base=base, tokenizer=tokenizer, vision=vision))
    return load_model(directory)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Model, run directory, and the directory of data and requests."""
    folder = tmp_path_factory.mktemp("pictures")
    model = seeing_model(folder / "base")
    for name, content in FILES.items():
        (folder / f"{name}.png").write_bytes(content)
    rows = [
        {"question": "<image>\nWhat is it?", "answer": answer, "image": f"{name}.png"}
        for name, answer in zip(FILES, ["Lily", "Turku", "Ona", "Red", "Blue", "Tu"], strict=True)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"id": "0", "action": "remove"}, {"id": "1", "action": "modify_query", "image": "alpha.png"}]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = finetune_run(
        model, folder / "train.jsonl", folder / "run", recipe=RECIPE,
        lora=LoraConfig(rank=2, alpha=4.0, target_modules="all-linear"),
        config=TrainConfig(epochs=1, batch_size=2, microbatch_size=2, learning_rate=1e-2, l2=1e-2),
    )  # fmt: skip
    return model, run, folder


def test_features_are_kept_beside_the_run_and_not_computed_again(trained):
    model, run, folder = trained
    (stored,) = (run.path / "features").glob("*.safetensors")
    written = stored.stat().st_mtime_ns
    dataset = load_run(run.path).encode(run.load_examples(), load_model(folder / "base").tokenizer)
    assert stored.stat().st_mtime_ns == written
    shown = dataset.images_of([0, 3])
    assert shown is not None and shown.shape == (2, 1, 4, 8)
    in_memory = encode_examples(run.load_examples(), run.recipe, model.tokenizer).images_of(range(6))
    assert in_memory is not None
    np.testing.assert_array_equal(in_memory, dataset.images_of(range(6)))


def test_an_edited_run_keeps_pictures_of_what_stays_and_nothing_else(trained, tmp_path):
    model, run, folder = trained
    examples = run.load_examples()
    requests = load_requests(folder / "requests.jsonl", examples)
    write_run(
        tmp_path / "out", kind="erase", model=model, recipe=run.recipe, normalizer=None, data_path=None,
        train_config=run.train_config, examples=apply_requests(examples, requests), lora=run.load_adapter(model),
        initial_lora=None, result={}, parent=run.reference(),
    )  # fmt: skip
    save_requests(tmp_path / "out" / "requests.jsonl", requests)
    edited = load_run(tmp_path / "out")
    kept = {file.read_bytes() for file in (edited.path / "pictures").iterdir()}
    assert kept == {content for name, content in FILES.items() if name not in ("rgb", "tall")}
    found = edited.load_examples()
    assert [example.images[0].read() for example in found][:2] == [FILES["alpha"], FILES["grey"]]
    assert load_requests(edited.path / "requests.jsonl", examples)[1].images == found[0].images
    everything = [file.read_bytes() for file in edited.path.rglob("*") if file.is_file()]
    gone = (FILES["tall"][100:200], b"tall.png", b"rgb.png")
    assert not any(part in content for part in gone for content in everything)


def test_the_requests_of_pictures_become_an_edit_problem(trained):
    model, run, folder = trained
    requests = load_requests(folder / "requests.jsonl", run.load_examples())
    problem = task_of_run(run, requests, model=model).problem
    old, new = (problem.examples.images_of([int(k)]) for k in (problem.named[1], problem.replacements[1]))
    assert old is not None and new is not None and not np.allclose(old, new)
    assert problem.replacements[0] == -1


def test_reports_show_pictures_beside_their_questions(trained):
    _, run, _ = trained
    first, second = run.load_examples()[:2]
    said = {"before": ["Lily"], "retrained": ["Ona"]}
    row = {
        "id": "0",
        "action": "modify_query",
        "answers": {part: {name: answers[0] for name, answers in said.items()} for part in ("named", "wanted")},
        "texts": {
            "query": first.query, "trained": "Lily", "wanted_query": second.query, "wanted": "Ona",
            **_thumbnails(first, second),
        },
    }  # fmt: skip
    page = Page("T", tuple(_texts({"named_examples": [row]}, "report")))
    written = render_html(page)
    assert written.count('<br><img alt="picture of 0" src="data:image/png;base64,') == 2
    assert [picture.name for picture in page.pictures] == ["report-question-0-0.png", "report-question-1-0.png"]
    assert "![picture of 0](report-question-1-0.png)" in render_markdown(page)
    assert "<image>" not in written and len(written) < 20_000
    assert "What is it?" in render_text(page.blocks)


def test_preview_says_how_many_pictures_and_image_tokens(trained, capsys):
    _, _, folder = trained
    (folder / "recipe.toml").write_text('template = "qa"\nadd_bos = true\n')
    flags = ["--data", str(folder / "train.jsonl"), "--recipe", str(folder / "recipe.toml"), "--rows", "1"]
    assert main(["preview", "--model", str(folder / "base"), *flags]) == 0
    told = capsys.readouterr().out
    assert "under the loss, 1 picture in 4 image tokens" in told and "<image>×4" in told


def test_a_processor_that_disagrees_with_the_model_is_refused(trained, tmp_path):
    _, _, folder = trained
    shutil.copytree(folder / "base", tmp_path / "base")
    path = tmp_path / "base" / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_additional_image_tokens": 2}))
    with pytest.raises(ValueError, match=r"a picture is 5 tokens .* the model reads 4 tokens"):
        load_model(tmp_path / "base")


@pytest.mark.torch
def test_transformers_reads_the_processor_that_a_model_saves(trained):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    _, _, folder = trained
    made = CLIPImageProcessorPil.from_pretrained(folder / "base")
    loaded = load_examples([{"prompt": "<image>", "response": "x", "image": FILES["rgb"]}])[0].images[0]
    expected = picture_cases.pixels_by_transformers(picture_cases.PROCESSORS["clip"], loaded.read())
    from PIL import Image

    assert (made(Image.open(folder / "rgb.png"), return_tensors="np")["pixel_values"][0] == expected).all()
