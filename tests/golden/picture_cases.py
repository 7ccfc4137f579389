"""Pictures of every mode and rows with `<image>`, and what transformers' processors make of them."""

import io

import numpy as np
from PIL import Image

from tests.data.chat_tokenizers import byte_tokenizer

# LLaVA-1.5's: pictures first, then texts; contents are lists of parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PROCESSORS = {
    "clip": {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
    "no crop, no mean": {"size": {"height": 12, "width": 8}, "do_center_crop": False, "do_normalize": False},
    "crop beyond the picture": {"do_resize": False, "crop_size": {"height": 31, "width": 24}},
    "bilinear, other numbers": {
        "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "resample": 2,
        "rescale_factor": 0.01, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2],
    },
}  # fmt: skip


def pictures() -> dict[str, bytes]:
    """Files by name, losslessly compressed, so that every decoder reads the same."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (23, 37, 3), np.uint8))
    tall = Image.fromarray(rng.integers(0, 256, (41, 17, 3), np.uint8))
    grey = Image.fromarray(rng.integers(0, 256, (30, 21), np.uint8))
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(rng.integers(0, 256, (23, 37), np.uint8)))
    palette = tall.quantize(16)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    options = {
        "rgb": (rgb, {}),
        "tall": (tall, {}),
        "grey": (grey, {}),
        "alpha": (clear, {}),
        "palette": (palette, {"transparency": 3}),
        "turned": (rgb, {"exif": rotated}),
    }
    files = {}
    for name, (image, how) in options.items():
        out = io.BytesIO()
        image.save(out, "PNG", **how)
        files[name] = out.getvalue()
    return files


def rows() -> list[tuple[str, dict, dict]]:
    """Name, row without its pictures, and the recipe's fields."""
    ask = {"role": "user", "content": "<image>\nWhat is left of it?"}
    answer = {"role": "assistant", "content": "A red ring."}
    texts = [{"type": "text", "text": text} for text in ("What is", " it?")]
    parts = [{"type": "image"}, texts[0], {"type": "image"}, texts[1]]
    again = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    return [
        ("prompt", {"prompt": "USER: <image>\nLily? ASSISTANT:", "response": " Turku"}, {}),
        ("prompt, two pictures", {"prompt": "<image><image>\nSame?", "response": "\n\nYes"}, {}),
        ("messages", {"messages": [ask, answer]}, {}),
        ("two turns, all under the loss", {"messages": [ask, answer, *again]}, {"loss_on": "assistant"}),
        ("parts", {"messages": [{"role": "user", "content": parts}, answer]}, {}),
        ("no picture", {"messages": [{"role": "user", "content": "Lily?"}, answer]}, {}),
    ]  # fmt: skip


def tokenizer():
    """Bytes, with the image token as a control token."""
    return byte_tokenizer(CHAT_TEMPLATE, tokens=("<image>",))


def processor(strategy: str = "default", additional: int = 1):
    """A LlavaProcessor of 16 x 16 pixels in patches of 8."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor

    return LlavaProcessor(
        CLIPImageProcessorPil(**PROCESSORS["clip"]),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=additional,
        chat_template=CHAT_TEMPLATE,
    )


def pixels_by_transformers(options: dict, content: bytes) -> np.ndarray:
    """What the image processor makes of a picture, upright."""
    from PIL import ImageOps
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    return np.asarray(CLIPImageProcessorPil(**options)(image, return_tensors="np")["pixel_values"][0])


def tokens_by_transformers(row: dict, strategy: str = "default", additional: int = 1) -> list[int]:
    """Token ids of the whole row as the processor makes them; a conversation without a generation prompt."""
    made = processor(strategy, additional)
    if "messages" in row:
        # The processor's templates take parts; a mark in a text is a part of its own, with its line break.
        messages = [{**m, "content": _as_parts(m["content"])} for m in row["messages"]]
        text = made.apply_chat_template(messages, tokenize=False)
    else:
        text = row["prompt"] + row["response"] + made.tokenizer.eos_token
    images = [Image.open(io.BytesIO(pictures()["rgb"]))] * text.count("<image>")
    options: dict = {"add_special_tokens": False, "images": images or None}
    encoded = made(text=[text], **options)
    return [int(token) for token in np.asarray(encoded["input_ids"][0])]


def _as_parts(content):
    if not isinstance(content, str):
        return content
    with_picture = content.startswith("<image>\n")
    text = {"type": "text", "text": content.removeprefix("<image>\n")}
    return [{"type": "image"}, text] if with_picture else [text]
