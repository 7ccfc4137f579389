"""Owns trained copies: modules that an adapter holds whole, in place of the base's (PEFT's `modules_to_save`).

The copies are the part `COPIES` of an adapter's parameters: a nested dict with the paths of the base's own
leaves, so that applying an adapter is a replacement of leaves. Which leaves a module name means, and what they are
called on disk, both come from the conversion table of the base's family.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from llmeraser_jax import convert
from llmeraser_jax.convert import dequantized
from llmeraser_jax.lora.config import LoraConfig, adaptable_stacks
from llmeraser_jax.types import AdaptableConfig, BaseParams

COPIES = "copies"
_EMBEDDING, _HEAD = "embed_tokens/embedding", "lm_head/kernel"
_UNDECAYED = ("scale", "bias")  # transformers' Trainer gives norms and biases no weight decay


def copied_leaves(
    config: LoraConfig, model_config: AdaptableConfig, base: BaseParams
) -> dict[str, tuple[convert.Rule, tuple[int, ...]]]:
    """Paths of the leaves that an adapter holds copies of, each with its rule on disk and its shape.

    Module names are matched as PEFT does: those that end with one of `modules_to_save`.

    Args:
        config: of the adapter.
        model_config: the base model.
        base: its parameters; only shapes are read.

    Raises:
        ValueError: a name that selects nothing, or something that cannot be copied: a module without parameters of
            its own, one that is copied in some layers only, or one that carries an adapter; or tokens are added
            though embedding or head is not copied.
    """
    if not config.modules_to_save:
        return {}
    wanted = {name for name in model_config.module_names if name.endswith(config.modules_to_save)}
    shapes = _shapes(base)
    found, parts, used = {}, [], set()
    # As `module_names` and PEFT's files name the parts of a model that sees pictures.
    layout = convert.LlavaLayout.of(model_config.module_names)
    for rule in convert.base_table(model_config, layout).rules:
        module = rule.name.rpartition(".")[0]
        layers = range(model_config.num_layers) if "{layer}" in module else (0,)
        names = {module.replace("{layer}", str(layer)) for layer in layers}
        covered = {name: _covering(name, wanted) for name in names}
        if rule.path in shapes and any(covered.values()):
            found[rule.path] = rule, shapes[rule.path]
            parts += sorted(name for name in names if covered[name] is None)
            used |= {*names, *filter(None, covered.values())}
    if config.vocab_size is not None:
        shapes = _with_tokens_added(config, shapes, found)
        found = {path: (rule, shapes[path]) for path, (rule, _) in found.items()}
    modules = adaptable_stacks(model_config)
    adapted = [name for name in used if name.rpartition(".")[2] in modules and _rank_of(name, config) > 0]
    problems = [
        (
            [name for name in config.modules_to_save if not any(module.endswith(name) for module in wanted)],
            f"select no module of this {model_config.model_type} model, whose embedding is 'embed_tokens', head "
            "'lm_head' and last norm 'model.norm'",
        ),
        (sorted(wanted - used), "have no parameters of their own here; name the modules inside"),
        (parts, "are left out though other layers' are named; name the module in all layers"),
        (sorted(adapted), "carry a low-rank update too; name them once"),
    ]
    for names, problem in problems:
        if names:
            msg = f"modules_to_save: {', '.join(map(repr, names[:5]))} {problem}."
            raise ValueError(msg)
    return found


def _covering(name: str, wanted: Collection[str]) -> str | None:
    """The module of `wanted` that is the named one or holds it; None where there is none."""
    parts = name.split(".")
    ends = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((end for end in ends if end in wanted), None)


def _rank_of(name: str, config: LoraConfig) -> int:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return config.rank_of(name.rpartition(".")[2], int(layer[1]) if layer else 0)


def _shapes(base: BaseParams) -> dict[str, tuple[int, ...]]:
    """Shapes by path; the head of a tied base is its embedding."""
    leaves: dict[str, Any] = flatten_dict(base, sep="/")
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if _HEAD not in shapes and _EMBEDDING in shapes:
        shapes[_HEAD] = shapes[_EMBEDDING][::-1]
    return shapes


def _with_tokens_added(
    config: LoraConfig, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    size, before = config.vocab_size, shapes[_EMBEDDING][0]
    if size is None or size < before or not (_EMBEDDING in found and _HEAD in found):
        msg = (
            f"vocab_size is {size}, and the base has {before} tokens; tokens can be added where 'embed_tokens' and "
            f"'lm_head' are both among modules_to_save, and these are {list(config.modules_to_save)}."
        )
        raise ValueError(msg)
    return {**shapes, _EMBEDDING: (size, shapes[_EMBEDDING][1]), _HEAD: (shapes[_HEAD][0], size)}


def with_vocabulary_of(config: LoraConfig, base: BaseParams, stored: Mapping[str, Any]) -> LoraConfig:
    """The configuration with the number of tokens of stored copies of embedding and head, where it is larger.

    Args:
        config: of an adapter.
        base: the base model's parameters.
        stored: shapes on disk by name; the first axis of embedding and head counts tokens.
    """
    rows = {shape[0] for name, shape in stored.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    more = len(rows) == 1 and max(rows) > _shapes(base)[_EMBEDDING][0]
    return dataclasses.replace(config, vocab_size=rows.pop()) if more else config


def fresh_copies(config: LoraConfig, model_config: AdaptableConfig, base: BaseParams) -> dict[str, Any]:
    """The base's own modules in float32, which is what training starts from; empty where nothing is copied.

    An added token begins as the mean of all others.
    """
    leaves: dict[str, Any] = flatten_dict(base, sep="/")

    def copy(path, shape):
        leaf = leaves[path] if path in leaves else leaves[_EMBEDDING].T  # the head of a tied base
        leaf = jnp.array(dequantized(leaf), jnp.float32)
        widths = [(0, wanted - got) for wanted, got in zip(shape, leaf.shape, strict=True)]
        return jnp.pad(leaf, widths, mode="mean") if any(map(sum, widths)) else leaf

    copied = copied_leaves(config, model_config, base)
    return unflatten_dict({path: copy(path, shape) for path, (_, shape) in copied.items()}, sep="/")


def check_copies(config: LoraConfig, model_config: AdaptableConfig, base: BaseParams, copies: Any) -> None:
    """Refuses copies that are not those that the configuration names.

    Raises:
        ValueError: a leaf missing, unknown or of another shape; the message names it.
    """
    expected = {path: shape for path, (_, shape) in copied_leaves(config, model_config, base).items()}
    leaves: dict[str, Any] = flatten_dict(copies, sep="/")
    got = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if got != expected:
        wrong = [path for path in {**expected, **got} if expected.get(path) != got.get(path)]
        details = "; ".join(f"{p} is {got.get(p, 'missing')}, expected {expected.get(p, 'none')}" for p in wrong)
        msg = f"The adapter's copies are not those of modules_to_save = {list(config.modules_to_save)}: {details}."
        raise ValueError(msg)


def with_copies(base: BaseParams, copies: Mapping[str, Any], *, as_stored: bool = False) -> BaseParams:
    """The base with copies in place of its own leaves.

    A tied base whose embedding or head is copied gets a head of its own, as in PEFT: the one of the two that is not
    copied stays as it was.

    Args:
        base: frozen parameters.
        copies: nested dict with paths of the base.
        as_stored: each copy is rounded to the dtype of the leaf that it replaces.
    """
    if not copies:
        return base
    leaves: dict[str, Any] = flatten_dict(base, sep="/")
    replaced: dict[str, Any] = flatten_dict(copies, sep="/")
    if _HEAD not in leaves and (_EMBEDDING in replaced or _HEAD in replaced):
        leaves[_HEAD] = leaves[_EMBEDDING].T
    if as_stored:
        dtypes = {path: jax.eval_shape(dequantized, leaves[path]).dtype for path in replaced}
        replaced = {path: leaf.astype(dtypes[path]) for path, leaf in replaced.items()}
    return unflatten_dict({**leaves, **replaced}, sep="/")


def check_no_l2(config: Any, l2: float) -> None:
    """Refuses an L2 term where modules are copied.

    It would pull them to zero, first of all the rows of tokens that no example has. No trainer does that: AdamW's
    decay is no part of the loss, and acts as `is_decayed` says.

    Args:
        config: of an adapter; of anything else, nothing is refused.
        l2: lambda of the loss.

    Raises:
        ValueError: `l2` is above 0 and the adapter holds copies.
    """
    if l2 and isinstance(config, LoraConfig) and config.modules_to_save:
        msg = (
            f"l2 is {l2:g}, which would pull the trained copies of {', '.join(config.modules_to_save)} to zero; "
            "state l2 = 0, and AdamW's decay as weight_decay."
        )
        raise ValueError(msg)


def is_decayed(path: tuple[Any, ...]) -> bool:
    """Whether decoupled weight decay acts on a leaf, by its path in an adapter: on copied norms it does not."""
    keys = [getattr(key, "key", getattr(key, "name", key)) for key in path]
    return COPIES not in keys or keys[-1] not in _UNDECAYED
