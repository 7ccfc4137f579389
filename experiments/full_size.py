"""Owns the settings of the published recommendation experiments at full size, for one large GPU or a TPU slice.

Llama-2-7B in bfloat16, LoRA of rank 8 and alpha 32 on all seven projections, Adam at 2e-4 with a cosine, 5 epochs
of batches of 128. LLaRA's own script puts dropout 0.1 on LoRA's input, which is refused here: gradients and
curvature are of the network without dropout. Its L2 term (Adam's coupled `weight_decay`, 1e-5) is on the
projector alone.
"""

from __future__ import annotations

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
ERASE = EraseConfig(l2=TRAIN.l2, chunk_size=MICROBATCH)
