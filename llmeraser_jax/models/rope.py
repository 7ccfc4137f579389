"""`RopeConfig`: rotary positions, read from and written to the fields of config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from llmeraser_jax.models.fields import Fields

# Fields that each kind of scaling reads besides rope_type and rope_theta.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched for long contexts.

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: "default" (none), "linear" (positions divided by `factor`), "dynamic" (`theta` grows with the
            length of a text beyond `original_max_position`), "yarn" (long wavelengths are stretched by `factor`,
            short ones kept, with a ramp over the index between), "longrope" (each frequency has its own divisor,
            one for texts of up to `original_max_position` tokens and one for longer ones) or "llama3" (long
            wavelengths are stretched by `factor`, short ones kept, those between blended).
        factor: the stretch.
        low_freq_factor: llama3: wavelengths above `original_max_position / low_freq_factor` are stretched.
        high_freq_factor: llama3: wavelengths below `original_max_position / high_freq_factor` are kept.
        original_max_position: dynamic, yarn, longrope, llama3: context length of the first pretraining.
        attention_factor: yarn, longrope: factor of cosines and sines.
        beta_fast: yarn: frequencies with more turns than this in the original context are kept.
        beta_slow: yarn: those with fewer turns are stretched.
        truncate: yarn: the ends of the ramp are rounded to whole indices.
        short_factor: longrope: divisors for short texts, one a frequency.
        long_factor: longrope: divisors for long texts.
        rotated_share: share of a head's numbers that is rotated, the first ones.
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotated_share: float = 1.0

    def __post_init__(self) -> None:
        if not self.theta > 0 or not self.factor >= 1:
            msg = f"rope_theta is {self.theta} and factor {self.factor}; they must be above 0 and at least 1."
            raise ValueError(msg)
        if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            msg = (
                f"rope high_freq_factor is {self.high_freq_factor} and low_freq_factor {self.low_freq_factor}; "
                "the first must be the larger and both above 0."
            )
            raise ValueError(msg)
        if self.scaling == "yarn" and not (self.theta > 1 and self.beta_fast >= self.beta_slow > 0):
            msg = (
                f"rope_theta is {self.theta}, beta_fast {self.beta_fast} and beta_slow {self.beta_slow}; yarn "
                "needs the first above 1, the second at least the third, and that above 0."
            )
            raise ValueError(msg)
        if not 0 < self.rotated_share <= 1:
            msg = f"partial_rotary_factor is {self.rotated_share}; it must be above 0 and at most 1."
            raise ValueError(msg)

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on how long its text is."""
        return self.scaling in ("dynamic", "longrope")

    def changes_at(self, lengths: Any) -> Any:
        """Whether texts of `lengths` (an array) are rotated otherwise than when they were one token shorter."""
        if self.scaling == "longrope":
            return lengths == self.original_max_position + 1
        return lengths > self.original_max_position if self.scaling == "dynamic" else lengths < 0

    def num_frequencies(self, head_dim: int) -> int:
        """Rotations of a head; an odd number of rotated entries is rounded up."""
        return (int(head_dim * self.rotated_share) + 1) // 2

    def problem(self, head_dim: int) -> str | None:
        """Why heads of this width cannot be rotated so; None where they can."""
        count = self.num_frequencies(head_dim)
        if count < 1:
            return f"partial_rotary_factor = {self.rotated_share} leaves nothing of head_dim {head_dim} to rotate"
        if self.scaling == "dynamic" and int(head_dim * self.rotated_share) < 3:
            return f"rope_type 'dynamic' needs more than 2 rotated numbers a head; head_dim is {head_dim}"
        for name in ("short_factor", "long_factor"):
            if self.scaling == "longrope" and len(getattr(self, name)) != count:
                return f"{name} has {len(getattr(self, name))} entries; {count} frequencies are rotated"
        return None

    @classmethod
    def from_hf(
        cls,
        given: Mapping[str, Any],
        where: str,
        *,
        theta: float,
        max_position: int,
        original_max_position: int | None = None,
        rotated_share: float = 1.0,
        partial: bool = False,
        other_names: Mapping[str, str] | None = None,
    ) -> tuple[RopeConfig, list[str]]:
        """Reads one set of rope parameters.

        Args:
            given: the parameters.
            where: the field of config.json that they come from.
            theta: base where they have none.
            max_position: the model's context length, which stands in for the original one.
            original_max_position: the original one where config.json states it elsewhere, which takes precedence.
            rotated_share: share that is rotated where they have none.
            partial: whether the family can rotate a part of a head.
            other_names: kinds of scaling under an older name.

        Returns:
            The configuration, and what is wrong with it in words.
        """
        fields = Fields(given, f"{where}.")
        kind = given.get("rope_type", given.get("type")) or "default"
        kind = (other_names or {}).get(kind, kind) if isinstance(kind, str) else kind
        if not isinstance(kind, str) or kind not in _PARAMETERS:
            fields.content = {**given, "rope_type": kind}
            fields.refuse("rope_type", f"one of {', '.join(_PARAMETERS)}")
            return cls(), fields.problems
        values: dict[str, Any] = {"scaling": kind, "theta": fields.number("rope_theta", theta)}
        if partial:
            values["rotated_share"] = fields.number("partial_rotary_factor", rotated_share)
        elif given.get("partial_rotary_factor") not in (None, 1):
            fields.refuse("partial_rotary_factor", "1")
        shared = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        for name, value in given.items():
            if name not in shared and name not in _PARAMETERS[kind] and value is not None:
                fields.problems.append(f"{where}.{name} is not honoured with rope_type {kind!r}")
        if kind == "dynamic":
            values["original_max_position"] = max_position
        elif kind in ("yarn", "longrope", "llama3"):
            stated = fields.integer("original_max_position_embeddings", max_position)
            values["original_max_position"] = original_max_position or stated
        if kind in ("yarn", "longrope"):
            ratio = max_position / values["original_max_position"]
            known = ratio if kind == "longrope" or "factor" in given else None  # null is the ratio of lengths
            factor = known if given.get("factor") is None and known else fields.number("factor")
            values["attention_factor"] = _attention_factor(kind, fields, factor, values["original_max_position"])
            if kind == "yarn":
                values["factor"] = factor
                values["beta_fast"] = fields.number("beta_fast", 32.0) if given.get("beta_fast") else 32.0
                values["beta_slow"] = fields.number("beta_slow", 1.0) if given.get("beta_slow") else 1.0
                values["truncate"] = fields.boolean("truncate", True)
            else:
                values["short_factor"], values["long_factor"] = map(fields.numbers, ("short_factor", "long_factor"))
        else:
            values |= {name: fields.number(name) for name in _PARAMETERS[kind]}
        if fields.problems:
            return cls(), fields.problems
        try:
            return cls(**values), []
        except ValueError as error:
            return cls(), [f"{where}: {str(error).rstrip('.')}"]

    def to_hf(self) -> dict[str, Any]:
        """Rope parameters that transformers 5 and `from_hf` read back."""
        out: dict[str, Any] = {"rope_type": self.scaling, "rope_theta": self.theta}
        if self.scaling in ("linear", "dynamic", "yarn", "llama3"):
            out["factor"] = self.factor
        if self.scaling in ("yarn", "longrope", "llama3"):
            out["original_max_position_embeddings"] = self.original_max_position
        if self.scaling == "llama3":
            out["low_freq_factor"] = self.low_freq_factor
            out["high_freq_factor"] = self.high_freq_factor
        if self.scaling in ("yarn", "longrope"):
            out["attention_factor"] = self.attention_factor
        if self.scaling == "yarn":
            out |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate}
        if self.scaling == "longrope":
            out |= {"short_factor": list(self.short_factor), "long_factor": list(self.long_factor)}
        if self.rotated_share != 1:
            out["partial_rotary_factor"] = self.rotated_share
        return out


def _attention_factor(kind: str, fields: Fields, factor: float, original_max_position: int) -> float:
    """The stated value, or the one that the authors of the scaling recommend for `factor`."""
    stated = fields.optional_number("attention_factor")
    if stated is not None:
        return stated
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return (
            math.sqrt(1 + math.log(factor) / math.log(original_max_position)) if original_max_position > 1 else 1.0
        )

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    if fields.content.get("mscale") and fields.content.get("mscale_all_dim"):
        return magnitude(fields.number("mscale")) / magnitude(fields.number("mscale_all_dim"))
    return magnitude(1.0)
