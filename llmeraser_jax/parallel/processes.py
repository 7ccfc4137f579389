"""Several processes that run one program, as on the hosts of a pod: start-up, the primary process, host copies.

Every process runs the same program on the same files and takes the same decisions: it decides by replicated values
and the primary process's files only. That one alone writes files; where the others read them, `hosts` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmeraser_jax.types import PyTree

AUTOMATIC = "auto"


def start_processes(text: str) -> None:
    """Connects this process with the others. Call it before any JAX computation.

    Args:
        text: empty for a single process; `auto` where the cluster environment describes the processes (Cloud TPU,
            Slurm, Kubernetes, Open MPI: see `jax.distributed.initialize`); else `ADDRESS:PORT,COUNT,INDEX`: the
            address that the primary process listens on, the number of processes, and this one's index.

    Raises:
        ValueError: the text has another form.
        RuntimeError: the other processes cannot be reached.
    """
    if not text:
        return
    if text == AUTOMATIC:
        jax.distributed.initialize()
        return
    parts = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", text)
    if parts is None or not int(parts[3]) < int(parts[2]):
        msg = (
            f"Processes {text!r} are not understood; write auto, or ADDRESS:PORT,COUNT,INDEX with INDEX below "
            "COUNT: for example 10.0.0.1:1234,2,0 and 10.0.0.1:1234,2,1."
        )
        raise ValueError(msg)
    jax.distributed.initialize(parts[1], int(parts[2]), int(parts[3]))


def is_primary() -> bool:
    """Whether this process writes files and prints: the first one, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


_alone = False  # inside of `on_primary`, where the others wait


def works_alone() -> bool:
    """Whether no other process runs the same code now."""
    return _alone or not jax.distributed.is_initialized()


def on_primary(fn: Callable[[], object]) -> None:
    """Calls `fn` in the primary process while the others wait. Every process has to call this.

    Args:
        fn: must not compute with arrays that are sharded over processes; that would wait for the others for ever.

    Raises:
        Exception: what `fn` raised, in the primary process.
        RuntimeError: `fn` raised, in the other processes.
    """
    global _alone
    if works_alone():
        fn()
        return
    failure: Exception | None = None
    if is_primary():
        _alone = True
        try:
            fn()
        except Exception as error:  # raised below, once the others know
            failure = error
        finally:
            _alone = False
    failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failure is not None)))
    if failure is not None:
        raise failure
    if failed:
        msg = "The primary process failed; its output has the reason."
        raise RuntimeError(msg)


def to_host(tree: PyTree) -> PyTree:
    """The arrays as whole NumPy arrays; every process has to call this where they are sharded over processes."""

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)
