"""Forgetting by losses of single tokens: WGA, SatImp, UNDIAL and PDU.

Sources, each with the settings of open-unlearning (github.com/locuslab/open-unlearning, which the loss functions
follow): WGA, Wang et al. 2025 (arXiv 2502.19301); SatImp, Yang et al. 2025 (arXiv 2505.11953), whose weights of
0.1 on S and 1 on retained rows are a ratio here; UNDIAL, Dong et al. 2024 (arXiv 2402.10052), which looks at no
retained rows; PDU, Entesari et al. 2025 (arXiv 2506.05314). What differs from all: edits (see
`descent.ForgetAndRetain`; PDU's wanted pair has the multiplier); an adapter is moved and not the whole model; means
are over each response's tokens and then over examples, where the sources' are over the tokens of a batch, of
UNDIAL and PDU the prompt's included; UNDIAL's cross entropy against its soft labels is a KL here, which has the
same gradient. PDU's constraint is stated as a slack above the loss of the first retained batch, where the source
asks for a number that is "appropriately larger" than the trained model's loss, and its multiplier is updated from
the first step on.
"""

from __future__ import annotations

import dataclasses

from llmeraser_jax.rivals.descent import (
    Descent,
    ForgetAndRetain,
    Phase,
    require_non_negative,
    require_positive,
)
from llmeraser_jax.rivals.terms import CrossEntropy, ExampleLoss, FlatLogits, LoweredTarget, WeightedAscent


@dataclasses.dataclass(frozen=True, kw_only=True)
class WGA(ForgetAndRetain):
    """Gradient ascent, every token weighted by `p^beta`: tokens that are improbable already are left alone.

    Attributes:
        beta: 0 is gradient ascent.
        retain_weight: coefficient of the retained rows' cross entropy; 0 leaves them out.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_non_negative(self, "beta")

    def _forget(self) -> ExampleLoss:
        return WeightedAscent(certainty=self.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SatImp(ForgetAndRetain):
    """Gradient ascent, every token weighted by `p^saturation (1 - p)^importance`.

    Attributes:
        saturation: exponent of what is known.
        importance: exponent of what is not yet known by heart.
        retain_weight: coefficient of the retained rows' cross entropy; 0 leaves them out.
    """

    saturation: float = 5.0
    importance: float = 1.0
    retain_weight: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_non_negative(self, "saturation", "importance")

    def _forget(self) -> ExampleLoss:
        return WeightedAscent(certainty=self.saturation, doubt=self.importance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNDIAL(ForgetAndRetain):
    """Distils the trained adapter with the logit of every token trained on lowered by `strength`.

    Attributes:
        strength: in nats.
        retain_weight: coefficient of the retained rows' cross entropy; 0 leaves them out.
    """

    strength: float = 10.0
    retain_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "strength")

    def _forget(self) -> ExampleLoss:
        return LoweredTarget(strength=self.strength)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PDU(Descent):
    """Flattens the logits on S as far as a bound on the retained rows' loss allows: primal-dual updates.

    Attributes:
        retain_weight: of the retained rows' cross entropy at the first step: the first value of the multiplier.
        retain_slack: nats that the retained loss may rise above the first batch's.
        dual_rate: of the multiplier, per nat of excess.
    """

    retain_weight: float = 100.0
    retain_slack: float = 0.1
    dual_rate: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "retain_weight", "dual_rate")
        require_non_negative(self, "retain_slack")

    def phases(self) -> tuple[Phase, ...]:
        """One, on S and R."""
        return (
            Phase(
                epochs=self.epochs,
                forget=FlatLogits(),
                retain=CrossEntropy(),
                retain_weight=self.retain_weight,
                dual_rate=self.dual_rate,
                retain_slack=self.retain_slack,
            ),
        )
