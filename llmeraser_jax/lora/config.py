"""The description of an adapter: rank, scale, and the linear layers that have it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax.types import AdaptableConfig

_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
_TOWER = "model.vision_tower."
_TOWER_PATTERN = r".*vision_tower\..*"  # its modules, for PEFT's exclude_modules


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The shape and scale of an adapter, in PEFT's terms.

    An adapter stacks a module's matrices over all layers. A layer of lower rank than its module's highest, or one
    without an adapter, has rows of A and columns of B that nothing reads (`row_scales`): they are zero, and so are
    gradient and curvature there.

    Attributes:
        rank: numbers of rows of A and columns of B.
        alpha: numerator of the scale.
        target_modules: names (matched as PEFT does: the whole module name or its end after a dot), one regular
            expression that must match the whole module name, or "all-linear".
        use_rslora: divide alpha by sqrt(rank) instead of rank.
        dropout: probability with which an entry of the adapter's input is zeroed while training; losses,
            gradients and curvature are without it.
        exclude_modules: names or one regular expression, as for `target_modules`, of modules to leave out.
        layers_to_transform: numbers of the layers that carry the adapter; None is all of them.
        rank_pattern: other ranks, by regular expression of the end of a module name; the first that matches holds.
        alpha_pattern: other alphas, in the same way.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    use_rslora: bool = False
    dropout: float = 0.0
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))  # hashable, also from a list
        ranks = {"rank": self.rank, **{f"rank_pattern[{key!r}]": v for key, v in self.rank_pattern.items()}}
        alphas = {"alpha": self.alpha, **{f"alpha_pattern[{key!r}]": v for key, v in self.alpha_pattern.items()}}
        for name, value in ranks.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                msg = f"{name} is {value!r}; it must be a whole number of at least 1."
                raise ValueError(msg)
        for name, value in alphas.items():
            if not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
                msg = f"{name} is {value!r}; it must be a positive number."
                raise ValueError(msg)
        if not 0.0 <= self.dropout < 1.0:
            msg = f"dropout is {self.dropout}; it must be at least 0 and below 1."
            raise ValueError(msg)
        if not self.target_modules:
            msg = "target_modules is empty; name at least one linear layer, e.g. ('q_proj', 'v_proj')."
            raise ValueError(msg)
        layers = self.layers_to_transform
        if layers is not None and not (layers and all(type(layer) is int and layer >= 0 for layer in layers)):
            msg = f"layers_to_transform is {layers!r}; it must name at least one layer, from 0."
            raise ValueError(msg)
        patterns = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        expressions = [(name, text) for name, text in patterns.items() if isinstance(text, str)]
        expressions += [("rank_pattern", key) for key in self.rank_pattern]
        expressions += [("alpha_pattern", key) for key in self.alpha_pattern]
        for name, text in expressions:
            try:
                re.compile(text)
            except re.error as error:
                msg = f"{name} is {text!r}, which is no regular expression: {error}."
                raise ValueError(msg) from error
        is_expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if layers is not None and is_expression:
            msg = (
                "layers_to_transform acts on target_modules that are names, as in PEFT; put the layers into the "
                f"regular expression {self.target_modules!r}, or name modules."
            )
            raise ValueError(msg)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> LoraConfig:
        """Reads what `dataclasses.asdict` gives, also after it has been JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()}
        return cls(**values)

    @property
    def scaling(self) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA; of modules without a pattern."""
        return self._scaling(self.alpha, self.rank)

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank_of(self, module: str, layer: int) -> int:
        """Rank of the adapter of a module in a layer; 0 where it carries none."""
        name = self.module_name(module, layer)
        layers = self.layers_to_transform
        left_out = (layers is not None and layer not in layers) or (
            self.exclude_modules is not None and _matches(name, self.exclude_modules)
        )
        if left_out or not (self.target_modules == "all-linear" or _matches(name, self.target_modules)):
            return 0
        return _by_pattern(self.rank_pattern, name, self.rank)

    def module_name(self, module: str, layer: int) -> str:
        """The name of a linear layer in PyTorch's model."""
        return f"model.layers.{layer}.{'self_attn' if module in _ATTENTION else 'mlp'}.{module}"

    def stack_rank(self, module: str, num_layers: int) -> int:
        """The highest rank of a module, which its stacked matrices have."""
        return max(self.rank_of(module, layer) for layer in range(num_layers))

    def row_scales(self, module: str, num_layers: int) -> np.ndarray | None:
        """What multiplies the rows of A besides `scaling` [layers, stack_rank]; None where that is 1 everywhere.

        It is the layer's own scale as a multiple of `scaling`, and 0 for rows beyond the layer's rank.
        """
        return _row_scales(self, module, num_layers)

    def scaled_rows(self, module: str, a: jax.Array) -> jax.Array:
        """A [layers, rank, in] times `row_scales`: with `scaling` and B it is each layer's update."""
        scales = self.row_scales(module, len(a))
        return a if scales is None else a * jnp.asarray(scales, a.dtype)[..., None]


@functools.lru_cache(maxsize=4096)
def _row_scales(config: LoraConfig, module: str, num_layers: int) -> np.ndarray | None:
    scales = np.zeros((num_layers, config.stack_rank(module, num_layers)), np.float32)
    for layer in range(num_layers):
        rank = config.rank_of(module, layer)
        if rank:
            alpha = _by_pattern(config.alpha_pattern, config.module_name(module, layer), config.alpha)
            scales[layer, :rank] = config._scaling(alpha, rank) / config.scaling
    return None if np.all(scales == 1) else scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaLoraConfig(LoraConfig):
    """The same for a model that sees pictures, whose modules have other names; what `resolve_config` makes for one.

    Its projector's linear layers can carry an adapter, as "layer" 0; with `layers_to_transform` they do not, as in
    PEFT.
    """

    def rank_of(self, module: str, layer: int) -> int:
        """Rank of the adapter of a module in a layer, or of the projector; 0 where it carries none."""
        if module in PROJECTOR_NAMES and self.layers_to_transform is not None:
            return 0
        return super().rank_of(module, layer)

    def module_name(self, module: str, layer: int) -> str:
        """The name of a linear layer in PyTorch's model."""
        if module in PROJECTOR_NAMES:
            return f"model.multi_modal_projector.{module}"
        return super().module_name(module, layer).replace("model.", "model.language_model.", 1)


PROJECTOR_NAMES = ("linear_1", "linear_2")


@dataclasses.dataclass(frozen=True)
class Stack:
    """Where the adapters of one module stand, and their sizes.

    Attributes:
        group: the first key of the leaves: "layers" or "projector".
        count: adapters that are stacked on the first axis.
        inputs, outputs: of the linear layer.
    """

    group: str
    count: int
    inputs: int
    outputs: int


def adaptable_stacks(model_config: AdaptableConfig) -> dict[str, Stack]:
    """The stack of every module that can carry an adapter: a decoder layer's in its order, then the projector's."""
    layers, projector = model_config.linear_shapes, model_config.projector_shapes
    stacks = {name: Stack("layers", model_config.num_layers, *shape) for name, shape in layers.items()}
    return stacks | {name: Stack("projector", 1, *shape) for name, shape in projector.items()}


def _matches(name: str, patterns: Sequence[str] | str) -> bool:
    """Whether PEFT would say that names, or a regular expression, select a module."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _by_pattern(patterns: Mapping, name: str, default):
    """The value of the first pattern that matches the end of a module name, as in PEFT's `get_pattern_key`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def adapted_modules(config: LoraConfig, model_config: AdaptableConfig) -> tuple[str, ...]:
    """The modules that carry an adapter in some layer, in the order in which a decoder layer holds them.

    Args:
        config: `target_modules` written out.
        model_config: the base model.

    Raises:
        ValueError: none does, or a layer that is not there is named.
    """
    layers = range(model_config.num_layers)
    absent = [layer for layer in config.layers_to_transform or () if layer not in layers]
    if absent:
        msg = f"layers_to_transform names {absent}; this model has layers 0 to {model_config.num_layers - 1}."
        raise ValueError(msg)
    stacks = adaptable_stacks(model_config)
    modules = tuple(
        name for name, stack in stacks.items() if any(config.rank_of(name, layer) for layer in range(stack.count))
    )
    if not modules:
        msg = f"exclude_modules {config.exclude_modules!r} leaves none of {config.target_modules!r}."
        raise ValueError(msg)
    return modules


def resolve_config(
    config: LoraConfig, model_config: AdaptableConfig, *, allow_unmatched: bool = False
) -> LoraConfig:
    """`config` with its targets written out, so that equal adapters have equal tree structures.

    Args:
        config: what to resolve.
        model_config: the base model.
        allow_unmatched: see `resolve_target_modules`.

    Raises:
        ValueError: `target_modules` cannot be honoured, or nothing is left of it.
    """
    modules = resolve_target_modules(
        config.target_modules, model_config, allow_unmatched=allow_unmatched, excluded=config.exclude_modules
    )
    resolved = dataclasses.replace(
        config, target_modules=modules, alpha=float(config.alpha), dropout=float(config.dropout)
    )
    if model_config.projector_shapes:
        values = {field.name: getattr(resolved, field.name) for field in dataclasses.fields(resolved)}
        resolved = LlavaLoraConfig(**{**values, "exclude_modules": _without_tower(resolved, model_config)})
    adapted_modules(resolved, model_config)
    return resolved


def _without_tower(config: LoraConfig, model_config: AdaptableConfig) -> tuple[str, ...] | str | None:
    """`exclude_modules` with the vision tower's modules, where targets written out would select some in PEFT."""
    excluded = config.exclude_modules
    tower = [name for name in model_config.module_names if name.startswith(_TOWER)]
    if not any(
        _matches(name, config.target_modules) and not (excluded and _matches(name, excluded)) for name in tower
    ):
        return excluded
    if excluded is not None and not isinstance(excluded, str):
        excluded = rf"(.*\.)?({'|'.join(map(re.escape, excluded))})"
    return _TOWER_PATTERN if excluded is None else f"{_TOWER_PATTERN}|{excluded}"


def resolve_target_modules(
    target_modules: Sequence[str] | str,
    model_config: AdaptableConfig,
    *,
    allow_unmatched: bool = False,
    excluded: Sequence[str] | str | None = None,
) -> tuple[str, ...]:
    """The linear layers that `target_modules` selects, in the order in which a decoder layer holds them.

    Names are matched as PEFT matches them. A module that is selected in every layer is called by its own name,
    others by their names in PyTorch's model. Of a model that sees pictures the projector's come last, and a name
    selects nothing in the vision tower, which is frozen.

    Args:
        target_modules: as in `LoraConfig`.
        model_config: the base model.
        allow_unmatched: for an adapter that PEFT wrote. Passes over a name that selects nothing as long as another
            selects something, as PEFT does, which hides a misspelling in one's own configuration; and refuses
            names that select modules of a vision tower too, which PEFT would have trained.
        excluded: `exclude_modules`, as in `LoraConfig`; it only counts for the vision tower.

    Raises:
        ValueError: nothing is selected; a name selects nothing; something that is not one of the model's linear
            layers is selected (an embedding, the head, a norm, a whole block). The message names it.
    """
    stacks = adaptable_stacks(model_config)
    linear = tuple(stacks)
    name_of = (LlavaLoraConfig if model_config.projector_shapes else LoraConfig)().module_name
    places = {name_of(name, layer): (name, layer) for name in linear for layer in range(stacks[name].count)}
    if target_modules == "all-linear" and not (allow_unmatched and model_config.projector_shapes):
        return linear
    names = model_config.module_names
    selected: dict[str, set[int]] = {}
    refused: list[str] = []
    unmatched: list[str] = []
    patterns = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    in_tower = {name for name in names if name.startswith(_TOWER) and not (excluded and _matches(name, excluded))}
    if target_modules == "all-linear":
        selected = {name: set(range(stacks[name].count)) for name in linear}
        refused, patterns = sorted(in_tower), ()
    for pattern in patterns:
        hits = [
            name
            for name in names
            if (not name.startswith(_TOWER) or name in in_tower)
            and _matches(name, pattern if isinstance(target_modules, str) else (pattern,))
        ]
        if not hits:
            unmatched.append(pattern)
        beside = not allow_unmatched and any(name in places for name in hits)
        for name in hits:
            if name in places:
                module, layer = places[name]
                selected.setdefault(module, set()).add(layer)
            elif not (beside and name in in_tower):
                refused.append(name)
    if unmatched and not (allow_unmatched and (selected or refused)):
        msg = (
            f"target_modules: {', '.join(repr(pattern) for pattern in unmatched)} selects no module of this "
            f"{model_config.model_type} model; its linear layers are {', '.join(linear)}, named as in "
            f"{name_of(linear[0], 0)!r}."
        )
        raise ValueError(msg)
    if refused:
        msg = (
            f"target_modules selects {', '.join(repr(name) for name in sorted(refused)[:5])}; only "
            f"{', '.join(linear)} can carry an adapter here."
        )
        if any(name in in_tower for name in refused):
            msg += f" The vision tower is frozen; train with exclude_modules = {_TOWER_PATTERN!r}."
        raise ValueError(msg)
    everywhere = [name for name in linear if len(selected.get(name, ())) == stacks[name].count]
    partly = [name for name in linear if name in selected and name not in everywhere]
    written_out = [name_of(name, layer) for name in partly for layer in sorted(selected[name])]
    return (*everywhere, *written_out)
