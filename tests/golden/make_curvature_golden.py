"""Makes `curvature_products.npz`: `python -m tests.golden.make_curvature_golden` at the project's root.

Needs PyTorch, PEFT, curvlinops (curvlinops-for-pytorch 3.0.1 made the file) and dattri (0.3.0). The model is the
golden case `BASE` in float64 with a PEFT adapter of rank 1. Every vector of adapter space is stored by PEFT's
names after a prefix: "a:" the adapter, "v:" what is multiplied, and the products of the mean over examples,

    "gauss_newton:"     curvlinops' GGNLinearOperator, all response tokens
    "fisher:"           curvlinops' EFLinearOperator, the first response token only: for it an example is a row of
                        logits, so that with several tokens it is another matrix than ours
    "hessian:"          dattri's hvp, all response tokens
    "inverse_hessian:"  dattri's ihvp_explicit, (H + rho I)^-1 v
"""

import json
import pathlib
from typing import Any

import numpy as np
import torch
from curvlinops import EFLinearOperator, GGNLinearOperator
from dattri.func.hessian import hvp, ihvp_explicit
from torch.func import functional_call

from tests.golden import files
from tests.golden.cases import CASES
from tests.torch_parity import reference

HERE = pathlib.Path(__file__).parent
BASE = "llama_mha_untied"
ADAPTER = {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}
RHO = 30.0  # above the size of the least eigenvalue, so that the inverse is well conditioned
NUM_EXAMPLES, TIME, RESPONSE = 6, 9, 3


class ResponseLogits(torch.nn.Module):
    """Logits of the response tokens, one row each."""

    def __init__(self, model, positions):
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, tokens):
        logits = self.model(input_ids=tokens).logits[:, self.positions]
        return logits.reshape(-1, logits.shape[-1])


def adapted_model():
    """The golden base with a random adapter, in float64; the adapter alone is trained."""
    model = reference.build(CASES[BASE])
    tensors = files.tensors(files.load(BASE))
    model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    model = reference.adapt(model, ADAPTER, seed=3).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def main():
    """Writes the file."""
    model = adapted_model()
    rng = np.random.default_rng(5)
    tokens = torch.tensor(rng.integers(3, model.config.vocab_size, (NUM_EXAMPLES, TIME)))
    positions = list(range(TIME - 1 - RESPONSE, TIME - 1))
    targets = tokens[:, [p + 1 for p in positions]]
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    generator = torch.Generator().manual_seed(6)
    # Exact in bfloat16, hence in the float32 of an adapter file.
    v = [torch.randn(p.shape, generator=generator).bfloat16().double() for p in parameters]
    loss = torch.nn.CrossEntropyLoss()

    def curvlinops_product(operator_class, module, labels):
        wrapped = [p for p in module.parameters() if p.requires_grad]
        assert [id(p) for p in wrapped] == [id(p) for p in parameters]
        data = [(tokens, labels)]
        operator = operator_class(module, loss, wrapped, data, num_data=NUM_EXAMPLES, check_deterministic=False)
        return operator @ v

    every = ResponseLogits(model, positions)
    first = ResponseLogits(model, positions[:1])
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    sizes = [p.numel() for p in parameters]

    def split(vector):
        return [x.reshape(p.shape) for x, p in zip(vector.split(sizes), parameters, strict=True)]

    def mean_loss(vector):
        values = {f"model.{name}": x for name, x in zip(names, split(vector), strict=True)}
        return loss(functional_call(every, values, (tokens,)), targets.reshape(-1))

    flat_v = torch.cat([x.reshape(-1) for x in v])
    vectors = {
        "a": parameters,
        "v": v,
        "gauss_newton": curvlinops_product(GGNLinearOperator, every, targets.reshape(-1)),
        "fisher": curvlinops_product(EFLinearOperator, first, targets[:, 0]),
        "hessian": split(hvp(mean_loss)((flat,), flat_v)),
        "inverse_hessian": split(ihvp_explicit(mean_loss, regularization=RHO)((flat,), flat_v).reshape(-1)),
    }
    content: dict[str, Any] = {
        "adapter_config": np.array(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", **ADAPTER})),
        "tokens": tokens.numpy(),
        "positions": np.array(positions),
        "rho": np.array(RHO),
    }
    for prefix, tensors in vectors.items():
        for name, tensor in zip(names, tensors, strict=True):
            content[f"{prefix}:{name.replace('.default', '')}"] = tensor.detach().numpy()
    np.savez_compressed(HERE / "curvature_products.npz", **content)


if __name__ == "__main__":
    main()
