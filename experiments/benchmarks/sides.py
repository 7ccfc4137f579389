"""Owns the protocol between the command and its two workers: what is measured, and what a worker answers."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

SIDES = ("jax", "torch")
RIGHT_HAND_SIDES = (2, 4, 8)
# By curvature: enough for a positive definite system on random weights (Ritz values of the Hessian reach -6.3 at
# 1m), and little enough that no solve converges before it has taken its iterations.
CG_DAMPING = {"hessian": 20.0, "gauss-newton": 1.0}

# A pool's threads go on looking for work for about 0.1 s before they sleep, on a core that the next entry needs.
SETTLE_SECONDS = 0.3

# Entries of each group, by side, in the order in which a repetition runs them.
GROUPS: dict[str, tuple[tuple[str, str], ...]] = {
    "ceiling": (
        ("jax", "matmul float32"),
        ("torch", "matmul float32"),
        ("jax", "matmul bfloat16"),
        ("torch", "matmul bfloat16"),
    ),
    "products": (
        ("jax", "gradient"),
        ("torch", "gradient"),
        ("jax", "hessian recomputed"),
        ("torch", "hessian reverse-over-reverse"),
        ("jax", "hessian cached"),
        ("torch", "hessian forward-over-reverse"),
        ("torch", "hessian kept"),
        ("jax", "gauss-newton recomputed"),
        ("torch", "gauss-newton shared"),
        ("jax", "gauss-newton cached"),
        ("torch", "gauss-newton separate"),
        ("torch", "gauss-newton kept"),
        ("jax", "build hessian cache"),
        ("jax", "build gauss-newton cache"),
    ),
    # The package's opt-in: matrix products with bfloat16 operands, whatever the base is stored in.
    "operands": (
        ("jax", "hessian recomputed"),
        ("jax", "hessian recomputed, bfloat16 operands"),
        ("jax", "gauss-newton recomputed"),
        ("jax", "gauss-newton recomputed, bfloat16 operands"),
    ),
    "many": (
        ("jax", "hessian recomputed"),
        *(("jax", f"hessian recomputed k={k}") for k in RIGHT_HAND_SIDES),
        ("jax", "hessian cached"),
        ("jax", f"hessian cached k={RIGHT_HAND_SIDES[-1]}"),
    ),
    "cg": (
        ("jax", "cg hessian cached"),
        ("jax", "cg hessian recomputed"),
        ("torch", "cg hessian reverse-over-reverse"),
        ("torch", "cg hessian kept"),
        ("torch", "hessian reverse-over-reverse"),
        ("jax", "cg gauss-newton cached"),
        ("torch", "cg gauss-newton shared"),
        ("torch", "cg gauss-newton kept"),
        ("torch", "hessian forward-over-reverse"),
    ),
    "erase": (("jax", "erase"), ("torch", "erase"), ("torch", "erase kept")),
    "compile": (
        ("jax", "gradient"),
        ("torch", "compile gradient"),
        ("torch", "compile gauss-newton shared"),
        ("torch", "compile hessian reverse-over-reverse"),
        ("torch", "compile hessian forward-over-reverse"),
    ),
}


def solve_facts(asked: int, iterations: int, *, negative_curvature: bool) -> dict[str, Any]:
    """Iterations and products of a solve: one product each, and one for the true residual.

    Raises:
        RuntimeError: the solve ended early, so that its products are not what was to be timed.
    """
    if negative_curvature or iterations != asked:
        why = "met negative curvature" if negative_curvature else "converged"
        msg = f"The solve {why} after {iterations} of {asked} iterations; CG_DAMPING does not suit this model."
        raise RuntimeError(msg)
    return {"iterations": iterations, "products": iterations + 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a worker says once an entry can run.

    Attributes:
        first_seconds: of the first call, compilation included.
        compile_seconds: of compilation alone, where it can be told apart.
        temp_bytes: what the compiled program works in, where a compiler says so.
        argument_bytes: of its arguments and results, the base and the data among them.
        unsupported: why it cannot run: type and first line of the exception; empty where it can.
    """

    first_seconds: float | None = None
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    argument_bytes: int | None = None
    unsupported: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """One repetition.

    Attributes:
        seconds: on the wall.
        cpu_seconds: of all threads of the worker; on a busy machine it says more.
        memory_bytes: the peak during the repetition over what was held before it: of the resident set on a CPU,
            of the allocator on a GPU; None where it cannot be read.
        facts: what the entry itself has to say.
    """

    seconds: float
    cpu_seconds: float
    memory_bytes: int | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Side(Protocol):
    """One library, with the workload loaded."""

    def prepare(self, name: str) -> tuple[Prepared, Callable[[], dict[str, Any]]]:
        """Compiles an entry and calls it once; the function runs it to the end and returns facts."""
        ...

    def forget(self) -> None:
        """Lets go of what prepared entries share."""
        ...

    def device_peak(self) -> Callable[[], int | None] | None:
        """Starts to watch the device's allocator: a function that returns the peak since, or None on a CPU."""
        ...

    def describe(self) -> dict[str, Any]:
        """Device, versions, sizes."""
        ...


def measure(side: Side, run: Callable[[], dict[str, Any]]) -> Timed:
    """Runs an entry once, its memory watched, after a while in which the other library's threads fall asleep."""
    time.sleep(SETTLE_SECONDS)
    device = side.device_peak()
    resident = None if device is not None else _watch_resident()
    started, cpu = time.perf_counter(), time.process_time()
    facts = run()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    watch = device or resident
    return Timed(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        memory_bytes=None if watch is None else watch(),
        facts=facts,
    )


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    msg = f"/proc/self/status has no {field}."
    raise OSError(msg)


def _watch_resident() -> Callable[[], int] | None:
    """Peak of this process's resident set over what it is now; None where the kernel does not offer a reset."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what is needed now
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        return None
    return lambda: max(0, _status("VmHWM") - before)


def limit_threads(num_threads: int) -> None:
    """Binds this process to as many CPUs; to be called before a library starts its threads."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:num_threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"):
        os.environ[name] = str(num_threads)


def use_cpu_devices(num_devices: int) -> None:
    """Makes JAX show this process's CPU as several devices, one thread each; to be called before it computes.

    Where there is another accelerator nothing changes.
    """
    if num_devices > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
        import jax

        jax.config.update("jax_num_cpu_devices", num_devices)


def explain(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
