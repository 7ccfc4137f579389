"""Works on a ledger in a process that tests kill: `append` lines, or `process` and wait when it is erased."""

import sys
import time
from pathlib import Path

from llmeraser_jax.deletion import Ledger, process_queue
from llmeraser_jax.models import load_model
from tests.deletion.small import erase_nothing


def append(path: Path, count: int) -> None:
    """Appends so many lines."""
    for number in range(count):
        with Ledger(path).writing() as writer:
            writer.append("run", {"path": "nowhere", "sha256": str(number)})


def process(path: Path, model_path: str) -> None:
    """Erases, says so, and waits to be killed before an outcome is written."""

    def erase(*arguments, **options):
        made = erase_nothing(*arguments, **options)
        print("erased", flush=True)
        time.sleep(60)
        return made

    process_queue(Ledger(path), everything=True, erase=erase, compute={"model": load_model(model_path)})


if __name__ == "__main__":
    mode, ledger, argument = sys.argv[1:]
    print("begins", flush=True)
    if mode == "append":
        append(Path(ledger), int(argument))
    else:
        process(Path(ledger), argument)
