"""KLOM: are unlearned models, over seeds, distributed on each example as retrained ones are?

Georgiev et al. 2024 (arXiv 2410.23232, appendix E.1): train, unlearn and retrain with many seeds; on each example
compare the two sets of margins by the Kullback-Leibler divergence of their histograms. The margin is
`log(p / (1 - p))`, p the probability of the right class; here p is `exp(-loss)`, the geometric mean of the
probabilities of the response's tokens, so that the margin is the log-odds that the influence path moves in.

    KLOM(x) = sum_b u_b log(u_b / max(r_b, eps)) over bins b with u_b > 0

u and r are the shares of unlearned and of retrained seeds in bin b. As in the authors' released evaluation, margins
are clipped to +-100, 20 bins of equal width span what both sets hold together, and eps is 1e-5; the largest margin
of all counts in the last bin here, and in none there.

What few seeds can tell. An unlearned seed in a bin without a retrained one costs about `log(1 / eps)` = 11.5 nats
times its share, so that with R seeds on either side KLOM takes few values, and most of an example's value says
only how many unlearned margins missed the retrained ones' bins. It is no estimate of a divergence there (the
authors use 100 seeds and more), and it falls with the number of seeds on either side. So there are two numbers
more, of equal sizes: the `floor`, KLOM between two halves of the retrained seeds, which are the same distribution
by construction, and `matched`, in which as many unlearned seeds stand in the place of the first half. Where
`matched` is no higher than the floor, these seeds show no difference. Few of them show large ones only: with ten
on either side, margins of equal normal distributions give 7.9 for a floor of 7.9, shifted by one, two and three
standard deviations 8.4, 9.1 and 9.8; with forty 3.1, 3.9, 6.2 and 8.2 for 3.1 (means over 150 examples). With three
or fewer retrained seeds there is neither, and `values` can rank methods that share the seeds, no more.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Array, Float

NUM_BINS = 20
LEAST_SHARE = 1e-5
LARGEST_MARGIN = 100.0
_MAX_SPLITS = 20  # halves of the retrained seeds that the floor is averaged over
_FEW_SEEDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Klom:
    """KLOM of a way to unlearn.

    Attributes:
        values: per example, in nats.
        matched: per example, of as many unlearned seeds as a half has against half of the retrained ones, averaged
            over the same ways to halve them as the floor; None where that is, or with fewer unlearned seeds.
        floor: per example, between halves of the retrained seeds, averaged over the ways to halve them; None with
            fewer than four.
        num_unlearned: seeds unlearned.
        num_retrained: seeds retrained.
    """

    values: Float[np.ndarray, " examples"]
    matched: Float[np.ndarray, " examples"] | None
    floor: Float[np.ndarray, " examples"] | None
    num_unlearned: int
    num_retrained: int

    @property
    def caveat(self) -> str:
        """What the number of seeds leaves open, in words; empty when nothing has to be said."""
        if self.floor is None:
            return (
                f"{self.num_unlearned} unlearned and {self.num_retrained} retrained seeds: too few for a "
                "floor; the number ranks methods on these seeds and estimates no divergence"
            )
        if min(self.num_unlearned, self.num_retrained) < _FEW_SEEDS:
            return (
                f"{self.num_unlearned} unlearned and {self.num_retrained} retrained seeds: compare with the floor "
                "only, the number is dominated by empty bins"
            )
        return ""


def response_margins(losses: Float[Array | np.ndarray, "*lead examples"]) -> Float[np.ndarray, "*lead examples"]:
    """`log(p / (1 - p))` with `p = exp(-loss)`, which is `-log(exp(loss) - 1)`; inf where the loss is 0.

    Args:
        losses: nats per response token.
    """
    with np.errstate(divide="ignore", over="ignore"):
        return -np.log(np.expm1(np.asarray(losses, np.float64)))


def histogram_kl(
    unlearned: Float[np.ndarray, " unlearned"],
    retrained: Float[np.ndarray, " retrained"],
) -> float:
    """KL of two samples' histograms over shared bins, as the module's formula says.

    Args:
        unlearned: margins of one example, one per unlearned seed.
        retrained: the same of the retrained seeds.
    """
    ours, theirs = (
        np.clip(np.asarray(x, np.float64), -LARGEST_MARGIN, LARGEST_MARGIN) for x in (unlearned, retrained)
    )
    low, high = min(ours.min(), theirs.min()), max(ours.max(), theirs.max())
    if low == high:
        return 0.0
    edges = np.linspace(low, high, NUM_BINS + 1)
    u, r = (np.histogram(x, edges)[0] / x.size for x in (ours, theirs))
    held = u > 0
    return float(np.sum(u[held] * np.log(u[held] / np.maximum(r[held], LEAST_SHARE))))


def klom(
    unlearned_margins: Float[Array | np.ndarray, "unlearned examples"],
    retrained_margins: Float[Array | np.ndarray, "retrained examples"],
    *,
    floor: Float[np.ndarray, " examples"] | None = None,
) -> Klom:
    """KLOM on every example.

    Args:
        unlearned_margins: `response_margins` under each unlearned seed: each edited from a model that was trained
            with its own seed.
        retrained_margins: the same under each retrained seed.
        floor: of another way's result on the same retrained seeds, which is this one's too; None computes it.

    Raises:
        ValueError: no seed, other examples on either side, or margins that are nan.
    """
    ours, theirs = (np.asarray(x, np.float64) for x in (unlearned_margins, retrained_margins))
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1] or 0 in (len(ours), len(theirs)):
        msg = f"Expected [seeds, examples] of the same examples twice, got {ours.shape} and {theirs.shape}."
        raise ValueError(msg)
    if np.isnan(ours).any() or np.isnan(theirs).any():
        msg = "A margin is nan; a model that diverged has no KLOM."
        raise ValueError(msg)

    def compare(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.array([histogram_kl(a, b) for a, b in zip(first.T, second.T, strict=True)])

    size = len(theirs) // 2
    matched = None
    if len(theirs) >= 4:
        halves = _subsets(len(theirs), size)
        if floor is None:
            floor = np.mean([compare(theirs[half], theirs[~half]) for half in halves], axis=0)
        if len(ours) >= size:
            pairs = zip(itertools.cycle(_subsets(len(ours), size)), halves, strict=False)
            matched = np.mean([compare(ours[some], theirs[~half]) for some, half in pairs], axis=0)
    return Klom(
        values=compare(ours, theirs),
        matched=matched,
        floor=floor,
        num_unlearned=len(ours),
        num_retrained=len(theirs),
    )


def _subsets(num_seeds: int, size: int) -> list[np.ndarray]:
    """Ways to choose some of the seeds, as masks: all of them, or a fixed sample where they are many."""
    if math.comb(num_seeds, size) <= _MAX_SPLITS:
        chosen = [list(half) for half in itertools.combinations(range(num_seeds), size)]
    else:
        rng = np.random.default_rng(0)
        chosen = [rng.permutation(num_seeds)[:size] for _ in range(_MAX_SPLITS)]
    return [np.isin(np.arange(num_seeds), half) for half in chosen]
