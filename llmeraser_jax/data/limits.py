"""Bounds on the work that a file can ask for: chat templates are programs."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STATM = Path("/proc/self/statm")


@contextlib.contextmanager
def limited(what: str, *, seconds: float, num_bytes: int) -> Iterator[None]:
    """Bounds the processor time and the memory that a block of Python takes.

    Time is bounded in the main thread only, which the console and notebooks work in; memory on Linux.

    Args:
        what: begins the message.
        seconds: of this process's time.
        num_bytes: more than the process has when the block begins.

    Raises:
        ValueError: the block took longer.
        MemoryError: it took more memory.
    """

    def stop(number: int, frame: Any) -> None:
        msg = f"{what} takes longer than {seconds:g} s; it does not seem to end."
        raise ValueError(msg)

    with contextlib.ExitStack() as stack:
        if _STATM.exists():
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            now = int(_STATM.read_text().split()[0]) * resource.getpagesize()
            most = now + num_bytes
            if soft == resource.RLIM_INFINITY or most < soft:
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))
                stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGVTALRM, stop)
            stack.callback(signal.signal, signal.SIGVTALRM, before)
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            stack.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0.0)
        yield
