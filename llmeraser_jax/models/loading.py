"""Owns reading and writing models in Hugging Face's layout, without PyTorch."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llmeraser_jax import convert, files
from llmeraser_jax.convert import (
    QuantizedKernel,
    base_quantization,
    check_quantization,
    dequantize_base,
    quantize,
)
from llmeraser_jax.data import attach_places, places_of
from llmeraser_jax.lora import Lora, LoraConfig, init_lora
from llmeraser_jax.models.config import ModelConfig
from llmeraser_jax.models.decoder import ApplyDecoder, base_shapes
from llmeraser_jax.models.features import FeaturesOfTower
from llmeraser_jax.models.precision import MatmulPrecision
from llmeraser_jax.models.streaming import LayerStack, aligned_empty, copy_finite, read_leaf
from llmeraser_jax.models.vision import vision_shapes
from llmeraser_jax.parallel import sharding_for
from llmeraser_jax.text import short_repr
from llmeraser_jax.types import BaseParams, Key, LoraParams

_log = logging.getLogger(__name__)

_HUB_FILES = ["*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A base model with its tokenizer.

    Attributes:
        config: its description.
        base: frozen parameters, a nested dict; paths and shapes in `models.decoder`.
        tokenizer: a transformers tokenizer, or None where the checkpoint has none.
        path: the directory it was read from, or its hub id; adapters record it.
        mesh: where the base lives; None is the default device.
        vision: the frozen vision tower of a model that sees pictures, see `models.vision`; None without one.
    """

    config: ModelConfig
    base: BaseParams
    tokenizer: Any = None
    path: str = ""
    mesh: Mesh | None = None
    vision: BaseParams | None = None

    def __post_init__(self) -> None:
        """Gives the tokenizer what makes features of pictures.

        Raises:
            ValueError: the picture processor's files state other image tokens than the model reads.
        """
        if self.vision is None or self.config.vision is None or self.tokenizer is None:
            return
        if places_of(self.tokenizer) is None and Path(self.path).is_dir():
            attach_places(self.tokenizer, self.path)  # of an adapter's tokenizer, which says nothing of pictures
        places, config = places_of(self.tokenizer), self.config.vision
        if places is None:
            return
        if (places.token_id, places.num_tokens) != (config.image_token, config.num_features):
            msg = (
                f"{self.path or 'The model'}: by its processor's files a picture is {places.num_tokens} tokens "
                f"{places.token_id}; the model reads {config.num_features} tokens {config.image_token}."
            )
            raise ValueError(msg)
        features = FeaturesOfTower(config, self.vision)
        self.tokenizer.picture_places = dataclasses.replace(places, features=features)

    def __repr__(self) -> str:
        return short_repr(
            self,
            path=self.path or None,
            type=self.config.model_type,
            layers=self.config.num_layers,
            width=self.config.width,
            vocab=self.config.vocab_size,
            dtype=str(jax.tree.leaves(self.base)[0].dtype),
            quantization=self.quantization,
            mesh=None if self.mesh is None else dict(self.mesh.shape),
        )

    @property
    def apply(self) -> ApplyDecoder:
        """`(base, lora, tokens, attention_mask, positions=None, images=None) -> logits`; static under jit."""
        return ApplyDecoder(self.config)

    @property
    def quantization(self) -> str | None:
        """How the base is quantised: one of `convert.QUANTIZATIONS`, or None."""
        return base_quantization(self.base)

    @property
    def adapter_extras(self) -> tuple[str, ...]:
        """Names in an adapter's `params` besides "layers": none, unless a subclass's `apply` reads more."""
        return ()

    def vocabulary(self, lora: LoraParams | None) -> int | None:
        """How many tokens are read under an adapter; None where a subclass's `apply` reads more than its own."""
        if self.adapter_extras:
            return None
        return getattr(getattr(lora, "config", None), "vocab_size", None) or self.config.vocab_size

    def init_lora(self, key: Key, config: LoraConfig) -> Lora:
        """A fresh adapter for this model; see `lora.init_lora`."""
        return init_lora(key, config, self.config, self.base)


def load_model(
    path_or_hub_id: str | os.PathLike[str],
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    quantization: str | None = None,
    matmul_precision: MatmulPrecision = "auto",
) -> Model:
    """Reads a model from a directory, or from the Hugging Face hub where no such directory exists.

    Tensors go to the devices one by one; a process reads what its own devices hold, and its memory holds one tensor
    besides. Kernels that are quantised on the way are read whole, one after the other, and quantised in float32.

    Args:
        path_or_hub_id: a directory with config.json and safetensors, or a hub id such as "org/name".
        dtype: storage dtype of the base: float32, bfloat16, float16, or float64 (with 64-bit JAX). Sums are float32
            or wider in any case.
        mesh: shares the base out over its devices.
        quantization: how the kernels of the layers are stored, one of `convert.QUANTIZATIONS`; they are
            dequantised to `dtype`. None: as they are on disk, where bitsandbytes may have quantised them already.
        matmul_precision: how products with the base's matrices are computed, see `precision.frozen_product`.

    Returns:
        The model, its tokenizer None where there are no tokenizer files.

    Raises:
        FileNotFoundError: config.json or the weights are not there.
        ValueError: a config field that is not honoured, tensors that do not fit (all are listed), a number that is
            not finite, or a checkpoint that is quantised otherwise.
    """
    if quantization is not None:
        check_quantization(quantization)
    numpy_dtype = convert.numpy_dtype(dtype)
    if jax.dtypes.canonicalize_dtype(numpy_dtype) != numpy_dtype:
        msg = f"dtype is {dtype!r}, which needs jax.config.update('jax_enable_x64', True)."
        raise ValueError(msg)
    directory = _local_directory(path_or_hub_id)
    config = dataclasses.replace(read_config(directory), matmul_precision=matmul_precision)
    with files.reading(directory):
        base: Any = unflatten_dict(_read_base(directory, config, dtype, quantization, mesh), sep="/")
    is_local = Path(path_or_hub_id).is_dir()
    return Model(
        config=config,
        vision=base.pop("vision", None),
        base=base,
        tokenizer=load_tokenizer(directory),
        path=str(directory.resolve()) if is_local else str(path_or_hub_id),
        mesh=mesh,
    )


def model_config(path_or_hub_id: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a model in a directory or on the hub, whose weights need not be there."""
    return read_config(_local_directory(path_or_hub_id, weights=False))


def _local_directory(path_or_hub_id: str | os.PathLike[str], *, weights: bool = True) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    # A hub id has at most one slash and no leading one; anything else was meant as a path.
    name = str(path_or_hub_id)
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.exists():
        msg = f"{name} is not a directory with a model, nor a hub id such as 'org/name'."
        raise FileNotFoundError(msg)
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_HUB_FILES, *["*.safetensors"] * weights]))


def read_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a checkpoint, end-of-sequence tokens of generation_config.json included.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: a field that is not honoured; see `ModelConfig.from_hf` and `check_quantization_config`.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not path.exists():
        msg = f"{directory} has no config.json; name a directory in Hugging Face's layout."
        raise FileNotFoundError(msg)
    generation = directory / "generation_config.json"
    with files.reading(directory):
        stated = files.read_json(path)
        if isinstance(stated, dict) and "quantization_config" in stated:
            stated = dict(stated)
            convert.check_quantization_config(stated.pop("quantization_config"))
        return ModelConfig.from_hf(stated, files.read_json(generation) if generation.exists() else None)


def _read_base(
    directory: Path, config: ModelConfig, dtype: str, quantization: str | None, mesh: Mesh | None
) -> dict[str, Any]:
    """The base's leaves by path, on the devices; those of the vision tower below "vision"."""
    source = convert.QuantizedSource(convert.SafetensorsSource.from_checkpoint(directory), dtype)
    shapes = checkpoint_shapes(config)
    what = f"The checkpoint {directory}"
    table = _table(config, source, what)
    tensors: dict[str, list[tuple[str, convert.Target]]] = {path: [] for path in shapes}
    for name, (target, _) in convert.check_tensors(table, source, shapes, what).items():
        tensors[target.path].append((name, target))

    def place(path, shape, part=None):
        return None if mesh is None else sharding_for(path if part is None else f"{path}/{part}", shape, mesh)

    def size_of_a_tensor(path):
        return math.prod(shapes[path]) // len(tensors[path])

    leaves: dict[str, Any] = {}
    # The largest first, because a mapped tensor adds to the memory of the leaves read before it.
    for path in sorted(shapes, key=size_of_a_tensor, reverse=True):
        shape = shapes[path]
        try:
            if path.startswith("layers/") and path.endswith("/kernel"):
                leaves[path] = _read_kernel(source, tensors[path], shape, dtype, quantization, partial(place, path))
            else:
                numpy_dtype = convert.numpy_dtype(dtype)
                leaves[path] = read_leaf(source, tensors[path], shape, numpy_dtype, place(path, shape))
        except ValueError as error:
            msg = f"{what}: {error}"
            raise ValueError(msg) from error
    return leaves


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of everything that a checkpoint holds, by path: the base, and a vision tower below "vision"."""
    tower = {} if config.vision is None else vision_shapes(config.vision)
    return base_shapes(config) | {f"vision/{path}": shape for path, shape in tower.items()}


def _table(config: ModelConfig, source: convert.QuantizedSource, what: str) -> convert.Table:
    """The table of names, for a tied checkpoint as it happens to store its embedding."""
    table = convert.base_table(config, convert.LlavaLayout.of(source.shapes()))
    head = table.rule_of("lm_head/kernel").name
    embedding = table.rule_of("embed_tokens/embedding").name
    if config.tied_embeddings and embedding not in source.shapes():
        return table.renamed("embed_tokens/embedding", head)  # the one matrix under its other name
    if not (config.tied_embeddings and head in source.shapes()):
        return table
    # A separate head may be ignored only if it equals the embedding.
    left, right = source.read(head), source.read(embedding)
    if left.shape != right.shape or not all(
        np.array_equal(left[row : row + 1024], right[row : row + 1024]) for row in range(0, len(left), 1024)
    ):
        msg = f"{what} states tie_word_embeddings, but its {head} differs from {embedding}."
        raise ValueError(msg)
    return dataclasses.replace(table, ignored=(*table.ignored, head.replace(".", r"\.")))


def _read_kernel(
    source: convert.QuantizedSource,
    tensors: Sequence[tuple[str, convert.Target]],
    shape: tuple[int, ...],
    dtype: str,
    quantization: str | None,
    place: Callable[..., Any],
) -> Any:
    """The kernels of all layers: an array, or a quantised kernel, as they are stored or as is asked for."""
    numpy_dtype = convert.numpy_dtype(dtype)
    stored = [source.kernel(tensors[0][0])]  # says how the others are
    if stored[0] is None and quantization is None:
        return read_leaf(source, tensors, shape, numpy_dtype, place(shape))
    stacks: list[LayerStack] = []
    structure = None
    for layer, (name, target) in enumerate(tensors):
        kernel = stored.pop() if stored else source.kernel(name)
        if kernel is None and quantization is not None:
            weight = target.transform.to_leaf(source.read(name)).T
            finite = aligned_empty(weight.shape, numpy_dtype)
            copy_finite(weight, finite, name)
            kernel = jax.device_get(_quantize(finite, quantization))
        parts, now = jax.tree_util.tree_flatten_with_path(kernel)
        if layer == 0:
            assert kernel is not None
            _check_quantized_as(kernel, quantization)
            structure = now
            for at, part in parts:
                stacked = (len(tensors), *np.shape(part))
                stacks.append(LayerStack(stacked, np.asarray(part).dtype, place(stacked, at[-1].name)))
        if now != structure:
            msg = (
                f"{name} is quantised otherwise than the same kernel of the first layer; all layers have to agree."
            )
            raise ValueError(msg)
        for stack, (_, part) in zip(stacks, parts, strict=True):
            stack.fill(layer, np.asarray(part))
    assert structure is not None
    return jax.tree.unflatten(structure, [stack.on_devices() for stack in stacks])


@partial(jax.jit, static_argnums=1)
def _quantize(weight, quantization: str) -> QuantizedKernel:
    return quantize(weight.T, quantization)


def _check_quantized_as(kernel: QuantizedKernel, quantization: str | None) -> None:
    found = base_quantization({"layers": {"q_proj": {"kernel": kernel}}})
    if quantization not in (None, found):
        msg = f"it is quantised as {found} already, where {quantization} is asked for; leave the quantisation out."
        raise ValueError(msg)


def load_tokenizer(path_or_hub_id: str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint, whose weights are not read; None where it has no tokenizer files.

    It carries `data.PicturePlaces` where the checkpoint has a LLaVA processor.

    Raises:
        FileNotFoundError: neither a directory nor a hub id.
        ValueError: files that are damaged, a tokenizer that is code of its own, which is never run, or a processor
            that cannot be used.
    """
    directory = _local_directory(path_or_hub_id, weights=False)
    if not any((Path(directory) / name).exists() for name in _TOKENIZER_FILES):
        _log.info("%s has no tokenizer files.", directory)
        return None
    # transformers would warn that there is no PyTorch, which nothing here needs.
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    # Importing it takes seconds, which a program without a tokenizer need not wait for.
    from transformers import AutoTokenizer

    with files.reading(directory):
        try:
            tokenizer = AutoTokenizer.from_pretrained(os.fspath(directory), trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            msg = (
                f"{directory}: its tokenizer is code of its own (auto_map), which is never run here; save it as a "
                "fast tokenizer (tokenizer.json) and take auto_map out of its configuration."
            )
            raise ValueError(msg) from error
        attach_places(tokenizer, directory)
    return tokenizer


def save_model(directory: str | os.PathLike[str], model: Model) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer, whole or not at all.

    Args:
        directory: created; may exist if it is empty.
        model: its base is written in the dtype that it has, quantised kernels in the one that they stand for.

    Raises:
        FileExistsError: the directory holds something.
        ValueError: the base does not have the parameters of its configuration; all differences are listed.
    """
    expected = checkpoint_shapes(model.config)
    base = dequantize_base(model.base) | ({} if model.vision is None else {"vision": model.vision})
    leaves = {str(path): np.asarray(leaf) for path, leaf in flatten_dict(base, sep="/").items()}
    got = {path: leaf.shape for path, leaf in leaves.items()}
    if got != expected:
        wrong = [p for p in {**expected, **got} if expected.get(p) != got.get(p)]
        details = "; ".join(f"{p}: got {got.get(p)}, expected {expected.get(p)}" for p in wrong)
        msg = f"The base does not have the parameters of its configuration: {details}."
        raise ValueError(msg)
    hf = model.config.to_hf()
    names = {str(leaf.dtype) for leaf in leaves.values()}
    hf["dtype"] = names.pop() if len(names) == 1 else "float32"
    generation = {name: hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with files.atomic_directory(directory) as temporary:
        files.atomic_write_json(temporary / "config.json", hf)
        files.atomic_write_json(temporary / "generation_config.json", generation)
        tensors = convert.export_tensors(convert.base_table(model.config), leaves)
        convert.write_safetensors(temporary / "model.safetensors", tensors)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(os.fspath(temporary))
        places, vision = places_of(model.tokenizer), model.config.vision
        if places is not None and vision is not None:
            for name, content in places.to_files(vision.patch_size, vision.select).items():
                files.atomic_write_json(temporary / name, content)
