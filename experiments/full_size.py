"""Owns the settings of the published recommendation experiments at full size, for one large GPU or a TPU slice.

Llama-2-7B in bfloat16, LoRA of rank 8 and alpha 32 on all seven projections, Adam at 2e-4 with a cosine, 5 epochs
of batches of 128. LLaRA's own script puts dropout 0.1 on LoRA's input, which is refused here: gradients and
curvature are of the network without dropout. Its L2 term (Adam's coupled `weight_decay`, 1e-5) is on the
projector alone.
"""

from __future__ import annotations

import dataclasses

from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.unlearning import EraseConfig

DTYPE = "bfloat16"
MICROBATCH = 4  # sequences of 1,024 tokens in one pass
LORA = LoraConfig(rank=8, alpha=32.0, target_modules="all-linear")
TRAIN = TrainConfig(
    epochs=5,
    batch_size=128,
    microbatch_size=MICROBATCH,
    learning_rate=2e-4,
    warmup_ratio=0.05,
    l2=1e-5,
    max_grad_norm=1.0,
    checkpoint_every_steps=50,
)
LEARNING_RATES = (1e-5, 5e-5, 2e-4)  # for rivals that descend: from a twentieth of the training's to its own
ERASE = EraseConfig(l2=TRAIN.l2, chunk_size=MICROBATCH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullSize:
    """Puts these settings in the place of an experiment's small ones; named before it among the base classes.

    Attributes:
        rank: of the adapter, on all projections.
        epochs: of training.
        learning_rate: of training.
        l2: lambda.
        seed: of training, and of whatever the experiment draws.
        mesh: devices, e.g. data=4,model=2; empty is one device.
    """

    rank: int = LORA.rank
    epochs: int = TRAIN.epochs
    learning_rate: float = TRAIN.learning_rate
    l2: float = TRAIN.l2
    seed: int = 0
    mesh: str = ""

    @property
    def lora(self) -> LoraConfig:
        """The adapter."""
        return dataclasses.replace(LORA, rank=self.rank)

    @property
    def train(self) -> TrainConfig:
        """Its training."""
        return dataclasses.replace(
            TRAIN, epochs=self.epochs, learning_rate=self.learning_rate, l2=self.l2, seed=self.seed
        )

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """What rivals that descend are offered."""
        return LEARNING_RATES

    @property
    def erase(self) -> EraseConfig:
        """What the package's own ways share."""
        return dataclasses.replace(ERASE, l2=self.l2)
