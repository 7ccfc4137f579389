"""Small random LLaVA models, and texts with pictures, that golden files and parity tests share."""

import numpy as np

IMAGE_TOKEN = 39
NUM_NEW_TOKENS = 6

_TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava_case(text, vision, **changes):
    """Arguments of transformers' `LlavaConfig`."""
    return {
        "model_type": "llava",
        "text_config": {**_TEXT, **text},
        "vision_config": {**_VISION, **vision},
        "image_token_index": IMAGE_TOKEN,
        **changes,
    }


LLAVA_CASES = {
    "llava_llama": llava_case({"model_type": "llama"}, {}),
    "llava_mistral_full": llava_case(
        {"model_type": "mistral", "head_dim": 6, "sliding_window": 7},
        {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_hidden_layers": 2},
        vision_feature_layer=[0, -1],
        vision_feature_select_strategy="full",
        multimodal_projector_bias=False,
    ),
}
# Adapters that PEFT makes on the case of the same key.
LLAVA_ADAPTERS = {
    "llava_llama": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "down_proj", "linear_1", "linear_2"],
        "exclude_modules": r".*vision_tower.*",
    },
}


def pixels():
    """Four pictures [4, 3, 8, 8], exact in bfloat16."""
    return np.random.default_rng(5).integers(-8, 8, (4, 3, 8, 8)).astype(np.float32) / 4


# Pictures of each row of `texts`, numbers into `pixels`.
PICTURES = ((0,), (1, 2), (), (3,))


def texts(num_features):
    """Token ids of rows with one picture, two, none, and one."""
    rng = np.random.default_rng(6)

    def words(count):
        return rng.integers(3, IMAGE_TOKEN, count).tolist()

    picture = [IMAGE_TOKEN] * num_features
    return [
        words(3) + picture + words(4),
        words(2) + picture + words(2) + picture + words(3),
        words(9),
        picture + words(3),
    ]


def padded(rows):
    """Rows as one array and its mask: the first two padded on the right, the others on the left."""
    time = max(map(len, rows))
    tokens, mask = np.zeros((2, len(rows), time), np.int64)
    for place, row in enumerate(rows):
        here = slice(0, len(row)) if place < 2 else slice(time - len(row), time)
        tokens[place, here], mask[place, here] = row, 1
    return tokens, mask


def images_of(features):
    """Features of each row's pictures [rows, 2, features, size], zeros where it has fewer."""
    out = np.zeros((len(PICTURES), 2, *features.shape[1:]), features.dtype)
    for row, numbers in enumerate(PICTURES):
        out[row, : len(numbers)] = features[list(numbers)]
    return out
