"""Named methods: the paper's single step and the public script's, to compare against.

Source: Ding et al. 2025 (arXiv 2412.00383). The step is as its formula has it: the exact Hessian over all rows, no
trust region. What a preset costs is a result: run it with an infinite budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from llmeraser_jax.solvers import QuadraticDescent, ReferenceCompat
from llmeraser_jax.unlearning.auto import Auto
from llmeraser_jax.unlearning.inverse import CurvatureSpec
from llmeraser_jax.unlearning.matching import TargetMatching
from llmeraser_jax.unlearning.path import Path
from llmeraser_jax.unlearning.result import Method
from llmeraser_jax.unlearning.step import Step

# By damped conjugate gradients, which stop at negative curvature.
PAPER_STEP = Step(curvature=CurvatureSpec(kind="hessian", data="all"), trust_region=None)
# By mini-batch descent on the quadratic, as the paper does; its number of steps and rate are not published.
PAPER_DESCENT = dataclasses.replace(PAPER_STEP, solver=QuadraticDescent(rtol=0.05))
# By the constants of the public script, undamped.
PUBLIC_SCRIPT = Step(
    curvature=CurvatureSpec(kind="hessian", data="all", damping=0.0),
    solver=ReferenceCompat(seed=0),
    trust_region=None,
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "auto": Auto(),
        "target-matching": TargetMatching(),
        "path": Path(),
        "step": Step(),
        "newton": Step(rhs="newton"),
        "paper-step": PAPER_STEP,
        "paper-descent": PAPER_DESCENT,
        "public-script": PUBLIC_SCRIPT,
    }
)
