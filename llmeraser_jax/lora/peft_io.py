"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways.

Reading is strict in the same way as for models: every field of adapter_config.json is honoured, known to be
inert, or refused by name.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llmeraser_jax import convert, files
from llmeraser_jax.lora.config import LoraConfig, Stack, adaptable_stacks, adapted_modules, resolve_config
from llmeraser_jax.lora.copies import COPIES, copied_leaves, with_vocabulary_of
from llmeraser_jax.lora.params import Lora, check_lora, low_rank_updates
from llmeraser_jax.text import show
from llmeraser_jax.types import AdaptableConfig, AdaptableModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EXTRAS_FILE = "extras.safetensors"  # the leaves that a model's `adapter_extras` names; PEFT does not read it

_HONOURED = frozenset(
    {
        "r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern",
        "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save",
    }
)  # fmt: skip

# Bookkeeping, or parameters of something that is switched on by another field, which is checked.
_INERT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
        "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config", "eva_config",
    }
)  # fmt: skip

# The initialisations that leave the base alone; PiSSA, OLoRA, LoftQ and the like change its weights.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")

_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": _PLAIN_INITS,
}

_IN_THE_BASE = "put what was trained into the base, save that, and leave {name} out of the adapter"
_TIED = (
    "ensure_weight_tying = true ties the copies of embedding and head; here each is trained by itself. Put what "
    "was trained into the base, and leave modules_to_save out of the adapter"
)
_PEFT_PREFIX = "base_model.model."
_CONVERT = "save it with path_initial_model_for_weight_conversion, which makes it an adapter of the base as it was"

# What one can do about fields that are not honoured.
_REMEDIES = {
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
    with files.reading(directory), np.errstate(over="ignore"):  # beyond float32 is infinity, which is refused
        return _load_adapter(directory, model)


def _load_adapter(directory: Path, model: AdaptableModel) -> Lora:
    stated = _read_config(directory)
    config = adapter_config_from_peft(stated, model.config)
    source = _weights(directory)
    stored = {name: shape for name, (shape, _) in source.shapes().items()}
    config = with_vocabulary_of(config, model.base, stored) if config.modules_to_save else config
    copied = copied_leaves(config, model.config, model.base)
    if stated.get("ensure_weight_tying") and copied and "lm_head" not in model.base:
        msg = f"{directory / CONFIG_FILE} cannot be honoured: {_TIED}."
        raise ValueError(msg)
    stacks = _adapted_stacks(config, model.config)
    leaves, shapes = {}, {}
    for module, stack in stacks.items():
        rank = config.stack_rank(module, stack.count)
        leaves[f"{stack.group}/{module}/a"] = np.zeros((stack.count, rank, stack.inputs), np.float32)
        leaves[f"{stack.group}/{module}/b"] = np.zeros((stack.count, stack.outputs, rank), np.float32)
    names = convert.peft_table(model.config, source.shapes())
    places = {name: (path, place) for name, path, place in _tensors(config, stacks, names)}
    for name, (path, place) in places.items():
        shapes[name] = leaves[path][place].shape
    shapes |= {path: shape for path, (_, shape) in copied.items()}
    # Where the vocabulary was resized, PEFT also saves how an embedding was before training, and its copy again.
    ignored = (r".*\.(original_module|modules_to_save)\.\w+",) if copied else ()
    table = convert.Table((*(convert.Rule(name, name) for name in places), *_copy_rules(copied)), ignored)
    tensors = convert.import_tensors(table, source, shapes, "float32", f"The adapter {directory}")
    for name, (path, place) in places.items():
        leaves[path][place] = tensors[name]
    leaves |= {f"{COPIES}/{path}": tensors[path] for path in copied}
    leaves |= _read_extras(directory, model.adapter_extras)
    broken = [path for path, leaf in leaves.items() if not np.all(np.isfinite(leaf))]
    if broken:
        msg = (
            f"The adapter {directory} holds nan, infinity or numbers beyond float32 in {', '.join(broken[:5])} "
            f"({len(broken)} of {len(leaves)} matrices); its training diverged or the file is damaged."
        )
        raise ValueError(msg)
    return Lora(params=jax.tree.map(jax.device_put, unflatten_dict(leaves, sep="/")), config=config)


def _weights(directory: Path) -> convert.SafetensorsSource:
    path = directory / WEIGHTS_FILE
    if not path.exists():
        found = sorted(path.name for path in directory.glob("*.bin"))
        hint = f" It holds {', '.join(found)}; convert that to safetensors first." if found else ""
        msg = f"{directory} has no {WEIGHTS_FILE}.{hint}"
        raise FileNotFoundError(msg)
    return convert.SafetensorsSource.from_file(path)


def _adapted_stacks(config: LoraConfig, model_config: AdaptableConfig) -> dict[str, Stack]:
    """The stacks of the modules that carry an adapter."""
    stacks = adaptable_stacks(model_config)
    return {name: stacks[name] for name in adapted_modules(config, model_config)}


def _tensors(
    config: LoraConfig, stacks: Mapping[str, Stack], table: convert.Table
) -> Iterator[tuple[str, str, Any]]:
    """Every tensor of an adapter in PEFT's file: its name, the leaf that it is part of, and the part."""
    for module, stack in stacks.items():
        for side in "ab":
            path = f"{stack.group}/{module}/{side}"
            name = table.rule_of(path).name
            for layer in range(stack.count):
                rank = config.rank_of(module, layer)
                if rank:
                    place = (layer, slice(rank)) if side == "a" else (layer, slice(None), slice(rank))
                    yield name.replace("{layer}", str(layer)), path, place


def _copy_rules(copied: Mapping[str, tuple[convert.Rule, Any]]) -> tuple[convert.Rule, ...]:
    """The rules of trained copies as PEFT names them."""
    return tuple(dataclasses.replace(rule, name=_PEFT_PREFIX + rule.name) for rule, _ in copied.values())


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


def copy_adapter(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies the files of an adapter, byte for byte, into the new directory `target`.

    Raises:
        FileNotFoundError: the configuration or the weights are missing.
        FileExistsError: `target` is there.
    """
    source, target = Path(source), Path(target)
    target.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE, EXTRAS_FILE):
        if name != EXTRAS_FILE or (source / name).exists():
            shutil.copyfile(source / name, target / name)


def read_adapter_base(directory: str | os.PathLike[str]) -> str | None:
    """The base model that an adapter says it was trained on (`base_model_name_or_path`).

    Raises:
        FileNotFoundError: there is no adapter_config.json.
    """
    with files.reading(directory):
        named = _read_config(Path(directory)).get("base_model_name_or_path")
        if not (named is None or isinstance(named, str)):
            msg = f"{Path(directory) / CONFIG_FILE}: base_model_name_or_path is {show(named)}; expected a string."
            raise ValueError(msg)
        return named


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
    targets = peft.get("target_modules")
    if not targets:
        problems.append("target_modules is missing")
    for name in ("target_modules", "exclude_modules"):
        given = peft.get(name)
        if given and not isinstance(given, str) and not _is_list_of(given, str):
            problems.append(f"{name} = {show(given)} (expected a string or a list of strings)")
    if not (
        type(peft.get("layers_to_transform")) is int or _is_list_of(peft.get("layers_to_transform") or [], int)
    ):
        problems.append(f"layers_to_transform = {show(peft['layers_to_transform'])} (expected a list of layers)")
    for name in ("r", "lora_alpha", "lora_dropout"):
        given = peft.get(name)
        if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
            problems.append(f"{name} = {show(given)} (expected a number)")
    for name, value in peft.items():
        if name in _REQUIRED_VALUES:
            # `in` would take 1 for True.
            if not any(value is v or (isinstance(v, str) and value == v) for v in _REQUIRED_VALUES[name]):
                choices = " or ".join(repr(v) for v in _REQUIRED_VALUES[name])
                problems.append(f"{show(name)[1:-1]} = {show(value)} (supported: {choices}{_remedy(name)})")
        elif name not in _HONOURED and name not in _INERT and value not in _OFF:
            remedy = _remedy(name).removeprefix("; ")
            problems.append(f"{show(name)[1:-1]} = {show(value)}" + (f" ({remedy})" if remedy else ""))
    pattern = peft.get("layers_pattern")
    if peft.get("layers_to_transform") not in (None, []) and pattern not in (None, "", [], "layers", ["layers"]):
        problems.append(f"layers_pattern = {show(pattern)} (the layers of this model are called 'layers')")
    for name in ("rank_pattern", "alpha_pattern"):
        given = peft.get(name) or {}
        if not (isinstance(given, Mapping) and all(type(value) in (int, float) for value in given.values())):
            problems.append(f"{name} = {show(given)} (expected an object of numbers)")
    saved = peft.get("modules_to_save") or []
    if not (isinstance(saved, list | tuple) and all(isinstance(name, str) and name for name in saved)):
        problems.append(f"modules_to_save = {show(saved)} (expected a list of names)")
    if problems:
        msg = f"{CONFIG_FILE} cannot be honoured: {'; '.join(problems)}."
        raise ValueError(msg)
    excluded, layers = peft.get("exclude_modules"), peft.get("layers_to_transform")
    config = LoraConfig(
        rank=peft["r"],
        alpha=float(peft["lora_alpha"]),
        target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
        use_rslora=bool(peft.get("use_rslora")),
        dropout=float(peft.get("lora_dropout") or 0.0),
        exclude_modules=(excluded if isinstance(excluded, str) else tuple(excluded)) if excluded else None,
        layers_to_transform=(layers,) if type(layers) is int else tuple(layers or ()) or None,
        rank_pattern=dict(peft.get("rank_pattern") or {}),
        alpha_pattern={key: float(alpha) for key, alpha in (peft.get("alpha_pattern") or {}).items()},
        modules_to_save=tuple(saved),
    )
    return resolve_config(config, model_config, allow_unmatched=True)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is kind for item in value)


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
        "modules_to_save": list(config.modules_to_save) or None,
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
    check_lora(model.config, dataclasses.replace(lora, params=layers), model.base)
    stacks = _adapted_stacks(lora.config, model.config)
    held = {name for _, name, _ in low_rank_updates(dataclasses.replace(lora, params=layers))}
    if isinstance(lora.config.target_modules, str) or held != set(stacks):
        msg = (
            f"The adapter's configuration names {lora.config.target_modules!r}, its parameters "
            f"{sorted(held)}; build it with init_lora or load_adapter."
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
        places = _tensors(lora.config, stacks, convert.peft_table(model.config))
        tensors = {name: leaves[path][place] for name, path, place in places}
        copied = copied_leaves(lora.config, model.config, model.base)
        tensors |= convert.export_tensors(
            convert.Table(_copy_rules(copied)), {path: leaves[f"{COPIES}/{path}"] for path in copied}
        )
        convert.write_safetensors(temporary / WEIGHTS_FILE, tensors)
        if extras:
            others = {path: leaf for path, leaf in leaves.items() if path.split("/")[0] in extras}
            convert.write_safetensors(temporary / EXTRAS_FILE, others)
