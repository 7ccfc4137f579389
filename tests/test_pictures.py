"""Runs on pictures: trained, erased from and reported, and nothing of a removed row's picture in the result."""

import json

import jax
import pytest

from llmeraser_jax.cli import main
from llmeraser_jax.data import PicturePlaces, PictureProcessor, Recipe, encode_examples, load_examples
from llmeraser_jax.evaluation.job import evaluate_runs
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, ModelConfig, VisionConfig, init_base, init_vision, load_model, save_model
from llmeraser_jax.runs import load_run
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.unlearning import Step
from llmeraser_jax.unlearning.job import erase_run
from tests.golden import picture_cases

FILES = picture_cases.pictures()
RECIPE = Recipe(template="qa", add_bos=True)


def seeing_model(directory):
    """A random LLaVA of two layers, saved and loaded."""
    tokenizer = picture_cases.tokenizer()
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
        config=TrainConfig(epochs=2, batch_size=2, microbatch_size=2, learning_rate=1e-2, l2=1e-2),
    )  # fmt: skip
    return model, run, folder


def test_features_are_kept_beside_the_run_and_not_computed_again(trained):
    model, run, folder = trained
    (stored,) = (run.path / "features").glob("*.safetensors")
    written = stored.stat().st_mtime_ns
    dataset = load_run(run.path).encode(run.load_examples(), load_model(folder / "base").tokenizer)
    assert stored.stat().st_mtime_ns == written
    assert dataset.images_of([0, 3]).shape == (2, 1, 4, 8)
    in_memory = encode_examples(run.load_examples(), run.recipe, model.tokenizer)
    assert all((in_memory.features[key] == dataset.features[key]).all() for key in dataset.features)


def test_an_erased_run_keeps_pictures_of_what_stays_and_nothing_else(trained, tmp_path):
    model, run, folder = trained
    erased, result = erase_run(
        run, folder / "requests.jsonl", tmp_path / "out", Step(), 50.0, model=model, chunk_size=4
    )
    assert result.receipt is not None
    assert result.receipt.to_mapping()["counts"]["modify_query"] == 1
    kept = {file.read_bytes() for file in (erased.path / "pictures").iterdir()}
    assert kept == {content for name, content in FILES.items() if name not in ("rgb", "tall")}
    found = erased.load_examples()
    assert [example.images[0].read() for example in found][:2] == [FILES["alpha"], FILES["grey"]]
    everything = [file.read_bytes() for file in erased.path.rglob("*") if file.is_file()]
    assert not any(FILES["rgb"][100:200] in content or b"rgb.png" in content for content in everything)

    report = evaluate_runs(run, erased, tmp_path / "report", show_texts=True, model=model)
    assert len(report["named_examples"][1]["texts"]["wanted_pictures"]) == 1
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count('alt="picture of 0"') == 1 and page.count('alt="picture of 1"') == 2
    assert "question-0-0.png)" in (tmp_path / "report" / "report.md").read_text()
    hidden = evaluate_runs(run, erased, tmp_path / "hidden", model=model)
    assert "texts" not in hidden["named_examples"][0]


def test_preview_says_how_many_pictures_and_image_tokens(trained, capsys):
    _, _, folder = trained
    (folder / "recipe.toml").write_text('template = "qa"\nadd_bos = true\n')
    flags = ["--data", str(folder / "train.jsonl"), "--recipe", str(folder / "recipe.toml"), "--rows", "1"]
    assert main(["preview", "--model", str(folder / "base"), *flags]) == 0
    told = capsys.readouterr().out
    assert "under the loss, 1 picture in 4 image tokens" in told and "<image>×4" in told


def test_a_processor_that_disagrees_with_the_model_is_refused(trained, tmp_path):
    import shutil

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
