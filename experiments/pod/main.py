"""The package's programs compiled for a TPU topology, without a TPU: memory and collectives of each.

    python -m experiments.pod.main --topology v5e:4x4 --mesh data=4,model=4 --model llama2-7b --workdir DIR

Needs libtpu (`pip install libtpu`). Each program is compiled in a process of its own and is one JSON file; a second
call compiles what is missing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import tyro

from experiments.common import log_progress
from experiments.pod.programs import ENVIRONMENT, MODELS, PROGRAMS
from llmeraser_jax import files
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.evaluation.render import Block, Page, Table, Text, render_text, show_number, write_page
from llmeraser_jax.parallel import mesh_sizes

logger = logging.getLogger("pod")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodConfig:
    """What is compiled.

    Attributes:
        workdir: results and the table.
        topology: such as v5e:4x4, v5p:2x2x2, v6e:2x4.
        slices: how many of them; they share out "data".
        mesh: sizes of the axes, such as data=4,fsdp=2,model=2; as many devices as the topology has, or fewer.
        model: tiny, llama2-7b, llama3-8b, or llava-1.5-7b with one picture in each row, which takes 576 of its
            tokens; bfloat16, with an adapter of rank 8 on all linear layers.
        layers: decoder layers; None is the model's own number.
        programs: which.
        tokens: of each row.
        response: tokens under the loss.
        examples: rows that each program computes with.
        microbatch: rows of one micro-batch on each device, or on each group of devices along "model".
    """

    workdir: Path
    topology: str = "v5e:4x4"
    slices: int = 1
    mesh: str = "data=4,model=4"
    model: str = "llama2-7b"
    layers: int | None = None
    programs: tuple[str, ...] = tuple(PROGRAMS)
    tokens: int = 512
    response: int = 64
    examples: int = 112
    microbatch: int = 1

    def __post_init__(self) -> None:
        for name, values, allowed in (("model", (self.model,), MODELS), ("programs", self.programs, PROGRAMS)):
            unknown = [value for value in values if value not in allowed]
            if unknown:
                msg = f"{name} has {', '.join(unknown)}; choose from {', '.join(allowed)}."
                raise ValueError(msg)
        check_at_least(self, slices=1, layers=1, tokens=2, response=1, examples=1, microbatch=1)
        self.axes()

    def axes(self) -> dict[str, int]:
        """The mesh's axes and their sizes; not `parallel.parse_mesh`, which wants the devices to be here."""
        return mesh_sizes(self.mesh)


def run(config: PodConfig) -> dict[str, dict[str, Any]]:
    """Compiles what is missing and returns every program's result.

    Raises:
        RuntimeError: libtpu is not installed, or a program does not compile: what the compiler said.
        ValueError: a result of other settings is in the way.
    """
    if importlib.util.find_spec("libtpu") is None:
        msg = "libtpu is not installed; the TPU compiler is in it: pip install libtpu."
        raise RuntimeError(msg)
    fields = dataclasses.asdict(config)
    shared = {name: value for name, value in fields.items() if name not in ("workdir", "programs")}
    results = {}
    for program in config.programs:
        settings = {**shared, "mesh": config.axes(), "program": program}
        path = config.workdir / f"{program}.json"
        if path.exists() and files.read_json(path)["settings"] != settings:
            msg = f"{path} was compiled with other settings; give another workdir or delete it."
            raise ValueError(msg)
        if not path.exists():
            logger.info("%s", program)
            _compile(settings, path)
        results[program] = files.read_json(path)
    return results


def _compile(settings: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = path.with_suffix(".settings")
    files.atomic_write_json(asked, settings)
    # Settings for programs that run here, such as a test suite's, are not for those that are studied.
    unset = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | dict(ENVIRONMENT)
    command = [sys.executable, "-m", "experiments.pod.programs", str(asked), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    asked.unlink()
    if done.returncode:
        msg = f"{settings['program']} did not compile: {done.stderr.strip()[-2000:]}"
        raise RuntimeError(msg)


def collective_totals(result: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    """Executions, and bytes of their results on each device, by kind and axes."""
    totals: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for one in result["collectives"]:
        key, times = (one["kind"], one["axes"]), one["executions"]
        totals[key] = totals[key][0] + times, totals[key][1] + times * one["bytes"]
    return dict(sorted(totals.items()))


def table(results: dict[str, dict[str, Any]]) -> list[Block]:
    """One line for each program."""
    rows = []
    for program, result in results.items():
        totals = collective_totals(result)
        listed = "; ".join(
            f"{times} {kind} over {axes} ({show_number(size / 2**20)} MiB)"
            for (kind, axes), (times, size) in totals.items()
        )
        peak = (result["argument_bytes"] + result["temporary_bytes"]) / 2**30
        counts = (show_number(result[name] and result[name] / 1e9) for name in ("flops", "accessed_bytes"))
        rows.append((program, show_number(peak), *counts, listed or "none", show_number(result["compile_seconds"])))
    header = ("program", "GiB", "GFLOP", "GB accessed", "collectives", "compiled in s")
    return [
        Text(
            "Of each device: arguments and temporaries at their peak, operations and memory traffic as the "
            "compiler counts them (the body of a loop once), and collectives as often as they are executed, with "
            "the bytes of all their results."
        ),
        Table(header, tuple(rows)),
    ]


def main(config: PodConfig) -> None:
    """Compiles, prints the table, and writes it as `report.md` and `report.html`."""
    log_progress("pod")
    blocks = table(run(config))
    sys.stdout.write(render_text(blocks))
    layers = "all layers" if config.layers is None else f"{config.layers} layers"
    write_page(
        Page(f"{config.model}, {layers}, on {config.topology}, {config.mesh}", tuple(blocks)), config.workdir
    )


if __name__ == "__main__":
    main(tyro.cli(PodConfig))
