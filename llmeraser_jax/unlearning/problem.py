"""A request as numbers: which examples are named, what replaces them, and every sum's coefficients.

Right-hand sides, curvatures and checks are all `sum_i c_i f(z_i)` over the examples as trained and their
replacements; this module owns the coefficient vectors `c`, and so every sign and normaliser of the method.
"""

from __future__ import annotations

import dataclasses
from typing import Generic, TypeVar

import numpy as np

from llmeraser_jax.text import short_repr
from llmeraser_jax.types import ExampleSet

Examples = TypeVar("Examples", bound=ExampleSet)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Some examples with a coefficient each."""

    indices: np.ndarray  # [m] int, into `EditProblem.examples`
    weights: np.ndarray  # [m] float64


@dataclasses.dataclass(frozen=True)
class EditProblem(Generic[Examples]):
    """The data before and after a request.

    Attributes:
        examples: the `num_trained` examples as trained on, then the replacements.
        num_trained: n.
        named: indices of S [s], increasing.
        replacements: for each of `named` the index of its replacement in `examples`, or -1 for a removal.
        look_alikes: for each of `named` the retained examples that may say the same, verbatim or nearly; None where
            nobody looked. Their gradients decide.
    """

    examples: Examples
    num_trained: int
    named: np.ndarray
    replacements: np.ndarray
    look_alikes: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        named, replacements = self.named, self.replacements
        if len(named) == 0 or len(named) != len(replacements):
            msg = f"{len(named)} named examples with {len(replacements)} replacements; name some, one each."
            raise ValueError(msg)
        if np.any(np.diff(named) <= 0) or named[0] < 0 or named[-1] >= self.num_trained:
            msg = f"Named indices must be increasing and below num_trained = {self.num_trained}; got {named}."
            raise ValueError(msg)
        wanted = self.wanted
        if np.any(wanted < self.num_trained) or np.any(wanted >= len(self.examples)):
            msg = f"Replacement indices must lie in [{self.num_trained}, {len(self.examples)}); got {wanted}."
            raise ValueError(msg)
        if self.num_edited_total < 1:
            msg = "The request removes every training example; nothing is left to be consistent with."
            raise ValueError(msg)

    def __repr__(self) -> str:
        removals = int(np.sum(self.replacements < 0))
        return short_repr(self, trained=self.num_trained, removed=removals, replaced=len(self.named) - removals)

    @property
    def wanted(self) -> np.ndarray:
        """Indices of the replacements z' (edits only)."""
        return self.replacements[self.replacements >= 0]

    @property
    def edited(self) -> np.ndarray:
        """Indices of the examples that have a replacement, aligned with `wanted`."""
        return self.named[self.replacements >= 0]

    @property
    def retained(self) -> np.ndarray:
        """Indices of R."""
        return np.setdiff1d(np.arange(self.num_trained), self.named)

    @property
    def num_edited_total(self) -> int:
        """n', the number of examples after the request."""
        return self.num_trained - len(self.named) + len(self.wanted)

    def influence_rhs(self) -> Weighted:
        """Coefficients of `b = (1/n) sum_S (g_i - g'_i)`."""
        return _join(
            (self.named, np.full(len(self.named), 1 / self.num_trained)),
            (self.wanted, np.full(len(self.wanted), -1 / self.num_trained)),
        )

    def edited_mean(
        self,
        sample_size: int | None,
        rng: np.random.Generator,
        *,
        without_named: bool = False,
    ) -> Weighted:
        """Coefficients of the mean over the edited data (or its retained part), or their estimate."""
        after = self.retained if without_named else np.concatenate([self.retained, self.wanted])
        return _estimate(self.examples, after, 1 / self.num_edited_total, sample_size, rng)

    def trained_mean(
        self,
        sample_size: int | None,
        rng: np.random.Generator,
        *,
        without_named: bool = False,
    ) -> Weighted:
        """Coefficients of `(1/n) sum` over the data as trained (or its retained part), or their estimate."""
        which = self.retained if without_named else np.arange(self.num_trained)
        return _estimate(self.examples, which, 1 / self.num_trained, sample_size, rng)

    def path_mean(
        self,
        weight: float,
        sample_size: int | None,
        rng: np.random.Generator,
        *,
        without_named: bool = False,
    ) -> Weighted:
        """Coefficients of `(1/n) [sum_R + w sum_S + (1 - w) sum_edited']`, R exact or a sample's estimate.

        The named examples keep their place at weight 0, so that every step of a path has the same shapes.
        """
        n = self.num_trained
        retained = _estimate(self.examples, self.retained, 1 / n, sample_size, rng)
        if without_named:
            return retained
        return _join(
            (retained.indices, retained.weights),
            (self.named, np.full(len(self.named), weight / n)),
            (self.wanted, np.full(len(self.wanted), (1 - weight) / n)),
        )


def _join(*parts: tuple[np.ndarray, np.ndarray]) -> Weighted:
    indices, weights = zip(*parts, strict=True)
    return Weighted(np.concatenate(indices), np.concatenate(weights))


def _estimate(
    examples: ExampleSet,
    which: np.ndarray,
    weight: float,
    sample_size: int | None,
    rng: np.random.Generator,
) -> Weighted:
    """`weight * sum` over `which`, exact or estimated without bias from a sample stratified by length bucket.

    Strata in proportion keep the shapes of every redraw equal, and never raise the variance.
    """
    if sample_size is None or sample_size >= len(which):
        return Weighted(which, np.full(len(which), weight))
    buckets = np.array([examples.bucket_of(int(i)) for i in which])
    drawn = []
    for bucket in np.unique(buckets):
        stratum = which[buckets == bucket]
        size = max(1, round(sample_size * len(stratum) / len(which)))
        chosen = np.sort(rng.choice(stratum, size=min(size, len(stratum)), replace=False))
        drawn.append((chosen, np.full(len(chosen), weight * len(stratum) / len(chosen))))
    return _join(*drawn)
