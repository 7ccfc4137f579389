"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways.

Reading is strict in the same way as for models: every field of adapter_config.json is honoured, known to be
inert, or refused by name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llmeraser_jax import convert, files
from llmeraser_jax.lora.config import LoraConfig, resolve_target_modules
from llmeraser_jax.lora.params import Lora, check_lora
from llmeraser_jax.types import AdaptableConfig, AdaptableModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EXTRAS_FILE = "extras.safetensors"  # the leaves that a model's `adapter_extras` names; PEFT does not read it

_HONOURED = frozenset({"r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout"})

# Bookkeeping, or parameters of something that is switched on by another field, which is checked.
_INERT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
        "megatron_core", "layers_pattern", "qalora_group_size", "ensure_weight_tying", "runtime_config",
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
    weights = directory / WEIGHTS_FILE
    if not weights.exists():
        found = sorted(path.name for path in directory.glob("*.bin"))
        hint = f" It holds {', '.join(found)}; convert that to safetensors first." if found else ""
        msg = f"{directory} has no {WEIGHTS_FILE}.{hint}"
        raise FileNotFoundError(msg)
    shapes = {}
    for name in config.target_modules:
        width_in, width_out = model.config.linear_shapes[name]
        shapes[f"layers/{name}/a"] = (model.config.num_layers, config.rank, width_in)
        shapes[f"layers/{name}/b"] = (model.config.num_layers, width_out, config.rank)
    source = convert.SafetensorsSource.from_file(weights)
    leaves = convert.import_tensors(convert.PEFT_TABLE, source, shapes, "float32", f"The adapter {directory}")
    leaves |= _read_extras(directory, model.adapter_extras)
    return Lora(params=jax.tree.map(jnp.asarray, unflatten_dict(leaves, sep="/")), config=config)


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
                problems.append(f"{name} = {value!r} (supported: {choices})")
        elif name not in _HONOURED and name not in _INERT and value not in _OFF:
            problems.append(f"{name} = {value!r}")
    if problems:
        msg = f"{CONFIG_FILE} cannot be honoured: {'; '.join(problems)}."
        raise ValueError(msg)
    targets = peft["target_modules"]
    modules = resolve_target_modules(
        targets if isinstance(targets, str) else tuple(targets), model_config, allow_unmatched=True
    )
    return LoraConfig(
        rank=int(peft["r"]),
        alpha=float(peft["lora_alpha"]),
        target_modules=modules,
        use_rslora=bool(peft.get("use_rslora")),
        dropout=float(peft.get("lora_dropout") or 0.0),
    )


def adapter_config_to_peft(config: LoraConfig, base_model: str | None) -> dict[str, Any]:
    """The content of an adapter_config.json that PEFT and `adapter_config_from_peft` read back.

    Args:
        config: with `target_modules` written out.
        base_model: path or hub id of the base.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": config.rank,
        # PEFT declares a whole number; anything else still works there.
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


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
    check_lora(model.config, model.base, dataclasses.replace(lora, params=layers))
    if isinstance(lora.config.target_modules, str) or set(lora.params["layers"]) != set(lora.config.target_modules):
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
        own = {path: leaf for path, leaf in leaves.items() if path.split("/")[0] not in extras}
        tensors = convert.export_tensors(convert.PEFT_TABLE, own)
        convert.write_safetensors(temporary / WEIGHTS_FILE, tensors)
        if extras:
            others = {path: leaf for path, leaf in leaves.items() if path not in own}
            convert.write_safetensors(temporary / EXTRAS_FILE, others)
