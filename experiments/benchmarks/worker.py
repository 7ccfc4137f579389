"""Owns the worker processes: one library each, so that neither's threads or memory are in the other's numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from experiments.benchmarks.sides import Prepared, Timed, explain, limit_threads, measure, use_cpu_devices
from experiments.benchmarks.workload import SHAPES, Shape, Workload, write_workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker loads.

    Attributes:
        side: "jax" or "torch".
        workload: the files.
        size: name of the shape, written if its files are missing.
        rank: of the adapter.
        num_threads: of both libraries.
        num_devices: that the package shares each micro-batch out over.
        vocab_size: of the made-up tokenizer.
    """

    side: str
    workload: Workload
    size: str
    rank: int
    num_threads: int
    num_devices: int
    vocab_size: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.size]


class WorkerError(RuntimeError):
    """A worker died, or did not answer in time."""


class Worker:
    """A process that answers to commands."""

    def __init__(self, spec: WorkerSpec, timeout: float):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._timeout = timeout
        self._process = context.Process(target=_serve, args=(spec, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.description: dict[str, Any] = self._receive(3600)

    def prepare(self, name: str) -> Prepared:
        """Compiles an entry and calls it once."""
        return self._ask("prepare", name)

    def run(self, name: str) -> Timed:
        """Runs a prepared entry once."""
        return self._ask("run", name)

    def forget(self) -> None:
        """Lets go of prepared entries and what they hold."""
        self._ask("forget", "")

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError, ValueError):
            self._connection.send(("stop", ""))
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _ask(self, command: str, name: str) -> Any:
        try:
            self._connection.send((command, name))
        except OSError as error:
            msg = f"The worker has ended: {error}."
            raise WorkerError(msg) from error
        return self._receive(self._timeout)

    def _receive(self, timeout: float) -> Any:
        if not self._connection.poll(timeout):
            msg = f"no answer within {timeout:.0f} s"
            raise WorkerError(msg)
        try:
            answer = self._connection.recv()
        except EOFError as error:
            self._process.join(5)
            msg = f"The worker ended with exit code {self._process.exitcode}, as one that ran out of memory does."
            raise WorkerError(msg) from error
        if isinstance(answer, str):
            raise WorkerError(answer)
        return answer


def _serve(spec: WorkerSpec, connection: Connection) -> None:
    limit_threads(spec.num_threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both libraries share a GPU
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            side = _load(spec)
            connection.send(side.describe())
    except Exception as error:
        traceback.print_exc()
        connection.send(explain(error))
        return
    prepared: dict[str, Any] = {}
    while True:
        try:
            command, name = connection.recv()
        except EOFError:
            return
        if command == "stop":
            return
        if command == "forget":
            prepared.clear()
            side.forget()
            gc.collect()
            connection.send(True)
        elif command == "prepare":
            try:
                answer, prepared[name] = side.prepare(name)
            except Exception as error:  # whatever a library raises is the finding
                answer = Prepared(unsupported=explain(error))
            connection.send(answer)
        else:
            try:
                connection.send(measure(side, prepared[name]))
            except Exception as error:
                connection.send(explain(error))
        gc.collect()


def _load(spec: WorkerSpec) -> Any:
    if spec.side == "jax":
        use_cpu_devices(spec.num_devices)
        write_workload(spec.workload, spec.shape, rank=spec.rank, vocab_size=spec.vocab_size)
        from experiments.benchmarks.jax_side import JaxSide

        return JaxSide(spec.workload, spec.num_devices)
    import jax

    jax.config.update("jax_platforms", "cpu")  # the package's data code imports it; the GPU is PyTorch's here
    from experiments.benchmarks.torch_side import TorchSide

    return TorchSide(spec.workload, spec.num_threads)
