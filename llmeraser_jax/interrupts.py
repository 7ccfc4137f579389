"""Ctrl-C and SIGTERM of the console script, from the package's first import to the last line.

Python raises KeyboardInterrupt wherever the main thread happens to be. In an import it can get lost, in a call of
XLA it waits for the call's end, and an orderly exit while XLA's threads work can end in a segmentation fault. So a
thread learns of every signal at once: before a command has begun there is nothing to tidy up, and the process ends;
afterwards the main thread has `GRACE_SECONDS` to do so, or until the next signal.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

GRACE_SECONDS = 5.0


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception."""


_RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_leaving = threading.Lock()


class _State:
    """Of this process; the handlers of a process are its own."""

    installed = False
    raising = False
    received: int | None = None


def is_console() -> bool:
    """Whether this process is the console script, as far as its arguments say."""
    return Path(sys.argv[0]).stem == "llmeraser" or "llmeraser_jax.cli" in sys.orig_argv


def install() -> None:
    """Takes over Ctrl-C and SIGTERM where they are not ignored; once, and in the main thread only."""
    if _State.installed or threading.current_thread() is not threading.main_thread():
        return
    _State.installed = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in _RAISED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True, name="signals").start()


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """While the block runs a signal is an exception in it, so that it can tidy up."""
    _State.raising = True
    try:
        yield
    finally:
        _State.raising = False


def received() -> int | None:
    """The signal that this process has got, if any; what it raised may have been lost on the way."""
    return _State.received


def signal_of(interrupt: KeyboardInterrupt) -> int:
    """The signal that an exception stands for."""
    return signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT


def tell(number: int) -> int:
    """Says on standard error that a signal ends the program; returns the exit status."""
    line = (
        f"llmeraser: {_WORDS[signal.Signals(number)]}; the same command goes on where it was, if it can be resumed"
    )
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    return 128 + number


def leave(number: int) -> NoReturn:
    """Ends the process at once."""
    _leaving.acquire(timeout=1.0)  # whoever comes second waits for the end
    os._exit(tell(number))


def _unraisable(before: Callable[[Any], Any], lost: Any) -> None:
    """Says nothing of an interrupt that was raised where nobody can catch it: the thread ends the process."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        before(lost)


def _on_signal(number: int, frame: Any) -> None:
    _State.received = number
    if not _State.raising:
        leave(number)
    raise _RAISED[signal.Signals(number)]


def _watch(reading: int) -> None:
    """Ends the process where the main thread does not."""
    deadline, first = None, 0
    while True:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        ready, _, _ = select.select([reading], [], [], left)
        if not ready:
            leave(first)
        number = os.read(reading, 1)[0]
        if number not in _RAISED:
            continue  # of a library's own handler
        if deadline is not None or not _State.raising:
            leave(number)
        first, deadline = number, time.monotonic() + GRACE_SECONDS
