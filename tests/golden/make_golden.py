"""Makes the golden files beside it, with PyTorch: `python -m tests.golden.make_golden [NAME ...]` at the root.

Each `NAME.npz` holds what transformers' PyTorch model gives for the case of that name: "config" (config.json as
text), "w:*" (its tensors), "logits" and, where the case has one, an adapter that PEFT saved:
"adapter_config", "a:*", "adapter_logits"; "greedy" holds continuations of the unpadded rows.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file

from tests.golden.cases import ADAPTERS, CASES, prompts
from tests.torch_parity import reference

HERE = pathlib.Path(__file__).parent


def main():
    """Writes one file per case, or per case named."""
    for name in sys.argv[1:] or CASES:
        case = CASES[name]
        model = reference.build(case)
        content = {
            "config": np.array(json.dumps(reference.hf_config(model))),
            "logits": reference.logits(model),
            "greedy": np.stack([reference.greedy(model, prompt) for prompt in prompts()]),
        }
        content.update({f"w:{key}": value for key, value in reference.tensors(model).items()})
        if name in ADAPTERS:
            adapted = reference.adapt(model, ADAPTERS[name])
            content["adapter_logits"] = reference.logits(adapted)
            with tempfile.TemporaryDirectory() as directory:
                adapted.save_pretrained(directory)
                config = (pathlib.Path(directory) / "adapter_config.json").read_text()
                content["adapter_config"] = np.array(config)
                saved = load_file(pathlib.Path(directory) / "adapter_model.safetensors")
                content.update({f"a:{key}": value for key, value in saved.items()})
        np.savez_compressed(HERE / f"{name}.npz", **content)


if __name__ == "__main__":
    main()
