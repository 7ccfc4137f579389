"""LLMEraser in its modes, behind the interface of the baselines: `unlearning.erase` with a setting's data.

Source: Ding et al. 2025 (arXiv 2412.00383). What the package computes and where it differs from the paper is stated
in `unlearning` and in the README. `PAPER_STEP` is the paper's single step as far as its formula goes (the exact
Hessian over all rows, no trust region), but solved by the package's damped conjugate gradients, which stop at
negative curvature. The paper descends on the quadratic in mini-batches: that is `solver="descent"`, and
`method="reference-compat"` for its released code.
"""

from __future__ import annotations

import dataclasses

from llmeraser_jax.baselines.setting import Fitted, Setting
from llmeraser_jax.unlearning import EraseConfig, erase

PAPER_STEP = EraseConfig(method="step", curvature="hessian", curvature_data="all", trust_region=False)
NEWTON = EraseConfig(method="step", rhs="newton")


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
