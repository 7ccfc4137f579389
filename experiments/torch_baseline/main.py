"""LLMEraser on PyTorch, from files to files: one command, the files of `llmeraser erase`.

python -m experiments.torch_baseline.main --run RUN --requests requests.jsonl --workdir OUT --mode cg
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.torch_baseline.config import BaselineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Main:
    """Carry out a request file with PyTorch, transformers and PEFT.

    Attributes:
        run_directory: the run to erase from.
        requests: the request file (JSON lines).
        workdir: directory to make.
        data: where the training data is now; default: where it was.
        device: cpu, cuda, cuda:1, ...
        config: how.
    """

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    requests: Path
    workdir: Path
    data: Path | None = None
    device: str = "cpu"
    config: tyro.conf.OmitArgPrefixes[BaselineConfig] = dataclasses.field(default_factory=BaselineConfig)


def main(arguments: Main) -> int:
    """Runs it and says what it did; returns the exit status."""
    # PyTorch is loaded here, so that --help answers at once.
    from experiments.torch_baseline.job import erase_run
    from llmeraser_jax.runs import load_run
    from llmeraser_jax.unlearning import UnlearningError

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    try:
        run = load_run(arguments.run_directory)
        config = dataclasses.replace(arguments.config, l2=run.train_config.l2)
        _, receipt = erase_run(
            run,
            arguments.requests,
            arguments.workdir,
            config,
            device=arguments.device,
            data_path=arguments.data,
        )
    except (UnlearningError, ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    solver, cost = receipt["solver"], receipt["gradient_equivalents"]
    sys.stdout.write(
        f"{receipt['outcome']}\n"
        f"  solver               {solver['status']} ({solver['iterations']} iterations, "
        f"relative residual {solver['relative_residual']:.2g})\n"
        f"  change / adapter     {receipt['delta_norm']:.3g} / {receipt['adapter_norm_before']:.3g}\n"
        f"  gradient equivalents {cost['total']:.0f} (diagnostics {cost['diagnostics']:.0f}), "
        f"{receipt['seconds']:.1f} s\n"
        f"Run directory: {arguments.workdir}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Main)))
