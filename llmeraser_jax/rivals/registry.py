"""The table of rivals: a name and a default configuration. Adding one is one line in `RIVALS`.

The descents' learning rate is that of TOFU's configuration for adapters; their 5 epochs are fewer than the 10 to 20
of their sources' configurations. Both want tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llmeraser_jax.rivals.arithmetic import MSA, TaskVector
from llmeraser_jax.rivals.ascent import EqualLengthAscent, GradientAscent, GradientDifference, KLAnchoredAscent
from llmeraser_jax.rivals.e2urec import E2URec
from llmeraser_jax.rivals.finetune_edited import FinetuneEdited
from llmeraser_jax.rivals.gauss_newton import KFade, WinU
from llmeraser_jax.rivals.preference import NPO, SimNPO
from llmeraser_jax.rivals.receraser import RecEraser
from llmeraser_jax.rivals.retrain import Retrain
from llmeraser_jax.rivals.rmu import RMU
from llmeraser_jax.rivals.sisa import SISA
from llmeraser_jax.rivals.token_losses import PDU, UNDIAL, WGA, SatImp
from llmeraser_jax.unlearning import METHODS, Method

RIVALS: Mapping[str, Method] = MappingProxyType(
    {
        "retrain": Retrain(seeds=3),
        "sisa": SISA(),
        "receraser": RecEraser(),
        "gradient-ascent": GradientAscent(),
        "gradient-ascent-equal-length": EqualLengthAscent(),
        "gradient-difference": GradientDifference(),
        "gradient-difference-equal-length": EqualLengthAscent(difference=True),
        "kl-anchored-ascent": KLAnchoredAscent(),
        "npo": NPO(),
        "simnpo": SimNPO(),
        "wga": WGA(),
        "satimp": SatImp(),
        "undial": UNDIAL(),
        "pdu": PDU(),
        "rmu": RMU(),
        "e2urec": E2URec(),
        "k-fade": KFade(),
        "win-u": WinU(),
        "msa": MSA(),
        "task-vector": TaskVector(),
        "finetune-edited": FinetuneEdited(),
    }
)


def get_method(name: str) -> Method:
    """The default configuration of one of the package's methods or of a rival.

    Raises:
        ValueError: there is none of that name; the names are listed.
    """
    named = {**METHODS, **RIVALS}
    if name not in named:
        msg = f"There is no method {name!r}; there are {', '.join(named)}."
        raise ValueError(msg)
    return named[name]
