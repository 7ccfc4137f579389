"""Forgetting as negative preference: NPO and SimNPO.

Sources: NPO, Zhang et al. 2024 (arXiv 2404.05868), with the retain term of its variant NPO-RT; SimNPO, Fan et
al. 2024 (arXiv 2410.07163), with the same retain term and the weights of the authors' TOFU configuration for
forget05 (0.1375 on S, 1 on retained rows, beta 2.5), here as a ratio. As beta goes to 0, NPO's gradient becomes
that of gradient ascent on `log p(y|x)`; away from it, rows that are already improbable are left alone.
What differs from both: edits (see `descent.ForgetAndRetain`); an adapter is moved and not the whole model; the
reference is the trained adapter, evaluated again at each step (1/3 of a gradient per row); a response's tokens are
those under the loss, the end-of-sequence token included.
"""

from __future__ import annotations

import dataclasses

from llmeraser_jax.rivals.descent import ForgetAndRetain, require_non_negative, require_positive
from llmeraser_jax.rivals.terms import ExampleLoss, NegativePreference, SimpleNegativePreference
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import UnlearningTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class NPO(ForgetAndRetain):
    """Minimises `(2/beta) log(1 + (p_theta(y|x) / p_reference(y|x))^beta)` on S.

    Attributes:
        beta: inverse temperature; 0.1 in the source's experiments.
        retain_weight: coefficient of the retained rows' cross entropy; 0 leaves them out.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")

    def _forget(self) -> ExampleLoss:
        return NegativePreference(beta=self.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimNPO(ForgetAndRetain):
    """Minimises `-(2/beta) log sigmoid(-(beta/|y|) log p_theta(y|x) - gamma)` on S; there is no reference.

    Attributes:
        beta: inverse temperature; larger than NPO's, since the log-probability is a mean and not a sum.
        gamma: margin.
        retain_weight: coefficient of the retained rows' cross entropy, S having 1; 0 leaves them out.
    """

    beta: float = 2.5
    gamma: float = 0.0
    retain_weight: float = 1 / 0.1375

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")
        require_non_negative(self, "gamma")

    def _forget(self) -> ExampleLoss:
        return SimpleNegativePreference(beta=self.beta, gamma=self.gamma)

    def teachers(self, task: UnlearningTask) -> tuple[tuple[LoraParams, ...], float]:
        """None."""
        return (), 0.0
