"""Does an independent implementation in PyTorch come to the same adapter? From files to files.

    python -m experiments.torch_baseline.main --run RUN --requests requests.jsonl --workdir OUT [--compare ERASED]

reads what `llmeraser erase` reads, and writes the adapter in PEFT's format with what the solves said.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import load_file, save_file

from experiments.torch_baseline.erase import BaselineConfig, Eraser, edit_data, erase
from experiments.torch_baseline.model import axpy, load_adapted_model, norm
from llmeraser_jax import data, files
from llmeraser_jax.models import load_tokenizer
from llmeraser_jax.runs import ADAPTER_DIRECTORY, RunError, load_run, model_directory, model_fingerprint

WEIGHTS = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Main:
    """Carry out a request file with PyTorch, transformers and PEFT.

    Attributes:
        run_directory: the run to erase from.
        requests: the request file (JSON lines).
        workdir: directory to make.
        compare: a run that `llmeraser erase` made of the same requests: how far the two changes are apart.
        device: cpu, cuda, cuda:1, ...
        config: how.
    """

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    requests: Path
    workdir: Path
    compare: Path | None = None
    device: str = "cpu"
    config: tyro.conf.OmitArgPrefixes[BaselineConfig] = dataclasses.field(default_factory=BaselineConfig)


def erase_run(arguments: Main) -> dict[str, Any]:
    """Erases from a run and writes `workdir`, whole or not at all.

    Returns:
        `config`, `steps`, norms, `gradient_equivalents`, `seconds`, and `difference` where there is one to compare.

    Raises:
        RequestError: what is wrong with the request file.
        RunError: the data or the model is not the run's.
        BaselineError: a solve failed; nothing is written.
        FileExistsError: `workdir` holds something.
    """
    files.require_empty(arguments.workdir)
    run, config = load_run(arguments.run_directory), arguments.config
    torch.manual_seed(config.seed)  # dropout's, where the released script has it on
    if model_fingerprint(run.model_path) != run.model_sha256:
        msg = f"The base model at {run.model_path} is not the one that {run.path} was trained on."
        raise RunError(msg)
    examples = run.load_examples()
    requests = data.load_requests(arguments.requests, examples)
    base, adapter = model_directory(run.model_path), run.path / ADAPTER_DIRECTORY
    tokenizer, dtype = load_tokenizer(base), getattr(torch, run.model_dtype)
    model = load_adapted_model(base, adapter, dtype=dtype, device=arguments.device)
    started = time.perf_counter()
    edited = edit_data(run.encode(examples, tokenizer), requests, tokenizer)
    eraser, before = Eraser(model, edited, config, l2=run.train_config.l2), model.loaded_params()
    erased = erase(eraser, before)
    change = axpy(-1.0, before, erased.params)
    told = {
        "config": dataclasses.asdict(config),
        "steps": list(erased.steps),
        "delta_norm": norm(change),
        "adapter_norm_before": norm(before),
        "gradient_equivalents": {**erased.cost, "total": erased.cost["rhs"] + erased.cost["curvature"]},
        "seconds": time.perf_counter() - started,
    }
    if arguments.compare is not None:
        ours = load_file(arguments.compare / ADAPTER_DIRECTORY / WEIGHTS, device=arguments.device)
        theirs = axpy(-1.0, before, {name: ours[name].to(tensor.dtype) for name, tensor in before.items()})
        told["difference"] = norm(axpy(-1.0, theirs, change)) / norm(theirs)
    with files.atomic_directory(arguments.workdir) as directory:
        files.atomic_write_json(directory / "erasure.json", files.finite_json(told))
        (directory / ADAPTER_DIRECTORY).mkdir()
        shutil.copy(adapter / "adapter_config.json", directory / ADAPTER_DIRECTORY)
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in erased.params.items()}
        save_file(tensors, directory / ADAPTER_DIRECTORY / WEIGHTS, metadata={"format": "pt"})
    return told


def main(arguments: Main) -> int:
    """Runs it and says what it did; returns the exit status."""
    try:
        told = erase_run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    cost = told["gradient_equivalents"]
    for step in told["steps"]:
        sys.stdout.write(
            f"weight {step['weight_before']:.3g} -> {step['weight_after']:.3g}: {step['status']}, "
            f"{step['iterations']} iterations, relative residual {step['relative_residual']:.2g}\n"
        )
    sys.stdout.write(
        f"change / adapter: {told['delta_norm']:.3g} / {told['adapter_norm_before']:.3g}\n"
        f"gradient equivalents: {cost['total']:.0f} (diagnostics {cost['diagnostics']:.0f})\n"
    )
    if "difference" in told:
        sys.stdout.write(f"difference of the two changes / the package's: {told['difference']:.3g}\n")
    sys.stdout.write(f"Adapter: {arguments.workdir / ADAPTER_DIRECTORY}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Main)))
