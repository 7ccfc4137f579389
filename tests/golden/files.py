"""Reads the golden files back as checkpoint and adapter directories."""

import json
import pathlib

import numpy as np

from llmeraser_jax.convert import write_safetensors
from tests.golden.cases import write_checkpoint

HERE = pathlib.Path(__file__).parent


def load(name):
    """The content of a golden file."""
    with np.load(HERE / f"{name}.npz") as file:
        return dict(file)


def _with_prefix(content, prefix):
    return {key[len(prefix) :]: value for key, value in content.items() if key.startswith(prefix)}


def tensors(content):
    """The checkpoint's tensors by name."""
    return _with_prefix(content, "w:")


def checkpoint(content, directory):
    """Writes the checkpoint."""
    return write_checkpoint(directory, json.loads(str(content["config"])), tensors(content))


def adapter_tensors(content):
    """The adapter's tensors by name."""
    return _with_prefix(content, "a:")


def adapter(content, directory):
    """Writes the adapter as PEFT did."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(str(content["adapter_config"]))
    write_safetensors(directory / "adapter_model.safetensors", adapter_tensors(content))
    return directory
