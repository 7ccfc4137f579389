"""Owns what a run reports while it goes: metrics as JSON lines, TensorBoard on request, a progress bar."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmeraser_jax import files
from llmeraser_jax.parallel import is_primary


def _lines_up_to(path: Path, last_step: int) -> list[str]:
    """The complete lines of a metrics file whose step is at most `last_step`."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the line being written when the process was killed
        if not line.endswith("\n"):
            break
        if record["step"] <= last_step:
            kept.append(line)
    return kept


class MetricsLogger:
    """Metrics as JSON lines, one flushed line per call; optionally TensorBoard beside them.

    Opening the file of an interrupted run with the step that was restored drops every later line, so that the
    finished file reads as if there had been no interruption. Only process 0 writes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        last_step: int = 0,
        tensorboard_dir: str | os.PathLike[str] | None = None,
    ):
        """Opens the file.

        Args:
            path: the JSON-lines file; its lines up to `last_step` are kept.
            last_step: the step that training goes on from; 0 starts anew.
            tensorboard_dir: also write TensorBoard events there (extra `tensorboard`).

        Raises:
            ImportError: TensorBoard was asked for and tensorboardX is not installed.
        """
        self._file = None
        self._writer = None
        if not is_primary():
            return
        if tensorboard_dir is not None:
            self._writer = _tensorboard_writer(tensorboard_dir, purge_step=last_step + 1)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write_text(path, "".join(_lines_up_to(path, last_step)))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def log(self, step: int, **values: Any) -> None:
        """Appends `{"step": step, **values}`; numbers also go to TensorBoard.

        Raises:
            ValueError: a number is not finite.
        """
        if self._file is None:
            return
        self._file.write(files.to_json({"step": int(step), **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if not isinstance(value, str | bool):
                    self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        """Closes the file and the TensorBoard writer."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _tensorboard_writer(directory: str | os.PathLike[str], *, purge_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        msg = (
            "TensorBoard output was asked for and tensorboardX is not installed. "
            "Install the extra, pip install 'llmeraser-jax[tensorboard]', or leave it out."
        )
        raise ImportError(msg) from error
    return SummaryWriter(os.fspath(directory), purge_step=purge_step)


def is_watched() -> bool:
    """Whether somebody sees what is written while it is: on a terminal, or in a notebook."""
    interactive = sys.modules.get("IPython")
    shell = None if interactive is None else interactive.get_ipython()
    return sys.stderr.isatty() or type(shell).__name__ == "ZMQInteractiveShell"


def progress(*, description: str, total: int, initial: int = 0, shown: bool | None = None) -> tqdm:
    """A progress bar, moved with `.update()`; shown by the primary process where somebody watches.

    Args:
        description: the words before the bar.
        total: how many items.
        initial: items done before a restart.
        shown: None is where somebody watches.
    """
    hidden = not is_primary() or not (is_watched() if shown is None else shown)
    return tqdm(desc=description, total=total, initial=initial, disable=hidden, leave=False)
