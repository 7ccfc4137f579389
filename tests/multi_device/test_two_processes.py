"""Sums over examples that two processes share, as the hosts of a pod do, match one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, make_linearised
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.parallel import make_mesh
from tests.multi_device.test_one_against_eight import setup

PROCESSES, DEVICES = 2, 2


def measured(mesh) -> dict[str, list[float]]:
    """Norm and first coordinates of a gradient, and of a cached product with it."""
    objective, lora, stack = setup("float32", mesh)
    operator = make_linearised(DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]))
    gradient = gradient_sum(objective, lora, stack)
    sums = {"gradient": gradient, "product": jax.jit(lambda op, v: op.mv(v))(operator, gradient)}
    numbers = jax.jit(lambda t: [trees.tree_norm(t), *(leaf.ravel()[0] for leaf in jax.tree.leaves(t))])
    return {name: [float(x) for x in numbers(value)] for name, value in sums.items()}


def test_two_processes_match_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.multi_device.test_two_processes", address]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    started = [
        subprocess.Popen([*command, str(process)], stdout=subprocess.PIPE, text=True, env=environment)
        for process in range(PROCESSES)
    ]
    try:
        answers = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0]
    expected = measured(None)
    for answer in answers:
        found = json.loads(answer.splitlines()[-1])
        for name, numbers in expected.items():
            np.testing.assert_allclose(found[name], numbers, rtol=1e-4, atol=1e-5 * numbers[0])


def main(address: str, process: str) -> None:
    """One of the processes: prints what it measured as the last line."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, PROCESSES, int(process))
    print(json.dumps(measured(make_mesh(data=PROCESSES, model=DEVICES))))


if __name__ == "__main__":
    main(*sys.argv[1:])
