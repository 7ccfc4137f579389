"""The package's programs compiled for a TPU topology, without a TPU: memory, roofline and collectives of each.

    python -m experiments.pod.main --topology v5e:4x4 --mesh data=4,model=4 --model llama2-7b --workdir DIR

Needs libtpu (`pip install libtpu`). Each program is compiled in a process of its own, and is one JSON file and its
text; a second call compiles what is missing.
"""

from __future__ import annotations

import dataclasses
import gzip
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
from experiments.pod.collectives import collectives
from experiments.pod.costs import CHIPS, Chip, Costs, costs, received_bytes
from experiments.pod.hlo import read_program
from experiments.pod.programs import ENVIRONMENT, MODELS, PROGRAMS
from llmeraser_jax import files
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.convert.quantization import check_quantization
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
        quantization: of the kernels, such as nf4; None leaves them in bfloat16.
        layers: decoder layers; None is the model's own number.
        programs: which.
        tokens: of each row.
        response: tokens under the loss.
        examples: rows that each program computes with.
        microbatch: rows of one micro-batch on each device, or on each group of devices along "model".
        compile: False only counts the operations of the traced programs, in seconds.
        effort: of the compiler in making programs fast, from -1 to 1 (`jax_exec_time_optimization_effort`); -1
            compiles sooner where memory is what matters.
    """

    workdir: Path
    topology: str = "v5e:4x4"
    slices: int = 1
    mesh: str = "data=4,model=4"
    model: str = "llama2-7b"
    quantization: str | None = None
    layers: int | None = None
    programs: tuple[str, ...] = tuple(PROGRAMS)
    tokens: int = 512
    response: int = 64
    examples: int = 112
    microbatch: int = 1
    compile: bool = True
    effort: float = 0.0

    def __post_init__(self) -> None:
        for name, values, allowed in (("model", (self.model,), MODELS), ("programs", self.programs, PROGRAMS)):
            unknown = [value for value in values if value not in allowed]
            if unknown:
                msg = f"{name} has {', '.join(unknown)}; choose from {', '.join(allowed)}."
                raise ValueError(msg)
        if self.quantization is not None:
            check_quantization(self.quantization)
        if self.topology.split(":")[0] not in CHIPS:
            msg = f"topology is {self.topology}; its chip must be one of {', '.join(CHIPS)}."
            raise ValueError(msg)
        check_at_least(self, slices=1, layers=1, tokens=2, response=1, examples=1, microbatch=1)
        self.axes()

    def axes(self) -> dict[str, int]:
        """The mesh's axes and their sizes; not `parallel.parse_mesh`, which wants the devices to be here."""
        return mesh_sizes(self.mesh)


def run(config: PodConfig) -> dict[str, dict[str, Any]]:
    """Compiles what is missing and returns every program's result, with its collectives and costs.

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
        if not config.compile:
            continue
        text = gzip.decompress(path.with_suffix(".hlo.gz").read_bytes()).decode()
        module = read_program(text)
        found = collectives(module, config.axes())
        counted = costs(module, received_bytes(found, config.axes()))
        results[program] |= {"collectives": found, "costs": counted, "text": text}
    return results


def _compile(settings: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = path.with_suffix(".settings")
    files.atomic_write_json(asked, settings)
    # Settings for programs that run here, such as a test suite's, are not for those that are studied.
    unset = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | dict(ENVIRONMENT)
    environment["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = str(settings["effort"])
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


def traced_table(results: dict[str, dict[str, Any]]) -> list[Block]:
    """One line for each program that was not compiled."""
    rows = []
    for program, result in results.items():
        settings, flops = result["settings"], result["traced_flops"]
        seconds = flops / _chip(settings).flops
        rate = settings["examples"] / seconds
        rows.append((program, show_number(flops / 1e12), show_number(seconds), show_number(rate)))
    return [
        Text(
            "Operations of matrix products of each device, as often as the matrix unit passes over them, and the "
            "seconds that they take at the chip's rate: a bound that nothing beats."
        ),
        Table(("program", "TFLOP", "s at least", "rows a second at most"), tuple(rows)),
    ]


def _chip(settings: dict[str, Any]) -> Chip:
    return CHIPS[settings["topology"].split(":")[0]]


def table(results: dict[str, dict[str, Any]]) -> list[Block]:
    """Two lines for each program: what it needs on the chip, and what devices exchange."""
    needed, exchanged = [], []
    for program, result in results.items():
        counted: Costs = result["costs"]
        chip = _chip(result["settings"])
        seconds, (bound, least) = counted.seconds(chip), counted.bound(chip)
        peak = (result["argument_bytes"] + result["temporary_bytes"]) / 2**30
        shares = (f"{show_number(100 * part / least)} %" for part in seconds.values())
        needed.append(
            (
                program, show_number(peak), show_number(counted.flops / 1e12), show_number(counted.hbm_bytes / 1e9),
                show_number(counted.link_bytes / 1e9), show_number(least), bound, *shares,
                show_number(counted.cycles and counted.cycles / 1e6), show_number(result["compile_seconds"]),
            )
        )  # fmt: skip
        listed = "; ".join(
            f"{times} {kind} over {axes} ({show_number(size / 2**20)} MiB)"
            for (kind, axes), (times, size) in collective_totals(result).items()
        )
        exchanged.append((program, listed or "none"))
    header = (
        "program", "GiB", "TFLOP", "GB of HBM", "GB received", "s at least", "bound", "products", "memory", "links",
        "million cycles", "compiled in s",
    )  # fmt: skip
    return [
        Text(
            "Of each device: arguments and temporaries at their peak; operations of matrix products as often as "
            "the matrix unit passes over them, and memory traffic; the time that the longest of products, memory "
            "and links takes at the chip's rates, and each one's share of it; cycles as the compiler estimates "
            "them. Loops count as often as they run; a solver's loop counts once."
        ),
        Table(header, tuple(needed)),
        Text("Collectives as often as they are executed, with the bytes of all their results on a device."),
        Table(("program", "collectives"), tuple(exchanged)),
    ]


def main(config: PodConfig) -> None:
    """Compiles, prints the table, and writes it as `report.md` and `report.html`."""
    log_progress("pod")
    results = run(config)
    blocks = table(results) if config.compile else traced_table(results)
    sys.stdout.write(render_text(blocks))
    layers = "all layers" if config.layers is None else f"{config.layers} layers"
    stored = config.quantization or "bfloat16"
    write_page(
        Page(f"{config.model}, {stored}, {layers}, on {config.topology}, {config.mesh}", tuple(blocks)),
        config.workdir,
    )


if __name__ == "__main__":
    main(tyro.cli(PodConfig))
