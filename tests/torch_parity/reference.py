"""Random PyTorch models and PEFT adapters; imports PyTorch, so import it inside a test marked torch."""

import pathlib
import tempfile

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from tests.golden.cases import NUM_NEW_TOKENS, case_tokens


def build(case, seed=0):
    """A random model of transformers, its biases and norm scales random too."""
    case = dict(case)
    config = transformers.AutoConfig.for_model(case.pop("model_type"), **case)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms around the identity: one, or zero where transformers adds the one.
            value = 0.3 * torch.randn_like(parameter) + (parameter.mean() if "norm" in name else 0.0)
            # Exact in bfloat16, so that golden files compress and one checkpoint serves every dtype.
            parameter.copy_(value.bfloat16().float())
    return model


def hf_config(model):
    """What transformers would write to config.json."""
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    return config


def tensors(model):
    """The tensors that `save_pretrained` writes: without the copy of a tied head, and one for each expert."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_file(pathlib.Path(directory) / "model.safetensors")


def logits(model):
    """Logits [4, 11, vocab] of the shared token rows."""
    tokens, mask = case_tokens()
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
    return out.logits.numpy()


def greedy(model, prompt):
    """Greedy continuation that no token ends."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, tokens.shape[1] :].numpy()


def adapt(model, settings, seed=1):
    """The model with a PEFT adapter, A and B both random."""
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                value = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(value.bfloat16().float())
            elif "modules_to_save" in name:
                value = parameter + 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(value.bfloat16().float())
    return adapted.eval()


def as_numpy(state):
    """A dict of tensors as numpy arrays."""
    return {name: np.asarray(value) for name, value in state.items()}
