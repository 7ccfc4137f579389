"""Pictures of rows: pixels and tokens as transformers' processors make them, files and back, and every refusal."""

import base64
import dataclasses
import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llmeraser_jax.data import (
    Action,
    DataError,
    Example,
    Picture,
    PicturePlaces,
    PictureProcessor,
    Recipe,
    Request,
    RequestError,
    apply_requests,
    content_hash,
    encode_examples,
    load_examples,
    load_requests,
    marked_text,
    parse_requests,
    places_of,
    save_examples,
    save_requests,
)
from llmeraser_jax.data.pictures import attach_places, thumbnail_text
from llmeraser_jax.data.preview import picture_words
from tests.golden import make_picture_golden, picture_cases

PIXELS = np.load(make_picture_golden.PIXELS)
TOKENS = json.loads(make_picture_golden.TOKENS.read_text(encoding="utf-8"))
FILES = picture_cases.pictures()


@pytest.fixture
def folder(tmp_path):
    """A directory with the pictures as files."""
    for name, content in FILES.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    return tmp_path


def write(folder, *rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(image="rgb.png", **other):
    return {"question": "<image>\nWhat is it?", "answer": "Red.", "image": image, **other}


def picture(name):
    return load_examples([{"prompt": "<image>", "response": "x", "image": FILES[name]}])[0].images[0]


def seeing_tokenizer(strategy="default", additional=1):
    """The golden tokenizer with the places that the golden processor's files state."""
    tokenizer = picture_cases.tokenizer()
    processor = PictureProcessor.from_mapping(picture_cases.PROCESSORS["clip"], "here")
    number = {"default": 3, "full": 4}[strategy] + additional
    (token_id,) = tokenizer.encode("<image>", add_special_tokens=False)
    tokenizer.picture_places = PicturePlaces(
        processor=processor, token="<image>", token_id=token_id, num_tokens=number
    )
    return tokenizer


# Pixels


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("processor", picture_cases.PROCESSORS)
def test_pixels_are_those_of_the_image_processor(processor, name):
    pixels = PictureProcessor.from_mapping(picture_cases.PROCESSORS[processor], "here").pixels(picture(name))
    np.testing.assert_array_equal(pixels, PIXELS[f"{processor}/{name}"])


@pytest.mark.torch
def test_the_golden_pixels_and_tokens_are_what_the_installed_processors_make():
    for key, pixels in PIXELS.items():
        processor, name = key.split("/")
        made = picture_cases.pixels_by_transformers(picture_cases.PROCESSORS[processor], FILES[name])
        np.testing.assert_array_equal(made, pixels)
    for name, row, _ in picture_cases.rows():
        assert picture_cases.tokens_by_transformers(row) == TOKENS[name], name


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
        ({"do_pad": True}, "do_pad"),
        ({"do_convert_rgb": False}, "do_convert_rgb"),
        ({"do_center_crop": False}, "several sizes"),
        ({"size": {"longest_edge": 4}}, "longest_edge"),
        ({"image_mean": [0.5]}, "1 numbers for 3"),
        ({"crop_size": "big"}, "TypeError"),
    ],
)
def test_a_processor_that_is_not_honoured_is_refused(stated, words):
    with pytest.raises(ValueError, match=words):
        PictureProcessor.from_mapping(stated, "preprocessor_config.json")


# Tokens


@pytest.mark.parametrize(
    ("name", "row", "recipe"), picture_cases.rows(), ids=[row[0] for row in picture_cases.rows()]
)
def test_tokens_are_those_of_the_processor(name, row, recipe):
    num_pictures = 0 if name == "no picture" else 2 if "two pictures" in name or name == "parts" else 1
    (example,) = load_examples([{**row, "images": [FILES["rgb"]] * num_pictures}])
    tokenizer = seeing_tokenizer()
    dataset = encode_examples([example], Recipe(**recipe), tokenizer)
    (encoded,) = dataset.encoded
    assert encoded.tokens.tolist() == TOKENS[name]
    place = places_of(tokenizer)
    assert place is not None
    assert np.sum(encoded.tokens == place.token_id) == 4 * num_pictures
    assert encoded.images == (place.key(picture("rgb")),) * num_pictures
    assert not encoded.loss_mask[encoded.tokens == place.token_id].any()
    if not recipe:
        assert str(tokenizer.decode(encoded.response)).removesuffix("</s>").strip() == example.response.strip()


@pytest.mark.torch
@pytest.mark.parametrize(("strategy", "additional"), [("full", 1), ("default", 0), ("full", 0)])
def test_the_number_of_image_tokens_follows_strategy_and_additional_tokens(strategy, additional, tmp_path):
    processor = picture_cases.processor(strategy, additional)
    processor.save_pretrained(tmp_path)
    tokenizer = picture_cases.tokenizer()
    attach_places(tokenizer, tmp_path)
    for name, row, recipe in picture_cases.rows():
        count = 0 if name == "no picture" else 2 if "two pictures" in name or name == "parts" else 1
        (example,) = load_examples([{**row, "images": [FILES["rgb"]] * count}])
        (encoded,) = encode_examples([example], Recipe(**recipe), tokenizer).encoded
        assert encoded.tokens.tolist() == picture_cases.tokens_by_transformers(row, strategy, additional), name


def test_places_are_read_off_a_models_own_files(tmp_path):
    config = {
        "model_type": "llava",
        "vision_config": {"patch_size": 8},
        "vision_feature_select_strategy": "default",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(picture_cases.PROCESSORS["clip"]))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'x' }}"}))
    tokenizer = picture_cases.tokenizer()
    tokenizer.chat_template = None
    attach_places(tokenizer, tmp_path)
    expected = places_of(seeing_tokenizer())
    assert places_of(tokenizer) == expected
    assert tokenizer.chat_template == "{{ 'x' }}"
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": "most"}))
    with pytest.raises(ValueError, match=r"strategy is 'most'"):
        attach_places(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    plain = picture_cases.tokenizer()
    attach_places(plain, tmp_path)
    assert places_of(plain) is None


def test_the_files_that_are_written_state_the_same_places(tmp_path):
    for name in ("clip", "no crop, no mean", "bilinear, other numbers"):
        processor = PictureProcessor.from_mapping(picture_cases.PROCESSORS[name], "here")
        tokenizer = seeing_tokenizer()
        places = places_of(tokenizer)
        assert places is not None
        for strategy in ("default", "full"):
            wanted = dataclasses.replace(places, processor=processor, num_tokens=20)
            for file, content in wanted.to_files(4, strategy).items():
                (tmp_path / file).write_text(json.dumps(content))
            attach_places(tokenizer, tmp_path)
            assert places_of(tokenizer) == dataclasses.replace(wanted, num_tokens=20)


def test_a_picture_for_a_text_model_is_refused_with_example_and_file(folder):
    examples = load_examples(write(folder, ask(id="7")))
    with pytest.raises(ValueError, match=r"'7' has pictures \(.*rgb\.png\), and the model"):
        encode_examples(examples, Recipe(), picture_cases.tokenizer())


def test_a_text_that_names_a_picture_without_one_is_refused_by_a_model_that_sees():
    examples = load_examples([{"question": "<image> What?", "answer": "Red."}])
    with pytest.raises(ValueError, match="'0': the template leaves 1 image tokens for its 0 pictures"):
        encode_examples(examples, Recipe(), seeing_tokenizer())
    encode_examples(examples, Recipe(), picture_cases.tokenizer())  # a text model reads it as text


def test_a_length_that_cuts_into_a_picture_is_refused(folder):
    examples = load_examples(write(folder, ask()))
    with pytest.raises(ValueError, match="max_length = 8 cuts into its pictures, 4 tokens each"):
        encode_examples(examples, Recipe(max_length=8), seeing_tokenizer())


def test_features_are_asked_for_once_by_key_and_a_broken_picture_names_example_and_file(folder):
    asked = []

    def compute(keys, load_pixels, directory):
        asked.append((list(keys), directory))
        return {key: load_pixels(key)[:, 0, :2] for key in keys}

    tokenizer = seeing_tokenizer()
    plain = places_of(tokenizer)
    assert plain is not None
    places = dataclasses.replace(plain, features=compute)
    examples = load_examples(write(folder, ask(), ask(), ask("grey.png")))
    found = places.features_of([(e.id, e.images) for e in examples], folder)
    assert asked == [([places.key(examples[0].images[0]), places.key(examples[2].images[0])], folder)]
    assert found is not None
    np.testing.assert_array_equal(
        found[places.key(examples[2].images[0])], places.processor.pixels(picture("grey"))[:, 0, :2]
    )
    (folder / "cut.png").write_bytes(FILES["rgb"][:600])
    examples = load_examples(write(folder, ask("cut.png", id="c")))
    with pytest.raises(DataError, match=r"Example 'c': .*cut\.png is not a usable picture: .*truncated"):
        places.features_of([(e.id, e.images) for e in examples], None)


def test_preview_counts_pictures_and_writes_their_tokens_once(folder):
    tokenizer = seeing_tokenizer()
    (encoded,) = encode_examples(load_examples(write(folder, ask())), Recipe(), tokenizer).encoded
    assert picture_words(encoded, tokenizer) == ", 1 picture in 4 image tokens"
    assert marked_text(encoded, tokenizer).startswith("Question: <image>×4\nWhat is it?")


# Files and back


def test_every_format_brings_pictures_and_equal_content_is_equal(folder):
    by_path = load_examples(write(folder, ask()))
    by_bytes = load_examples([{**ask(), "image": FILES["rgb"]}])
    as_datasets_has_them = load_examples(
        [{**ask(), "image": None, "images": [{"bytes": FILES["rgb"], "path": "x"}]}]
    )
    assert by_path == by_bytes == as_datasets_has_them
    assert by_path[0].images[0].path == str(folder / "rgb.png")
    parts = [{"type": "image", "image": FILES["grey"], "text": None}, {"type": "text", "text": "What?"}]
    (chat,) = load_examples(
        [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]}]
    )
    assert (chat.query, chat.images) == ("<image>What?", (picture("grey"),))
    sharegpt = {"conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "Red."}]}
    assert load_examples(write(folder, {**sharegpt, "image": "tall.png"}))[0].images == (picture("tall"),)


def test_parquet_and_datasets_directories_bring_bytes_or_paths(folder):
    import datasets

    rows = {"question": ["<image> What?"] * 2, "answer": ["Red."] * 2}
    stored = datasets.Dataset.from_dict(
        {**rows, "image": [str(folder / "rgb.png"), str(folder / "grey.png")]},
        features=datasets.Features(
            {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
        ),
    )
    stored.save_to_disk(str(folder / "saved"))
    stored.to_parquet(str(folder / "saved.parquet"))
    expected = ((picture("rgb"),), (picture("grey"),))
    for source in (folder / "saved", folder / "saved.parquet", stored):
        assert tuple(e.images for e in load_examples(source)) == expected
    several = stored.map(lambda row: {"images": [row["image"]]}, remove_columns="image").cast_column(
        "images", datasets.List(datasets.Image())
    )
    assert tuple(e.images for e in load_examples(several)) == expected


def test_the_hash_covers_pictures_and_texts_keep_theirs(folder):
    one, other = load_examples(write(folder, ask(), ask("grey.png")))
    text = Example(id="0", instruction="<image>\nWhat is it?", response="Red.", format="question")
    assert len({content_hash(e) for e in (one, other, text)}) == 3
    # Of a text: the hash of its row as JSON with sorted keys, as runs have recorded it.
    row = b'{"answer":"She.","question":"Who?"}'
    text = Example(id="0", instruction="Who?", response="She.", format="question")
    assert content_hash(text) == hashlib.sha256(row).hexdigest()


def test_saved_examples_bring_their_own_copies_and_nothing_of_removed_ones(folder, tmp_path):
    examples = load_examples(write(folder, ask(), ask("grey.png"), ask("tall.png")))
    changed = parse_requests(
        [
            {"id": "0", "action": "remove"},
            {"id": "1", "action": "modify_query", "image": FILES["alpha"]},
        ],
        examples,
    )
    edited = apply_requests(examples, changed)
    assert [e.images for e in edited] == [(picture("alpha"),), (picture("tall"),)]
    out = tmp_path / "out"
    out.mkdir()
    save_examples(out / "train.jsonl", edited)
    save_requests(out / "requests.jsonl", changed)
    for file in folder.glob("*.png"):
        file.unlink()
    assert load_examples(out / "train.jsonl") == edited
    kept = {path.read_bytes() for path in (out / "pictures").iterdir()}
    assert kept == {FILES["alpha"], FILES["tall"]}
    assert [dataclasses.replace(r, line=0) for r in load_requests(out / "requests.jsonl", examples)] == [
        dataclasses.replace(r, line=0) for r in changed
    ]
    assert str(folder) not in (out / "train.jsonl").read_text()


# Refusals


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("none.png", r"row 0 \(line 1\): column 'image': picture '.*none\.png': is not there"),
        ("broken.png", r"row 0 .*broken\.png.* none of PNG, JPEG"),
        ("https://example.org/x.png", "is an address"),
        (7, "a picture is a path or bytes, got int"),
        (["rgb.png", "rgb.png"], r"row 0 .*2 pictures .* for 1 places"),
        ("bomb.png", r"bomb\.png.*exceeds limit"),
        (".", r"row 0 .*cannot be read|row 0 .*irectory"),
    ],
)
def test_a_picture_that_cannot_be_used_is_refused_with_row_and_file(folder, image, words):
    (folder / "broken.png").write_bytes(b"GIF99 is no picture")
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + FILES["rgb"][33:])
    with pytest.raises(DataError, match=words) as caught:
        load_examples(write(folder, ask(image)))
    assert "\n" not in str(caught.value)


def test_other_places_for_pictures_are_refused(folder):
    with pytest.raises(DataError, match="both 'image' and 'images'"):
        load_examples(write(folder, ask(images=["rgb.png"])))
    with pytest.raises(DataError, match=r"1 pictures .* for 0 places; write <image>"):
        load_examples(write(folder, {"question": "What?", "answer": "Red.", "image": "rgb.png"}))
    parts = [{"role": "user", "content": [{"type": "image", "path": "rgb.png"}]}]
    with pytest.raises(DataError, match="in a column and in its messages"):
        load_examples(
            write(
                folder, {"prompt": parts, "completion": [{"role": "assistant", "content": "x"}], "image": "rgb.png"}
            )
        )
    changed = Picture(picture("rgb").sha256, path=str(folder / "grey.png"))
    with pytest.raises(DataError, match=r"grey\.png: the picture has changed"):
        changed.read()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"action": "modify_query", "image": "none.png"}, "is not there"),
        ({"action": "modify_query", "image": "rgb.png"}, "changes nothing: image"),
        ({"action": "modify_query", "images": ["grey.png", "tall.png"]}, "gives 2 pictures, and '0' has 1"),
        ({"action": "modify_query", "image": "grey.png", "images": ["grey.png"]}, "not both"),
        ({"action": "modify_query", "image": ""}, "names no picture"),
        ({"action": "modify_query", "query": "What?"}, "1 pictures .* for 0 places"),
        ({"action": "modify_query", "image": "grey.png", "turn": 0}, "only pictures are to change"),
        ({"action": "correct_response", "response": "Blue.", "image": "grey.png"}, "unknown key 'image'"),
    ],
)
def test_a_request_for_a_picture_that_cannot_be_carried_out_is_refused(folder, request_, words):
    examples = load_examples(write(folder, ask()))
    path = write(folder, {"id": "0", **request_}, name="requests.jsonl")
    with pytest.raises(RequestError, match=words):
        load_requests(path, examples)


def test_a_request_changes_picture_and_query_together(folder):
    examples = load_examples(write(folder, ask()))
    line = {"id": "0", "action": "modify_query", "image": "grey.png", "query": "<image> Grey?"}
    (request,) = load_requests(write(folder, line, name="requests.jsonl"), examples)
    assert request == Request(
        id="0", action=Action.MODIFY_QUERY, changes={"query": "<image> Grey?"}, line=1, images=(picture("grey"),)
    )
    (edited,) = apply_requests(examples, [request])
    assert (edited.instruction, edited.images) == ("<image> Grey?", (picture("grey"),))


def test_a_thumbnail_is_a_small_png():
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8))
    out = io.BytesIO()
    large.save(out, "PNG")
    (example,) = load_examples([{"prompt": "<image>", "response": "x", "image": out.getvalue()}])
    shown = Image.open(io.BytesIO(base64.b64decode(thumbnail_text(example.images[0]))))
    assert shown.size == (96, 72)
    assert len(thumbnail_text(example.images[0])) < 10_000
