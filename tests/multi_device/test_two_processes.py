"""Two processes, as the hosts of a pod are: their sums, their commands and their failures match one process's."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmeraser_jax import trees
from llmeraser_jax.cli import main as llmeraser
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, linearise
from llmeraser_jax.losses import example_losses, gradient_sum
from llmeraser_jax.parallel import make_mesh, on_primary, parse_mesh, replicate, start_processes, to_host
from tests.multi_device.test_one_against_eight import setup
from tests.training import tiny

PROCESSES, DEVICES = 2, 2
TRAINING = ["--epochs", "10", "--batch-size", "4", "--learning-rate", "0.05", "--l2", "1e-3", "--template", "plain"]
LORA = ["--rank", "2", "--alpha", "4", "--target-modules", "q_proj", "v_proj", "down_proj"]
REQUESTS = [
    {"id": "r1", "action": "remove"},
    {"id": "r4", "action": "modify_query", "instruction": "colour of s11"},
    {"id": "r7", "action": "correct_response", "response": "red"},
]
SMALL = ["--sample-size", "4", "--damping", "0.01"]
# With few random rows the factors have null spaces, and the eigenvectors in those are rounding's.
KRONECKER = "cg:preconditioner=kronecker,num_roots=64,factors=DIRECTORY/factors"
# By name of the directory: the ways through the code that reads results off the devices or writes states.
ERASURES = {
    "matching": ["--calibration", "heldout.jsonl", "target-matching", "--num-steps", "3", *SMALL],
    "streamed": ["step", "--stream", "--trust-region", "none", "--solver", "cg:rtol=0.05,max_steps=4", *SMALL],
    "kronecker": ["--budget", "inf", "step", "--solver", KRONECKER, *SMALL],
    # With the factors that the one before has kept.
    "kronecker again": ["--budget", "inf", "step", "--solver", KRONECKER, *SMALL],
}


def in_two_processes(program: str, num_devices: int, second: Path | None = None) -> list[Any]:
    """What each of the processes finds; both must end well. The second one may have a working directory of its own.

    With as many threads as cores, programs that wait for the other process can keep those from running that it
    waits for, where each process has several devices: on two cores commands were seen to hang now and then.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.multi_device.test_two_processes", program]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    started = [
        subprocess.Popen(
            [*command, f"{address},{PROCESSES},{index}"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=second if index else None,
        )
        for index in range(PROCESSES)
    ]
    try:
        # Where one fails, the other may wait for it.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = [pool.submit(process.communicate, timeout=300) for process in started]
            while not all(answer.done() for answer in waiting) and not any(process.poll() for process in started):
                time.sleep(0.1)
            statuses = [process.poll() for process in started]
            for process in started:
                process.send_signal(signal.SIGABRT)  # one that still waits shows where
            concurrent.futures.wait(waiting, timeout=10)
        assert statuses == [0, 0], [process.args for process in started]
        answers = [answer.result()[0] for answer in waiting]
    finally:
        for process in started:
            process.kill()
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def measured(mesh) -> dict[str, list[float]]:
    """Norm and first coordinates of a gradient, and of a cached product with it; the losses of all rows."""
    objective, lora, stack = setup("float32", mesh)
    operator = linearise(DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]))
    gradient = gradient_sum(objective, lora, stack)
    sums = {"gradient": gradient, "product": jax.jit(lambda op, v: op.mv(v))(operator, gradient)}
    numbers = jax.jit(lambda t: [trees.tree_norm(t), *(leaf.ravel()[0] for leaf in jax.tree.leaves(t))])
    found = {name: [float(x) for x in numbers(value)] for name, value in sums.items()}
    return {**found, "losses": example_losses(objective, lora, stack).tolist()}


def test_sums_match_those_of_one_process():
    answers = in_two_processes("sums", DEVICES)
    expected = measured(None)
    for found in itertools.chain(*answers):
        for name, numbers in expected.items():
            np.testing.assert_allclose(found[name], numbers, rtol=1e-4, atol=1e-5 * numbers[0])


def test_what_fails_in_the_leader_fails_everywhere_and_nothing_else_does():
    expected = [
        {
            "good": "wrote",
            "bad": "OSError: disk full",
            "whole": True,
            "idle": "leaves processes 1 without a device",
        },
        {
            "good": "waited",
            "bad": "RuntimeError: The primary process failed; its output has the reason.",
            "whole": True,
            "idle": "leaves processes 1 without a device",
        },
    ]
    assert in_two_processes("failures", DEVICES) == expected


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base model, examples and requests."""
    directory = tmp_path_factory.mktemp("files")
    tiny.save_tiny_model(directory / "model")
    tiny.write_rows(directory / "train.jsonl", tiny.rows())
    tiny.write_rows(directory / "heldout.jsonl", [{**row, "id": "h" + row["id"]} for row in tiny.rows(12)[10:]])
    tiny.write_rows(directory / "requests.jsonl", REQUESTS)
    return directory


def commands(out: str, *flags: str) -> list[list[str]]:
    """Fine-tune, erase in every way, retrain and compare, into directories below `out`."""
    run, requests = f"{out}/run", ["--requests", "requests.jsonl"]
    evaluation = ["--data", "heldout.jsonl", "--workdir", f"{out}/report", *flags]
    training = ["--model", "model", "--data", "train.jsonl", "--microbatch-size", "2", *TRAINING, *LORA]
    return [
        ["finetune", *training, "--workdir", run, *flags],
        *(
            ["erase", "--run", run, *requests, "--workdir", f"{out}/{name}", "--chunk-size", "4", *flags]
            + [word.replace("DIRECTORY", out) for word in how]  # the method comes last, with its own flags
            for name, how in ERASURES.items()
        ),
        ["retrain", "--run", run, *requests, "--seeds", "2", "--workdir", f"{out}/retrained", *flags],
        ["evaluate", "--before", run, "--after", f"{out}/matching", "--retrained", f"{out}/retrained", *evaluation],
    ]


def said(every: list[list[str]]) -> str:
    """What commands, which must all end well, say."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        for arguments in every:
            # Only by target matching do the rows of this random model arrive, which erase says by its exit status.
            incomplete = arguments[0] == "erase" and "matching" not in arguments[arguments.index("--workdir") + 1]
            assert llmeraser(arguments) == (3 if incomplete else 0), arguments
    return text.getvalue()


@pytest.fixture(scope="module")
def both(files, tmp_path_factory) -> tuple[Path, Path]:
    """Directories of all results, of one process and of two, of which the second has but the base; one prints."""
    elsewhere = tmp_path_factory.mktemp("another host")
    shutil.copytree(files / "model", elsewhere / "model")
    with contextlib.chdir(files):
        alone = said(commands("one"))
        primary, follower = in_two_processes("commands", 1, elsewhere)
    assert follower == ""
    assert [path.name for path in elsewhere.iterdir()] == ["model"]
    assert len(primary.splitlines()) == len(alone.splitlines())
    return files / "one", files / "two"


@pytest.mark.parametrize("name", ["run", *ERASURES, "retrained/seed_1", "retrained/seed_2"])
def test_commands_write_the_adapters_of_one_process(both, name):
    one, two = (load_file(directory / name / "adapter" / "adapter_model.safetensors") for directory in both)
    assert one.keys() == two.keys()
    for tensor in one:
        np.testing.assert_allclose(two[tensor], one[tensor], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", list(ERASURES))
def test_erasures_move_the_adapter_alike(both, name):
    def delta(directory: Path) -> dict[str, np.ndarray]:
        before, after = (
            load_file(directory / which / "adapter" / "adapter_model.safetensors") for which in ("run", name)
        )
        return {tensor: after[tensor] - before[tensor] for tensor in before}

    one, two = map(delta, both)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in one.values()))
    apart = np.sqrt(sum(((one[tensor] - two[tensor]) ** 2).sum() for tensor in one))
    assert apart < 1e-3 * norm
    receipts = [json.loads((directory / name / "receipt.json").read_text()) for directory in both]
    assert receipts[0]["gradient_equivalents"] == receipts[1]["gradient_equivalents"]
    assert receipts[0]["counts"] == receipts[1]["counts"]


def test_factors_are_kept_for_the_next_request(both):
    for directory in both:
        made, read = (
            json.loads((directory / name / "receipt.json").read_text())["gradient_equivalents"]["curvature"]
            for name in ("kronecker", "kronecker again")
        )
        assert read < made


def test_reports_agree(both):
    one, two = (json.loads((directory / "report" / "report.json").read_text()) for directory in both)
    for kind in ("forget_loss", "wanted_loss", "heldout_kl"):
        assert two["gap_closure"][kind] == pytest.approx(one["gap_closure"][kind], rel=1e-3)


def test_nothing_is_left_behind(both):
    for directory in both:
        assert sorted(path.name for path in directory.iterdir()) == sorted(
            ["run", "retrained", "report", "factors", *ERASURES]
        )


def _failures() -> dict[str, object]:
    def fail() -> None:
        msg = "disk full"
        raise OSError(msg)

    wrote: list[bool] = []
    on_primary(lambda: wrote.append(True))
    try:
        on_primary(fail)
        bad = "nothing"
    except (OSError, RuntimeError) as error:
        bad = f"{type(error).__name__}: {error}"
    rows = np.arange(PROCESSES * DEVICES * 3.0).reshape(-1, 3)
    mesh = make_mesh(data=PROCESSES * DEVICES)
    spread = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P("data")))(replicate(rows, mesh))
    assert not (spread.is_fully_addressable or spread.is_fully_replicated)
    try:
        parse_mesh(f"data={DEVICES}")
        idle = "nothing"
    except ValueError as error:
        idle = str(error).split(";")[0].partition("' ")[2]
    return {
        "good": "wrote" if wrote else "waited",
        "bad": bad,
        "whole": bool(np.array_equal(to_host(spread), rows)),
        "idle": idle,
    }


def main(program: str, processes: str) -> None:
    """One of the processes: what it found is the last line that it prints, after what collectives have to say."""
    if program == "commands":
        # The first one connects the processes, as a command of its own would.
        first, *others = commands("two", "--mesh", f"fsdp={PROCESSES}")
        found = said([[*first, "--processes", processes], *others])
    else:
        start_processes(processes)
        meshes = make_mesh(data=PROCESSES, model=DEVICES), make_mesh(fsdp=PROCESSES, model=DEVICES)
        found = [measured(mesh) for mesh in meshes] if program == "sums" else _failures()
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
