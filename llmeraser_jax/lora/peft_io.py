"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways.

Reading is strict in the same way as for models: every field of adapter_config.json is honoured, known to be
inert, or refused by name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llmeraser_jax import convert, files
from llmeraser_jax.lora.config import LoraConfig, adapted_modules, resolve_config
from llmeraser_jax.lora.params import Lora, check_lora
from llmeraser_jax.types import AdaptableConfig, AdaptableModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EXTRAS_FILE = "extras.safetensors"  # the leaves that a model's `adapter_extras` names; PEFT does not read it

_HONOURED = frozenset(
    {
        "r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern",
        "layers_to_transform", "layers_pattern", "exclude_modules",
    }
)  # fmt: skip

# Bookkeeping, or parameters of something that is switched on by another field, which is checked.
_INERT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
        "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config",
    }
)  # fmt: skip

# The initialisations that leave the base alone; PiSSA, OLoRA, LoftQ and the like change its weights.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")

_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": _PLAIN_INITS,
}

_IN_THE_BASE = "put what was trained into the base, save that, and leave {name} out of the adapter"
_CONVERT = "save it with path_initial_model_for_weight_conversion, which makes it an adapter of the base as it was"

# What one can do about fields that are not honoured.
_REMEDIES = {
    "modules_to_save": _IN_THE_BASE,
    "trainable_token_indices": _IN_THE_BASE,
    "init_lora_weights": _CONVERT,
    "target_parameters": "only linear layers can carry an adapter here; train with target_modules",
    "use_dora": "DoRA's magnitudes are no part of the adapters here; train without",
    "lora_bias": "adapters here have no biases; train without",
    "bias": "adapters here have no biases; train without",
    "layer_replication": "save the model with the layers that it repeats",
}

# At these values any field of PEFT's is off.
_OFF = (None, False, {}, [])


def load_adapter(directory: str | os.PathLike[str], model: AdaptableModel) -> Lora:
    """Reads a PEFT adapter.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        model: the base it belongs to.

    Returns:
        The adapter in float32, whatever it is stored in, its `target_modules` written out.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a field of the configuration that is not honoured, or tensors that do not fit; all of
            them are listed.
    """
    directory = Path(directory)
    config = adapter_config_from_peft(_read_config(directory), model.config)
    modules, num_layers = adapted_modules(config, model.config), model.config.num_layers
    weights = directory / WEIGHTS_FILE
    if not weights.exists():
        found = sorted(path.name for path in directory.glob("*.bin"))
        hint = f" It holds {', '.join(found)}; convert that to safetensors first." if found else ""
        msg = f"{directory} has no {WEIGHTS_FILE}.{hint}"
        raise FileNotFoundError(msg)
    leaves, shapes = {}, {}
    for module in modules:
        width_in, width_out = model.config.linear_shapes[module]
        rank = config.stack_rank(module, num_layers)
        leaves[f"layers/{module}/a"] = np.zeros((num_layers, rank, width_in), np.float32)
        leaves[f"layers/{module}/b"] = np.zeros((num_layers, width_out, rank), np.float32)
    places = {name: (path, place) for name, path, place in _tensors(config, modules, num_layers)}
    for name, (path, place) in places.items():
        shapes[name] = leaves[path][place].shape
    table = convert.Table(tuple(convert.Rule(name, name) for name in places))
    source = convert.SafetensorsSource.from_file(weights)
    tensors = convert.import_tensors(table, source, shapes, "float32", f"The adapter {directory}")
    for name, (path, place) in places.items():
        leaves[path][place] = tensors[name]
    leaves |= _read_extras(directory, model.adapter_extras)
    return Lora(params=jax.tree.map(jnp.asarray, unflatten_dict(leaves, sep="/")), config=config)


def _tensors(config: LoraConfig, modules: tuple[str, ...], num_layers: int) -> Iterator[tuple[str, str, Any]]:
    """Every tensor of an adapter in PEFT's file: its name, the leaf that it is part of, and the part."""
    for module in modules:
        for side in "ab":
            path = f"layers/{module}/{side}"
            name = convert.PEFT_TABLE.rule_of(path).name
            for layer in range(num_layers):
                rank = config.rank_of(module, layer)
                if rank:
                    place = (layer, slice(rank)) if side == "a" else (layer, slice(None), slice(rank))
                    yield name.replace("{layer}", str(layer)), path, place


def _read_extras(directory: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    if not names:
        return {}
    source = convert.SafetensorsSource.from_file(directory / EXTRAS_FILE)
    leaves = {path: source.read(path).astype(np.float32) for path in source.shapes()}
    found = sorted({path.split("/")[0] for path in leaves})
    if found != sorted(names):
        msg = f"{directory / EXTRAS_FILE} holds {', '.join(found)}; this model needs {', '.join(sorted(names))}."
        raise ValueError(msg)
    return leaves


def read_adapter_base(directory: str | os.PathLike[str]) -> str | None:
    """The base model that an adapter says it was trained on (`base_model_name_or_path`).

    Raises:
        FileNotFoundError: there is no adapter_config.json.
    """
    return _read_config(Path(directory)).get("base_model_name_or_path")


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.exists():
        msg = f"{directory} has no {CONFIG_FILE}; name a directory that PEFT saved."
        raise FileNotFoundError(msg)
    content = files.read_json(path)
    if not isinstance(content, dict):
        msg = f"{path} holds a {type(content).__name__}, not an object."
        raise ValueError(msg)
    return content


def adapter_config_from_peft(peft: Mapping[str, Any], model_config: AdaptableConfig) -> LoraConfig:
    """Reads the content of an adapter_config.json.

    Args:
        peft: its content.
        model_config: the base, against which `target_modules` is resolved.

    Raises:
        ValueError: fields that are missing or not honoured, all of them listed by name.
    """
    problems = [f"{name} is missing" for name in ("peft_type", "r", "lora_alpha") if peft.get(name) is None]
    if not peft.get("target_modules"):
        problems.append("target_modules is missing")
    for name, value in peft.items():
        if name in _REQUIRED_VALUES:
            # `in` would take 1 for True.
            if not any(value is v or (isinstance(v, str) and value == v) for v in _REQUIRED_VALUES[name]):
                choices = " or ".join(repr(v) for v in _REQUIRED_VALUES[name])
                problems.append(f"{name} = {value!r} (supported: {choices}{_remedy(name)})")
        elif name not in _HONOURED and name not in _INERT and value not in _OFF:
            remedy = _remedy(name).removeprefix("; ")
            problems.append(f"{name} = {value!r}" + (f" ({remedy})" if remedy else ""))
    pattern = peft.get("layers_pattern")
    if peft.get("layers_to_transform") not in (None, []) and pattern not in (None, "", [], "layers", ["layers"]):
        problems.append(f"layers_pattern = {pattern!r} (the layers of this model are called 'layers')")
    for name in ("rank_pattern", "alpha_pattern"):
        given = peft.get(name) or {}
        if not (isinstance(given, Mapping) and all(type(value) in (int, float) for value in given.values())):
            problems.append(f"{name} = {given!r} (expected an object of numbers)")
    if problems:
        msg = f"{CONFIG_FILE} cannot be honoured: {'; '.join(problems)}."
        raise ValueError(msg)
    targets, excluded, layers = peft["target_modules"], peft.get("exclude_modules"), peft.get("layers_to_transform")
    config = LoraConfig(
        rank=int(peft["r"]),
        alpha=float(peft["lora_alpha"]),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(peft.get("use_rslora")),
        dropout=float(peft.get("lora_dropout") or 0.0),
        exclude_modules=(excluded if isinstance(excluded, str) else tuple(excluded)) if excluded else None,
        layers_to_transform=(layers,) if type(layers) is int else tuple(layers or ()) or None,
        rank_pattern=dict(peft.get("rank_pattern") or {}),
        alpha_pattern={key: float(alpha) for key, alpha in (peft.get("alpha_pattern") or {}).items()},
    )
    return resolve_config(config, model_config, allow_unmatched=True)


def _remedy(name: str) -> str:
    return f"; {_REMEDIES[name].format(name=name)}" if name in _REMEDIES else ""


def adapter_config_to_peft(config: LoraConfig, base_model: str | None) -> dict[str, Any]:
    """The content of an adapter_config.json that PEFT and `adapter_config_from_peft` read back.

    Args:
        config: with `target_modules` written out.
        base_model: path or hub id of the base.
    """
    excluded, layers = config.exclude_modules, config.layers_to_transform
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "exclude_modules": excluded if excluded is None or isinstance(excluded, str) else list(excluded),
        "layers_to_transform": None if layers is None else list(layers),
        "layers_pattern": None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _whole(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_dora": False,
    }


def _whole(alpha: float) -> int | float:
    """PEFT declares whole numbers; anything else still works there."""
    return int(alpha) if float(alpha).is_integer() else alpha


def save_adapter(directory: str | os.PathLike[str], lora: Lora, model: AdaptableModel) -> None:
    """Writes an adapter as PEFT does, in float32, whole or not at all.

    Args:
        directory: created; may exist if it is empty.
        lora: the adapter.
        model: its base, whose path is recorded.

    Raises:
        FileExistsError: the directory holds something.
        ValueError: the adapter does not fit the model, or holds numbers that are not finite.
    """
    extras = {name: lora.params[name] for name in model.adapter_extras}
    layers = {name: leaves for name, leaves in lora.params.items() if name not in extras}
    check_lora(model.config, dataclasses.replace(lora, params=layers))
    modules = adapted_modules(lora.config, model.config)
    if isinstance(lora.config.target_modules, str) or set(lora.params["layers"]) != set(modules):
        msg = (
            f"The adapter's configuration names {lora.config.target_modules!r}, its parameters "
            f"{sorted(lora.params['layers'])}; build it with init_lora or load_adapter."
        )
        raise ValueError(msg)
    leaves = {
        str(path): np.asarray(leaf, dtype=np.float32) for path, leaf in flatten_dict(lora.params, sep="/").items()
    }
    broken = [path for path, leaf in leaves.items() if not np.all(np.isfinite(leaf))]
    if broken:
        msg = f"The adapter holds nan or infinity in {', '.join(broken)}; it is not saved."
        raise ValueError(msg)
    with files.atomic_directory(directory) as temporary:
        config = adapter_config_to_peft(lora.config, model.path or None)
        files.atomic_write_json(temporary / CONFIG_FILE, config)
        places = _tensors(lora.config, modules, model.config.num_layers)
        tensors = {name: leaves[path][place] for name, path, place in places}
        convert.write_safetensors(temporary / WEIGHTS_FILE, tensors)
        if extras:
            others = {path: leaf for path, leaf in leaves.items() if path.split("/")[0] in extras}
            convert.write_safetensors(temporary / EXTRAS_FILE, others)
