"""Makes the golden files of LLaVA models, with PyTorch: `python -m tests.golden.make_llava_golden` at the root.

Each `NAME.npz` holds what `make_golden` writes, for the rows and pictures of `llava_cases`; "features" are the
hidden states of the vision tower that the projector reads.
"""

import json
import pathlib
import tempfile

import numpy as np
from safetensors.numpy import load_file

from tests.golden.llava_cases import LLAVA_ADAPTERS, LLAVA_CASES
from tests.torch_parity import llava_reference, reference

HERE = pathlib.Path(__file__).parent


def main():
    """Writes one file per case."""
    for name, case in LLAVA_CASES.items():
        model = llava_reference.build(case)
        content = {
            "config": np.array(json.dumps(reference.hf_config(model))),
            "features": llava_reference.features(model),
            "logits": llava_reference.logits(model),
            "greedy": np.stack(llava_reference.greedy(model)),
        }
        content.update({f"w:{key}": value for key, value in reference.tensors(model).items()})
        if name in LLAVA_ADAPTERS:
            adapted = reference.adapt(model, LLAVA_ADAPTERS[name])
            content["adapter_logits"] = llava_reference.logits(adapted)
            with tempfile.TemporaryDirectory() as directory:
                adapted.save_pretrained(directory)
                config = (pathlib.Path(directory) / "adapter_config.json").read_text()
                content["adapter_config"] = np.array(config)
                saved = load_file(pathlib.Path(directory) / "adapter_model.safetensors")
                content.update({f"a:{key}": value for key, value in saved.items()})
        np.savez_compressed(HERE / f"{name}.npz", **content)


if __name__ == "__main__":
    main()
