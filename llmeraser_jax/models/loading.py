"""Owns reading and writing models in Hugging Face's layout, without PyTorch."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llmeraser_jax import convert, files
from llmeraser_jax.models.config import ModelConfig
from llmeraser_jax.models.decoder import ApplyDecoder, base_shapes
from llmeraser_jax.types import BaseParams, Key

_log = logging.getLogger(__name__)

_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A base model with its tokenizer.

    Attributes:
        config: what the model is.
        base: frozen parameters, a nested dict; paths and shapes in `models.decoder`.
        tokenizer: a transformers tokenizer, or None where the checkpoint has none.
        path: the directory it was read from, or its hub id; adapters record it.
        mesh: where the base lives; None is the default device.
    """

    config: ModelConfig
    base: BaseParams
    tokenizer: Any = None
    path: str = ""
    mesh: Mesh | None = None

    @property
    def apply(self) -> ApplyDecoder:
        """`(base, lora, tokens, attention_mask, positions=None) -> logits`; a static argument under jit."""
        return ApplyDecoder(self.config)

    @property
    def adapter_extras(self) -> tuple[str, ...]:
        """Names in an adapter's `params` besides "layers": none, unless a subclass's `apply` reads more."""
        return ()

    def init_lora(self, key: Key, config: Any) -> Any:
        """A fresh adapter for this model; see `lora.init_lora`.

        Args:
            key: random key.
            config: a `lora.LoraConfig`.

        Returns:
            A `lora.Lora`.
        """
        # `lora` builds on `models`, so it is not there yet when this module is imported.
        from llmeraser_jax.lora import init_lora

        return init_lora(key, config, self.config)


def load_model(path_or_hub_id: str | os.PathLike[str], dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """Reads a model from a directory, or from the Hugging Face hub where no such directory exists.

    Args:
        path_or_hub_id: a directory with config.json and safetensors, or a hub id such as "org/name".
        dtype: storage dtype of the base: float32, bfloat16, float16, or float64 (with 64-bit JAX). Products are
            computed in float32 or wider whatever it is.
        mesh: shares the base out over its devices.

    Returns:
        The model, its tokenizer None where there are no tokenizer files.

    Raises:
        FileNotFoundError: config.json or the weights are not there.
        ValueError: a config field that is not honoured, or tensors that do not fit; all are listed.
    """
    numpy_dtype = convert.numpy_dtype(dtype)
    if jax.dtypes.canonicalize_dtype(numpy_dtype) != numpy_dtype:
        msg = f"dtype is {dtype!r}, which needs jax.config.update('jax_enable_x64', True)."
        raise ValueError(msg)
    directory = _local_directory(path_or_hub_id)
    config = read_config(directory)
    leaves = _read_base(directory, config, dtype)
    base = unflatten_dict(leaves, sep="/")
    if mesh is None:
        base = jax.tree.map(jnp.asarray, base)
    else:
        from llmeraser_jax.parallel import shard_base

        base = shard_base(base, mesh)
    is_local = Path(path_or_hub_id).is_dir()
    return Model(
        config=config,
        base=base,
        tokenizer=load_tokenizer(directory),
        path=str(directory.resolve()) if is_local else str(path_or_hub_id),
        mesh=mesh,
    )


def _local_directory(path_or_hub_id: str | os.PathLike[str]) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    # A hub id has at most one slash and no leading one; anything else was meant as a path.
    name = str(path_or_hub_id)
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.exists():
        msg = f"{name} is not a directory with a model, nor a hub id such as 'org/name'."
        raise FileNotFoundError(msg)
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))


def read_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a checkpoint, end-of-sequence tokens of generation_config.json included.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: a field that is not honoured; see `ModelConfig.from_hf`.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not path.exists():
        msg = f"{directory} has no config.json; name a directory in Hugging Face's layout."
        raise FileNotFoundError(msg)
    generation = directory / "generation_config.json"
    return ModelConfig.from_hf(files.read_json(path), files.read_json(generation) if generation.exists() else None)


def _read_base(directory: Path, config: ModelConfig, dtype: str) -> dict[str, np.ndarray]:
    source = convert.SafetensorsSource.from_checkpoint(directory)
    shapes = base_shapes(config)
    table = convert.BASE_TABLES[config.model_type]
    what = f"The checkpoint {directory}"
    head = table.rule_of("lm_head/kernel").name
    embedding = table.rule_of("embed_tokens/embedding").name
    if config.tied_embeddings and embedding not in source.shapes():
        table = table.renamed("embed_tokens/embedding", head)  # the one matrix under its other name
        return convert.import_tensors(table, source, shapes, dtype, what)
    if not (config.tied_embeddings and head in source.shapes()):
        return convert.import_tensors(table, source, shapes, dtype, what)
    # Some tied checkpoints carry the head as well. Passing over it is right only where it is the embedding.
    tied = dataclasses.replace(table, ignored=(*table.ignored, head.replace(".", r"\.")))
    leaves = convert.import_tensors(tied, source, shapes, dtype, what)
    if not np.array_equal(source.read(head), source.read(embedding)):
        msg = f"{what} states tie_word_embeddings, but its {head} differs from {embedding}."
        raise ValueError(msg)
    return leaves


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint; None where it has no tokenizer files."""
    if not any((Path(directory) / name).exists() for name in _TOKENIZER_FILES):
        _log.info("%s has no tokenizer files.", directory)
        return None
    # Importing transformers takes seconds, which a program without a tokenizer need not wait for.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.fspath(directory))


def save_model(directory: str | os.PathLike[str], model: Model) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer, whole or not at all.

    Args:
        directory: created; may exist if it is empty.
        model: its base is written in the dtype that it has.

    Raises:
        FileExistsError: the directory holds something.
        ValueError: the base does not have the parameters of its configuration; all differences are listed.
    """
    expected = base_shapes(model.config)
    leaves = {str(path): np.asarray(leaf) for path, leaf in flatten_dict(model.base, sep="/").items()}
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
        tensors = convert.export_tensors(convert.BASE_TABLES[model.config.model_type], leaves)
        convert.write_safetensors(temporary / "model.safetensors", tensors)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(os.fspath(temporary))
