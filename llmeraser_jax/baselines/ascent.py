"""Gradient ascent on what is to be forgotten: alone, against descent on retained rows, and anchored by a KL term.

Sources: gradient ascent as in Jang et al. 2022 (arXiv 2210.01504); gradient difference of Liu, Liu and Stone 2022
(arXiv 2203.12817) and KL-anchored ascent, both as TOFU states them (Maini et al. 2024, arXiv 2401.06121, section
3). What differs from all: edits, for which the wanted pair is descended on with the same coefficient (see
`descent`); an adapter is moved and not the whole model; averages are over the response only, and over examples,
where TOFU's KL averages over every token of the sequence. `controls` has the first two with steps of one length
instead of an optimiser's, for comparisons at equal distance; `EqualLengthAscent` fits them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.baselines.controls import gradient_ascent, gradient_difference
from llmeraser_jax.baselines.descent import Descent, Phase, require_positive
from llmeraser_jax.baselines.setting import Fitted, Setting
from llmeraser_jax.baselines.terms import CrossEntropy, KLToReference
from llmeraser_jax.parallel import place_stack, replicate
from llmeraser_jax.types import LoraParams

_ASCENT = CrossEntropy(sign=-1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAscent(Descent):
    """Minimises `-l(z)` on S (for edits also `l(z')`). Nothing bounds it: epochs and learning rate decide."""

    def phases(self) -> tuple[Phase, ...]:
        """One, on S alone."""
        return (Phase(epochs=self.epochs, forget=_ASCENT),)

    def teachers(self, setting: Setting) -> tuple[tuple[LoraParams, ...], float]:
        """None."""
        return (), 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientDifference(GradientAscent):
    """Minimises `-l(z)` on S plus `retain_weight * l` on retained rows.

    Attributes:
        retain_weight: coefficient of the retained rows; 1 in the source.
    """

    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "retain_weight")

    def phases(self) -> tuple[Phase, ...]:
        """One, on S and R."""
        return (Phase(epochs=self.epochs, forget=_ASCENT, retain=CrossEntropy(), retain_weight=self.retain_weight),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLAnchoredAscent(Descent):
    """Minimises `-l(z)` on S plus `retain_weight * KL(trained adapter || theta)` on retained rows.

    Attributes:
        retain_weight: coefficient of the retained rows; 1 in the source.
    """

    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "retain_weight")

    def phases(self) -> tuple[Phase, ...]:
        """One, on S and R."""
        return (
            Phase(epochs=self.epochs, forget=_ASCENT, retain=KLToReference(), retain_weight=self.retain_weight),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualLengthAscent:
    """`controls.gradient_ascent` or `gradient_difference`: normalised steps of one length.

    Attributes:
        length: of all steps together, as a share of the trained adapter's norm.
        num_steps: how many.
        difference: whether to descend on retained rows, as many per step as are named (all, where fewer).
        chunk_size: rows per forward and backward pass.
        seed: draws the retained rows.
    """

    length: float = 0.05
    num_steps: int = 10
    difference: bool = False
    chunk_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "length")
        for name in ("num_steps", "chunk_size"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                msg = f"{name} is {value!r}; it must be a whole number of at least 1."
                raise ValueError(msg)

    def fit(self, setting: Setting) -> Fitted:
        """Moves the setting's adapter.

        Raises:
            ValueError: a gradient is zero, or retained rows are needed and every row is named.
        """
        problem, model = setting.problem, setting.model
        lora = replicate(setting.lora, model.mesh)

        def lay_out(rows: np.ndarray, weights: np.ndarray):
            stack = problem.examples.stack(rows, weights, chunk_size=self.chunk_size)
            return place_stack(stack, model.mesh)

        rhs = problem.influence_rhs()
        direction = lay_out(rhs.indices, rhs.weights)
        distance = self.length * float(trees.tree_norm(lora))
        count = len(rhs.indices)
        if self.difference:
            rng = np.random.default_rng(self.seed)
            size = min(len(problem.named), len(problem.retained))
            weights = np.full(size, 1 / problem.num_trained)
            steps = range(self.num_steps if size else 0)
            rows = [np.sort(rng.choice(problem.retained, size, replace=False)) for _ in steps]
            moved = gradient_difference(
                setting.objective,
                lora,
                direction,
                [lay_out(chosen, weights) for chosen in rows],
                distance=distance,
                num_examples=count + size,
            )
        else:
            moved = gradient_ascent(
                setting.objective, lora, direction, distance=distance, num_examples=count, num_steps=self.num_steps
            )
        return Fitted(
            model=model,
            params=moved.params,
            before=setting.lora,
            gradient_equivalents=moved.gradient_equivalents,
            seconds=moved.seconds,
            details={"distance": distance},
        )
