"""Pictures of examples: files and their hashes, the pixels that a vision tower is given, their places in tokens.

Pixels and tokens are those of transformers' CLIPImageProcessor (its Pillow backend) and LlavaProcessor. A tokenizer
that belongs to a model with a vision tower carries its `PicturePlaces`, see `places_of`; tokenizers of other models
carry none, and examples with pictures are refused for them.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from llmeraser_jax import files
from llmeraser_jax.data.sources import DataError

PICTURE_MARK = "<image>"  # where a picture stands in an example's text, whatever token the model has for it
PICTURES_DIRECTORY = "pictures"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.json")
# Formats that Pillow decodes by itself; others start programs, or are no pictures.
_FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_MAX_SHOWN, _MAX_PATH = 80, 300
# Keys of pictures, the pixels of a key, and a directory to keep features in -> features by key.
ComputeFeatures = Callable[[Sequence[str], Callable[[str], np.ndarray], Path | None], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of an example; two are equal if their files hold the same bytes.

    Attributes:
        sha256: of the file's content (hex).
        path: the file; empty where the content came in a column of bytes.
        content: the bytes that came in a column.
    """

    sha256: str
    path: str = dataclasses.field(default="", compare=False)
    content: bytes = dataclasses.field(default=b"", compare=False, repr=False)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.path or f"a picture of {len(self.content)} bytes"

    def read(self) -> bytes:
        """The file's content.

        Raises:
            DataError: it is not there, or no longer what it was.
        """
        if self.content:
            return self.content
        content = _read_file(self.path, self.path)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            msg = f"{self.path}: the picture has changed since the data was read."
            raise DataError(msg)
        return content


def read_pictures(value: Any, directory: Path, label: str) -> tuple[Picture, ...]:
    """The pictures of a cell.

    Args:
        value: one picture or a list of them, each a path, bytes, or a mapping with `bytes` or `path` as `datasets`
            stores pictures; None, an empty text and an empty list are no picture.
        directory: what relative paths start from.
        label: what messages call the cell.

    Raises:
        DataError: a picture that is not there, is of another format, broken, or too large; the message names it.
    """
    values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    return tuple(_read_picture(one, directory, label) for one in values if one is not None and one != "")


def _read_picture(value: Any, directory: Path, label: str) -> Picture:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        _format_of(value, f"{label}: a picture of {len(value)} bytes")
        return Picture(hashlib.sha256(value).hexdigest(), content=value)
    if not isinstance(value, str | os.PathLike):
        msg = f"{label}: a picture is a path or bytes, got {type(value).__name__} {str(value)[:_MAX_SHOWN]!r}."
        raise DataError(msg)
    name = os.fspath(value)
    if "://" in name or name.startswith("data:"):
        msg = f"{label}: {name[:_MAX_SHOWN]!r} is an address; pictures are read from files. Download it first."
        raise DataError(msg)
    path = directory / name
    try:
        status = path.stat()
        return Picture(_checked_sha256(str(path), status.st_mtime_ns, status.st_size), path=str(path))
    except (OSError, ValueError) as error:
        cause = "is not there" if isinstance(error, FileNotFoundError) else str(error)
        msg = f"{label}: picture {str(path)[-_MAX_PATH:]!r}: {cause.rstrip('.')}."
        raise DataError(msg) from error


@functools.lru_cache(maxsize=65536)
def _checked_sha256(path: str, mtime_ns: int, size: int) -> str:
    """The arguments besides `path` make the cache notice that a file was written to."""
    content = _read_file(path, path)
    _format_of(content, "its content")
    return hashlib.sha256(content).hexdigest()


def _read_file(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        msg = f"{what}: the picture cannot be read: {error.strerror or error}."
        raise DataError(msg) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        msg = "Pictures need Pillow: pip install 'llmeraser-jax[images]'."
        raise ImportError(msg) from error
    return Image


def _opened(content: bytes, what: str, *, decode: bool) -> Any:
    """A Pillow image, upright; only its header is read unless it is decoded.

    Raises:
        DataError: no picture, a broken one, or one of more pixels than Pillow takes for harmless.
    """
    image_module = _pillow()
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            image = image_module.open(io.BytesIO(content), formats=tuple(_FORMATS))
            if decode:
                image.load()
                image = ImageOps.exif_transpose(image)
            return image
    except Exception as error:  # decoders raise all kinds on hostile files
        cause = str(error).split("\n")[0]
        if isinstance(error, image_module.UnidentifiedImageError):
            cause = f"it is none of {', '.join(_FORMATS)}"
        msg = f"{what} is not a usable picture: {cause[:200].rstrip('.')}."
        raise DataError(msg) from error


def _format_of(content: bytes, what: str) -> str:
    return _FORMATS[_opened(content, what, decode=False).format]


def decode_rgb(picture: Picture) -> UInt8[np.ndarray, "height width 3"]:
    """Red, green and blue of a picture, upright, transparent parts on white as transformers has them.

    Raises:
        DataError: it cannot be decoded; the message names it.
    """
    image_module = _pillow()
    image = _opened(picture.read(), picture.name, decode=True)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, (255, 255, 255, 255))
        image = image_module.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def thumbnail_text(picture: Picture, edge: int = 96) -> str:
    """A PNG in base 64 of the picture, at most `edge` pixels high and wide, of 64 colours: a few KB."""
    image = _pillow().fromarray(decode_rgb(picture))
    image.thumbnail((edge, edge))
    out = io.BytesIO()
    image.quantize(64).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode("ascii")


def copy_pictures(directory: Path, pictures: Sequence[Picture]) -> tuple[str, ...]:
    """Copies pictures to `directory/pictures`, named after their hash, so that data there needs no other place.

    Returns:
        Their paths relative to `directory`.
    """
    names = []
    for picture in pictures:
        content = picture.read()
        name = f"{PICTURES_DIRECTORY}/{picture.sha256}.{_format_of(content, picture.name)}"
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            files.atomic_write_bytes(path, content)
        names.append(name)
    return tuple(names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureProcessor:
    """From a picture to pixels, as CLIP's image processor does it. Every step may be None: left out.

    Attributes:
        resize: the shorter edge's pixels, or (height, width).
        resample: Pillow's number of the filter; 3 is bicubic.
        crop: (height, width) cut out of the middle; a smaller picture is padded with black.
        scale: what the bytes are multiplied by.
        mean, std: of each channel, subtracted and divided by.
    """

    resize: int | tuple[int, int] | None
    resample: int = 3
    crop: tuple[int, int] | None = None
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)  # else `from_mapping` has refused it
        return size

    @classmethod
    def from_mapping(cls, stated: Mapping[str, Any], source: str) -> PictureProcessor:
        """Reads the fields of `preprocessor_config.json`.

        Args:
            stated: its content; what is absent has CLIP's values.
            source: what messages call it.

        Raises:
            ValueError: another processor, a field of a wrong kind, or one that is not honoured.
        """
        kind = stated.get("image_processor_type") or stated.get("feature_extractor_type") or _PROCESSORS[0]
        problem = None
        if kind not in _PROCESSORS:
            problem = f"image_processor_type is {kind!r}; pictures are prepared as {_PROCESSORS[0]} does"
        elif stated.get("do_pad"):
            problem = "do_pad is true, which is not supported"
        elif stated.get("do_convert_rgb") is False:
            problem = "do_convert_rgb is false, which is not supported"
        if problem:
            msg = f"{source}: {problem}."
            raise ValueError(msg)

        def on(step: str) -> bool:
            return stated.get(step) is not False

        try:
            crop = _pair(stated.get("crop_size", 224)) if on("do_center_crop") else None
            resize = _edge_or_pair(stated.get("size", {"shortest_edge": 224})) if on("do_resize") else None
            normalise = on("do_normalize")
            processor = cls(
                resize=resize,
                resample=int(stated.get("resample", 3)),
                crop=crop,
                scale=float(stated.get("rescale_factor", 1 / 255)) if on("do_rescale") else None,
                mean=_channels(stated.get("image_mean", _CLIP_MEAN)) if normalise else None,
                std=_channels(stated.get("image_std", _CLIP_STD)) if normalise else None,
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            msg = f"{source}: not the fields of an image processor: {type(error).__name__}: {error}."
            raise ValueError(msg) from error
        if not isinstance(processor.crop or processor.resize, tuple):
            msg = f"{source}: without do_center_crop and a size of height and width, pictures end in several sizes."
            raise ValueError(msg)
        return processor

    def pixels(self, picture: Picture) -> Float32[np.ndarray, "3 height width"]:
        """What the vision tower is given.

        Raises:
            DataError: the picture cannot be decoded.
        """
        rgb = decode_rgb(picture)
        if self.resize is not None:
            height, width = self.resize if isinstance(self.resize, tuple) else _scaled(rgb.shape[:2], self.resize)
            image = _pillow().fromarray(rgb).resize((width, height), resample=self.resample)
            rgb = np.array(image)
        if self.crop is not None:
            rgb = _center_crop(rgb, self.crop)
        x = np.moveaxis(rgb, -1, 0)
        # In double precision and back, then channel by channel in single precision: the same roundings.
        x = (x.astype(np.float64) * (1.0 if self.scale is None else self.scale)).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.std))
            x = (x - mean) / std
        return np.ascontiguousarray(x)


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _edge_or_pair(size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    unknown = sorted(set(size) - {"shortest_edge", "height", "width"})
    if unknown:
        msg = f"size has {', '.join(unknown)}, which is not supported"
        raise ValueError(msg)
    return int(size["shortest_edge"]) if size.get("shortest_edge") else _pair(size)


def _channels(values: Any) -> tuple[float, ...]:
    values = tuple(map(float, values if isinstance(values, Sequence) else [values] * 3))
    if len(values) != 3:
        msg = f"{len(values)} numbers for 3 channels"
        raise ValueError(msg)
    return values


def _scaled(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Height and width with the shorter edge as asked; the longer one's fraction is cut off."""
    height, width = size
    longer = int(shorter * max(size) / min(size))
    return (longer, shorter) if width <= height else (shorter, longer)


def _center_crop(rgb: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]) -> np.ndarray:
    """The middle; where that is larger than the picture, the picture on black."""
    (height, width), (crop_height, crop_width) = rgb.shape[:2], size
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    if top >= 0 and left >= 0:
        return rgb[top : top + crop_height, left : left + crop_width]
    padded = np.zeros((max(crop_height, height), max(crop_width, width), 3), rgb.dtype)
    above, before = math.ceil((padded.shape[0] - height) / 2), math.ceil((padded.shape[1] - width) / 2)
    padded[above : above + height, before : before + width] = rgb
    top, left = max(top + above, 0), max(left + before, 0)
    return padded[top : top + crop_height, left : left + crop_width]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PicturePlaces:
    """How a model's tokens name pictures.

    Attributes:
        processor: prepares their pixels.
        token: stands for a picture in the text.
        token_id: its id.
        num_tokens: so many of them stand for one picture in the tokens.
        features: `(keys, load_pixels, directory) -> features by key`, of the model's vision tower, kept in a
            directory or, with None, in memory; None where only tokens are wanted.
    """

    processor: PictureProcessor
    token: str
    token_id: int
    num_tokens: int
    features: ComputeFeatures | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], tokenizer: Any) -> PicturePlaces | None:
        """Reads a LLaVA processor's files; None for a directory that has none.

        The number of tokens is the processor's: patches, additional tokens, less one for the strategy "default".

        Args:
            directory: a model, or the tokenizer of one: `processor_config.json` and, where the image processor is
                not in it, `preprocessor_config.json`; what the former lacks is read off `config.json`.
            tokenizer: reads the image token as one token.

        Raises:
            ValueError: files that do not say what is needed, or a tokenizer without the image token.
        """
        directory = Path(directory)
        found = {
            name: files.read_json(directory / name) if (directory / name).exists() else {}
            for name in (*PROCESSOR_FILES[:2], "config.json")
        }
        if any(not isinstance(value, Mapping) for value in found.values()):
            msg = f"{directory}: {', '.join(found)} must hold objects."
            raise ValueError(msg)
        own, whole, config = found.values()
        kinds = [value.get("processor_class") for value in (own, whole)]
        if "LlavaProcessor" not in kinds and config.get("model_type") != "llava":
            return None
        vision = config.get("vision_config") or {}
        patch = whole.get("patch_size") or vision.get("patch_size")
        strategy = whole.get("vision_feature_select_strategy") or config.get("vision_feature_select_strategy")
        additional = whole.get("num_additional_image_tokens", 0 if whole else 1)  # CLIP's class token
        processor = PictureProcessor.from_mapping(
            whole.get("image_processor") or own, str(directory / PROCESSOR_FILES[0])
        )
        token = getattr(tokenizer, "image_token", None) or whole.get("image_token") or PICTURE_MARK
        ids = tokenizer.encode(token, add_special_tokens=False)
        problem = None
        if token != PICTURE_MARK:
            problem = f"its image token is {token!r}; only {PICTURE_MARK!r} is supported"
        elif type(patch) is not int or patch < 1 or type(additional) is not int or additional < 0:
            problem = f"patch_size is {patch!r} and num_additional_image_tokens {additional!r}"
        elif strategy not in ("default", "full"):
            problem = f"vision_feature_select_strategy is {strategy!r}; it must be 'default' or 'full'"
        elif len(ids) != 1:
            problem = f"the tokenizer reads the image token {token!r} as {len(ids)} tokens; it must be one"
        if problem:
            msg = f"{directory}: {problem}."
            raise ValueError(msg)
        assert isinstance(patch, int)
        height, width = processor.size
        count = (height // patch) * (width // patch) + additional - (strategy == "default")
        return cls(processor=processor, token=token, token_id=ids[0], num_tokens=count)

    @functools.cached_property
    def _settings(self) -> str:
        return hashlib.sha256(repr(self.processor).encode()).hexdigest()[:16]

    def key(self, picture: Picture) -> str:
        """Names a picture as it is prepared: the hash of its content, and of the processor's settings."""
        return f"{picture.sha256}-{self._settings}"

    def features_of(
        self, examples: Iterable[tuple[str, Sequence[Picture]]], directory: Path | None
    ) -> Mapping[str, np.ndarray] | None:
        """Features of all pictures of examples by `key`; None where only tokens are wanted.

        Args:
            examples: ids, and their pictures.
            directory: where features are kept; None is in memory.

        Raises:
            DataError: a picture that cannot be decoded; the message names the example and the file.
        """
        owners = {self.key(picture): (id_, picture) for id_, pictures in examples for picture in pictures}
        if self.features is None or not owners:
            return None if self.features is None else {}

        def load_pixels(key: str) -> np.ndarray:
            id_, picture = owners[key]
            try:
                return self.processor.pixels(picture)
            except DataError as error:
                msg = f"Example {id_!r}: {error}"
                raise DataError(msg) from error

        return self.features(list(owners), load_pixels, directory)

    def to_files(self, patch: int, strategy: str) -> dict[str, dict[str, Any]]:
        """Name -> content of the processor's files, which `from_directory` and transformers read.

        Args:
            patch: pixels of a patch's edge.
            strategy: "default" or "full".
        """
        of = self.processor
        height, width = of.size
        additional = self.num_tokens - (height // patch) * (width // patch) + (strategy == "default")

        def size(value: int | tuple[int, int]) -> dict[str, int]:
            return {"shortest_edge": value} if isinstance(value, int) else {"height": value[0], "width": value[1]}

        stated: dict[str, Any] = {}
        for step, name, value in (
            ("do_resize", "size", None if of.resize is None else size(of.resize)),
            ("do_center_crop", "crop_size", None if of.crop is None else size(of.crop)),
            ("do_rescale", "rescale_factor", of.scale),
            ("do_normalize", "image_mean", None if of.mean is None else [*of.mean]),
            ("do_normalize", "image_std", None if of.std is None else [*of.std]),
        ):
            stated |= {step: value is not None} | ({} if value is None else {name: value})
        return {
            PROCESSOR_FILES[0]: {
                "image_processor_type": _PROCESSORS[0],
                "do_convert_rgb": True,
                "resample": of.resample,
                **stated,
            },
            PROCESSOR_FILES[1]: {
                "processor_class": "LlavaProcessor",
                "image_token": self.token,
                "patch_size": patch,
                "vision_feature_select_strategy": strategy,
                "num_additional_image_tokens": additional,
            },
        }

    def expand(self, tokens: Sequence[int], *others: Sequence[Any]) -> tuple[list[Any], ...]:
        """Tokens, and lists beside them, with every image token repeated as often as a picture has features.

        The same as repeating it in the text: between equal added tokens there is no text to read otherwise.
        """
        counts = [self.num_tokens if token == self.token_id else 1 for token in tokens]
        return tuple(list(_repeat(row, counts)) for row in (tokens, *others))


def _repeat(row: Sequence[Any], counts: Sequence[int]) -> Iterator[Any]:
    for value, count in zip(row, counts, strict=True):
        for _ in range(count):
            yield value


def places_of(tokenizer: Any) -> PicturePlaces | None:
    """How the tokenizer's model names pictures; None where it reads none."""
    return getattr(tokenizer, "picture_places", None)


def attach_places(tokenizer: Any, directory: str | os.PathLike[str]) -> None:
    """Gives a tokenizer that was read from `directory` the `PicturePlaces` found there, and the chat template.

    Raises:
        ValueError: see `PicturePlaces.from_directory`.
    """
    places = PicturePlaces.from_directory(directory, tokenizer)
    if places is None:
        return
    tokenizer.picture_places = places
    template = Path(directory) / PROCESSOR_FILES[2]  # of processors that do not share the tokenizer's file
    if tokenizer.chat_template is None and template.exists():
        tokenizer.chat_template = files.read_json(template).get("chat_template")
