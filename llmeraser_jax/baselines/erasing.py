"""LLMEraser in its modes, behind the interface of the baselines: `unlearning.erase` with a setting's data.

Source: Ding et al. 2025 (arXiv 2412.00383). What the package computes and where it differs from the paper is stated
in `unlearning` and in the README. Three configurations take the paper's single step as its formula has it, with the
exact Hessian over all rows and without a trust region, and differ in how they solve for it: `PAPER_STEP` by the
package's damped conjugate gradients, which stop at negative curvature; `PAPER_DESCENT` as the paper does, by
mini-batch descent on the quadratic (damped too; the paper's number of steps and rate are not published);
`REFERENCE_COMPAT` by the constants of the public script, undamped.
"""

from __future__ import annotations

import dataclasses
import math

from llmeraser_jax.baselines.setting import Fitted, Setting
from llmeraser_jax.unlearning import EraseConfig, erase

# What a method costs is a result here: none is cut short at a retraining's cost.
PAPER_STEP = EraseConfig(
    method="step", curvature="hessian", curvature_data="all", trust_region=False, budget=math.inf
)
PAPER_DESCENT = dataclasses.replace(PAPER_STEP, solver="descent")
REFERENCE_COMPAT = dataclasses.replace(PAPER_STEP, solver="reference-compat")
NEWTON = EraseConfig(method="step", rhs="newton", budget=math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erasing:
    """Influence-function erasing.

    Attributes:
        config: how; its `l2` is replaced by that of the setting's training.
    """

    config: EraseConfig = dataclasses.field(default_factory=EraseConfig)

    def fit(self, setting: Setting) -> Fitted:
        """Erases; the setting's held-out rows show where removed rows should end.

        Raises:
            UnlearningError: no usable step was found.
            ValueError: the matched way without held-out rows, where a removal or modification needs them.
        """
        config = dataclasses.replace(self.config, l2=setting.train.l2)
        result = erase(
            setting.model,
            setting.lora,
            setting.dataset,
            setting.requests,
            config,
            heldout=setting.heldout,
            retrain_cost=float(setting.train.epochs * len(setting.edited)),
        )
        receipt = result.receipt.to_mapping()
        return Fitted(
            model=setting.model,
            params=result.lora,
            before=setting.lora,
            gradient_equivalents=result.receipt.gradient_equivalents.total,
            seconds=result.receipt.seconds,
            details={
                "outcome": receipt["outcome"],
                "complete": receipt["complete"],
                "receipt": {name: value for name, value in receipt.items() if name not in ("named", "versions")},
            },
        )
