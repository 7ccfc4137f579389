"""The description of an adapter: rank, scale, and the linear layers that have it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from llmeraser_jax.types import AdaptableConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The shape and scale of an adapter, in PEFT's terms.

    Attributes:
        rank: numbers of rows of A and columns of B.
        alpha: numerator of the scale.
        target_modules: names (matched as PEFT does: the whole module name or its end after a dot), one regular
            expression that must match the whole module name, or "all-linear".
        use_rslora: divide alpha by sqrt(rank) instead of rank.
        dropout: probability with which an entry of the adapter's input is zeroed while training; nothing
            else in the package draws it.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    use_rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))  # hashable, also from a list
        if self.rank < 1:
            msg = f"rank is {self.rank}; it must be at least 1."
            raise ValueError(msg)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            msg = f"alpha is {self.alpha}; it must be a positive number."
            raise ValueError(msg)
        if not 0.0 <= self.dropout < 1.0:
            msg = f"dropout is {self.dropout}; it must be at least 0 and below 1."
            raise ValueError(msg)
        if not self.target_modules:
            msg = "target_modules is empty; name at least one linear layer, e.g. ('q_proj', 'v_proj')."
            raise ValueError(msg)
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            try:
                re.compile(self.target_modules)
            except re.error as error:
                msg = f"target_modules is {self.target_modules!r}, which is no regular expression: {error}."
                raise ValueError(msg) from error

    @property
    def scaling(self) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def resolve_target_modules(
    target_modules: Sequence[str] | str, model_config: AdaptableConfig, *, allow_unmatched: bool = False
) -> tuple[str, ...]:
    """The linear layers that `target_modules` selects, in the order in which a decoder layer holds them.

    Names are matched as PEFT matches them. Adapters are stacked over layers, so a selection must be the same in
    every layer.

    Args:
        target_modules: as in `LoraConfig`.
        model_config: the base model.
        allow_unmatched: pass over a name that selects nothing as long as another selects something, as PEFT
            does; right for an adapter that PEFT wrote, and hides a misspelling in one's own configuration.

    Raises:
        ValueError: nothing is selected; a name selects nothing; something that is not one of the model's linear
            layers is selected (an embedding, the head, a norm, a whole block); or a module is selected in some
            layers only. The message names it.
    """
    linear = tuple(model_config.linear_shapes)
    if target_modules == "all-linear":
        return linear
    names = model_config.module_names
    selected: dict[str, set[int]] = {}
    refused: list[str] = []
    unmatched: list[str] = []
    patterns = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    for pattern in patterns:
        if isinstance(target_modules, str):
            hits = [name for name in names if re.fullmatch(pattern, name)]
        else:
            hits = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
        if not hits:
            unmatched.append(pattern)
        for name in hits:
            parts = name.split(".")
            if parts[-1] in linear:
                selected.setdefault(parts[-1], set()).add(int(parts[2]))
            else:
                refused.append(name)
    if unmatched and not (allow_unmatched and (selected or refused)):
        msg = (
            f"target_modules: {', '.join(repr(pattern) for pattern in unmatched)} selects no module of this "
            f"{model_config.model_type} model; its linear layers are {', '.join(linear)}, named as in "
            f"'model.layers.0.self_attn.{linear[0]}'."
        )
        raise ValueError(msg)
    if refused:
        msg = (
            f"target_modules selects {', '.join(repr(name) for name in sorted(refused)[:5])}; only "
            f"{', '.join(linear)} can carry an adapter here."
        )
        raise ValueError(msg)
    for name, layers in selected.items():
        missing = sorted(set(range(model_config.num_layers)) - layers)
        if missing:
            msg = (
                f"target_modules selects {name!r} in layers {sorted(layers)} and not in {missing}; an adapter "
                "here covers a module in every layer or in none (as with PEFT's layers_to_transform unset)."
            )
            raise ValueError(msg)
    return tuple(name for name in linear if name in selected)
