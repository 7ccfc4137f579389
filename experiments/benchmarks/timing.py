"""Owns the timing: one process for each library, so that neither's threads or memory are in the other's numbers."""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.workload import GROUPS, Workload, write_workload

# A pool's threads look for work for about 0.1 s before they sleep, on a core that the next entry needs.
SETTLE_SECONDS = 0.3
TIMEOUT_SECONDS = 600.0  # that one call may take, compilation included

_side: Any = None  # of a worker process: the library with the workload loaded, and its prepared entries
_prepared: dict[str, Any] = {}


class Worker:
    """A process with one library and a workload.

    Args:
        side: "jax" or "torch".
        workload: the files.
        num_threads: of the library.
        num_devices: that the package shares each micro-batch out over.
    """

    def __init__(self, side: str, workload: Workload, num_threads: int, num_devices: int):
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
        self.description: dict[str, Any] = self._call(_load, side, workload, num_threads, num_devices)

    def prepare(self, name: str) -> dict[str, Any]:
        """Compiles an entry and calls it once; says what that took, or why it is unsupported."""
        return self._call(_prepare, name)

    def run(self, name: str) -> dict[str, Any]:
        """Runs a prepared entry once: seconds, CPU seconds, peak memory, and what the entry itself has to say."""
        return self._call(_run, name)

    def forget(self) -> None:
        """Lets go of prepared entries and what they hold."""
        self._call(_forget)

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown(cancel_futures=True)

    def _call(self, function: Any, *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments).result(TIMEOUT_SECONDS)


def _load(side: str, workload: Workload, num_threads: int, num_devices: int) -> dict[str, Any]:
    global _side
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"):
        os.environ[name] = str(num_threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both libraries share a GPU
    if num_devices > 1:  # of a CPU, one thread each; where there is an accelerator this changes nothing
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    import jax

    if side == "jax":
        jax.config.update("jax_num_cpu_devices", num_devices)
        write_workload(workload)
        from experiments.benchmarks.jax_side import JaxSide

        _side = JaxSide(workload, num_devices)
    else:
        jax.config.update("jax_platforms", "cpu")  # the package's data code imports it; the GPU is PyTorch's here
        from experiments.benchmarks.torch_side import TorchSide

        _side = TorchSide(workload, num_threads)
    return _side.describe()


def _prepare(name: str) -> dict[str, Any]:
    try:
        facts, _prepared[name] = _side.prepare(name)
    except Exception as error:  # whatever a library raises is the finding
        return {"unsupported": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
    return facts


def _run(name: str) -> dict[str, Any]:
    time.sleep(SETTLE_SECONDS)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what is needed now
    Path("/proc/self/clear_refs").write_text("5")
    resident = _status("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    facts = _prepared[name]()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    memory = max(0, _status("VmHWM") - resident)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "memory_bytes": memory, "facts": facts}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _forget() -> None:
    _prepared.clear()
    gc.collect()


def measure_group(workers: dict[str, Any], group: str, repeats: int) -> dict[str, dict[str, Any]]:
    """One group: everything prepared, then `repeats` rounds over its entries in turn; medians of each."""
    entries = {f"{side}: {name}": workers[side].prepare(name) for side, name in GROUPS[group]}
    ready = [(side, name) for side, name in GROUPS[group] if not entries[f"{side}: {name}"].get("unsupported")]
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for side, name in ready:
            runs.setdefault(f"{side}: {name}", []).append(workers[side].run(name))
    for worker in workers.values():
        worker.forget()
    for key, found in runs.items():
        middle = sorted(found, key=lambda run: run["seconds"])[len(found) // 2]
        entries[key] |= {**middle, "memory_bytes": max(run["memory_bytes"] for run in found)}
    return entries
