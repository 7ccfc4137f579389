"""Several processes that work as one, as on the hosts of a pod: how they start, who writes, what each gets to see.

Every process runs the same program over the same files and takes the same decisions, because all that it decides by
is either read from those files or replicated. Only the leader writes; what it writes the others read, so the
directories have to be on a file system that all of them see.
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
    """Connects this process with the others; before anything is computed with JAX.

    Args:
        text: empty for a single process; `auto` where the cluster says who they are (Cloud TPU, Slurm, Kubernetes,
            Open MPI: see `jax.distributed.initialize`); else `ADDRESS:PORT,COUNT,INDEX`, where the leader listens,
            how many there are and which of them this is.

    Raises:
        ValueError: the text is none of these.
        RuntimeError: the others cannot be reached.
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


def leads() -> bool:
    """Whether this is the process that writes and speaks: the first one, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def on_leader(fn: Callable[[], object]) -> None:
    """Calls `fn` in the leader, while the others wait until it is done; all of them have to come here.

    Args:
        fn: not to compute with arrays that are spread over processes, where the others would be missed.

    Raises:
        Exception: in the leader what `fn` raised.
        RuntimeError: in the others, where it raised.
    """
    if not jax.distributed.is_initialized():
        fn()
        return
    failure: Exception | None = None
    if leads():
        try:
            fn()
        except Exception as error:  # raised below, once the others know
            failure = error
    failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failure is not None)))
    if failure is not None:
        raise failure
    if failed:
        msg = "The first process has failed; it says why."
        raise RuntimeError(msg)


def to_host(tree: PyTree) -> PyTree:
    """The arrays of a tree as NumPy's, whole in every process; where parts are elsewhere, all have to come here."""

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)
