"""Random LLaVA models of transformers; imports PyTorch, so import it inside a test marked torch."""

import torch
import transformers

from tests.golden.llava_cases import NUM_NEW_TOKENS, PICTURES, padded, pixels, texts


def build(case, seed=0):
    """A random model, as `reference.build`."""
    config = transformers.LlavaConfig(**{key: value for key, value in case.items() if key != "model_type"})
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = 0.3 * torch.randn_like(parameter) + (parameter.mean() if "norm" in name else 0.0)
            parameter.copy_(value.bfloat16().float())
    return model


def load(directory):
    """The model in a directory."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


def num_features(model):
    """Vectors of a picture."""
    vision, select = model.config.vision_config, model.config.vision_feature_select_strategy
    return (vision.image_size // vision.patch_size) ** 2 + (select == "full")


def features(model):
    """Features of `pixels` before the projector."""
    seen = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.model.get_image_features(torch.tensor(pixels()), return_dict=True)
    handle.remove()
    return seen[0].numpy()


def logits(model):
    """Logits of the padded rows, their pictures in the order of the rows."""
    tokens, mask = padded(texts(num_features(model)))
    shown = pixels()[[number for row in PICTURES for number in row]]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), pixel_values=torch.tensor(shown)
        )
    return out.logits.numpy()


def greedy(model):
    """Greedy continuations of every row by itself, which no token ends."""
    out = []
    for row, numbers in zip(texts(num_features(model)), PICTURES, strict=True):
        tokens = torch.tensor([row])
        shown = {"pixel_values": torch.tensor(pixels()[list(numbers)])} if numbers else {}
        with torch.no_grad():
            new = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NUM_NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                **shown,
            )
        out.append(new[0, tokens.shape[1] :].numpy())
    return out
