"""Language models: configuration, the decoder, reading and writing, generation."""

from llmeraser_jax.models.config import FAMILIES, LINEAR_NAMES, ModelConfig
from llmeraser_jax.models.decoder import ApplyDecoder, Decoder, DecoderLayer, Linear, base_shapes, bind, init_base
from llmeraser_jax.models.features import image_features, load_or_compute_features
from llmeraser_jax.models.generation import generate, greedy_decode
from llmeraser_jax.models.loading import Model, load_model, load_tokenizer, model_config, read_config, save_model
from llmeraser_jax.models.precision import MATMUL_PRECISIONS, MatmulPrecision
from llmeraser_jax.models.presets import llava_1_5_7b
from llmeraser_jax.models.rope import RopeConfig
from llmeraser_jax.models.vision import VisionConfig, init_vision

__all__ = [
    "FAMILIES",
    "LINEAR_NAMES",
    "MATMUL_PRECISIONS",
    "ApplyDecoder",
    "Decoder",
    "DecoderLayer",
    "Linear",
    "MatmulPrecision",
    "Model",
    "ModelConfig",
    "RopeConfig",
    "VisionConfig",
    "base_shapes",
    "bind",
    "generate",
    "greedy_decode",
    "image_features",
    "init_base",
    "init_vision",
    "llava_1_5_7b",
    "load_model",
    "load_or_compute_features",
    "load_tokenizer",
    "model_config",
    "read_config",
    "save_model",
]
