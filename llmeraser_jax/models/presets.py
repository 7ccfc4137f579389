"""Configurations of published models, for shapes and ahead-of-time compilation; no weights."""

from __future__ import annotations

from llmeraser_jax.models.config import ModelConfig
from llmeraser_jax.models.precision import MatmulPrecision
from llmeraser_jax.models.vision import VisionConfig


def llava_1_5_7b(matmul_precision: MatmulPrecision = "auto", num_layers: int = 32) -> ModelConfig:
    """LLaVA-1.5-7B (`llava-hf/llava-1.5-7b-hf`): Vicuna-7B-v1.5 with CLIP ViT-L/14 at 336 pixels, 576 features.

    Args:
        matmul_precision: see `ModelConfig`.
        num_layers: decoder layers; fewer than the model's own for a quicker look.
    """
    vision = VisionConfig(
        image_token=32000,
        image_size=336,
        patch_size=14,
        width=1024,
        mlp_width=4096,
        num_layers=24,
        num_heads=16,
    )
    return ModelConfig(
        vocab_size=32064,
        width=4096,
        mlp_width=11008,
        num_layers=num_layers,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        norm_eps=1e-5,
        max_position=4096,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=32001,
        vision=vision,
        matmul_precision=matmul_precision,
    )
