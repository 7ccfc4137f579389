"""Ctrl-C and SIGTERM end real processes of the console script at any moment, with one line and the right status."""

import os
import signal
import subprocess
import sys
import time

import pytest

# Of start-up (the first imports, jax, the command's own imports) and of work; several at once are a load.
DELAYS = (0.3, 0.8, 1.5, 2.5, 5.0)
LINE = {signal.SIGINT: "llmeraser: interrupted;", signal.SIGTERM: "llmeraser: terminated;"}


def start(directory):
    return subprocess.Popen(
        [sys.executable, "-m", "llmeraser_jax.cli", "demo", "--workdir", str(directory)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_an_interrupt_at_any_moment_ends_with_its_status(tmp_path):
    sent = []
    began = time.monotonic()
    for k in range(len(DELAYS)):
        sent.append((start(tmp_path / str(k)), signal.SIGTERM if k % 3 == 2 else signal.SIGINT))
    for (process, number), delay in zip(sent, DELAYS, strict=True):
        time.sleep(max(0.0, began + delay - time.monotonic()))
        process.send_signal(number)
    for process, number in sent:
        _, told = process.communicate(timeout=60)
        # A process that has not come to the package's first line dies of the signal itself, which shells call 130.
        if process.returncode != -number:
            assert process.returncode == 128 + number, told
            assert told.splitlines()[-1].startswith(LINE[number]) and "Traceback" not in told


def test_a_lost_interrupt_ends_the_process_after_the_grace():
    program = (
        "import sys, time; sys.argv[0] = 'llmeraser'\n"
        "from llmeraser_jax import cli, interrupts\n"
        "interrupts.GRACE_SECONDS = 0.3\n"
        "def run():\n"
        "    print('working', flush=True)\n"
        "    while True:\n"
        "        try:\n"
        "            time.sleep(60)\n"
        "        except BaseException:\n"
        "            pass\n"
        "    return 0\n"
        "cli.main = lambda: cli.guarded(run)\n"
        "cli.console()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and told.startswith(LINE[signal.SIGINT])


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (None, 0)])
def test_the_status_of_an_interrupted_command(error, status, capsys):
    from llmeraser_jax import cli

    def run():
        if error is not None:
            raise error
        return 0

    assert cli.guarded(run) == status
