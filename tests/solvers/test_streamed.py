"""Streamed solves: the same numbers as in memory, and the same iterates after a kill."""

import itertools
import pathlib
import signal
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llmeraser_jax.curvature import StreamedOperator
from llmeraser_jax.solvers import ConjugateGradients, Resumable, Status
from tests.dense import DenseOperator
from tests.solvers.systems import D, DensePreconditioner, as_tree, as_vector, assert_identical, rhs

SOLVER = ConjugateGradients(rtol=1e-6, max_steps=40)


class Killed(Exception):
    pass


def solve_streamed(solver, operator, rhs, *, checkpoint_directory, preconditioner=None, **settings):
    resumable = Resumable(solver=solver, directory=checkpoint_directory, **settings)
    return resumable.solve(operator, rhs, preconditioner)


def rows():
    """A design matrix [60, D] whose second moments are ill-conditioned."""
    rng = np.random.default_rng(7)
    return (rng.normal(size=(60, D)) * np.geomspace(1, 30, D)).astype(np.float32)


@jax.jit
def second_moment_product(batch, v):
    flat, unravel = ravel_pytree(v)
    return unravel(batch.T @ (batch @ flat) / 60)


def operator(kill_at=None, sent=None):
    """The mean of `x x'`, plus 0.1; raises, or calls `sent`, at product number `kill_at`."""
    count = itertools.count(1)

    def batches():
        if next(count) == kill_at:
            if sent is not None:
                sent()
            raise Killed
        yield from np.split(rows(), 6)

    return StreamedOperator(batches=batches, product=second_moment_product, shift=0.1)


def b32():
    return as_tree(rhs().astype(np.float32))


def test_streamed_product_is_that_of_the_whole_matrix_and_keeps_dtypes():
    matrix = rows().T.astype(float) @ rows() / 60 + 0.1 * np.eye(D)
    product = operator().mv(b32())
    np.testing.assert_allclose(as_vector(product), matrix @ rhs(), rtol=1e-5, atol=1e-3)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), b32())
    assert {leaf.dtype for leaf in jax.tree.leaves(operator().mv(half))} == {jnp.dtype(jnp.bfloat16)}


def test_narrow_products_are_summed_in_float32():
    # 1 + 2^-9 is not a bfloat16: a sum held in that type would stay at 1.
    terms = [1.0] + [2.0**-9] * 256
    narrow = StreamedOperator(batches=lambda: terms, product=lambda term, v: jax.tree.map(lambda x: term * x, v))
    total = narrow.mv({"x": jnp.ones((3,), jnp.bfloat16)})
    np.testing.assert_array_equal(np.asarray(total["x"], np.float32), 1.5)


def test_a_streamed_solve_is_the_solve_in_memory(tmp_path):
    matrix = jnp.asarray(rows().T @ rows() / 60 + 0.1 * np.eye(D, dtype=np.float32))
    streamed = solve_streamed(SOLVER, operator(), b32(), checkpoint_directory=tmp_path)
    whole = SOLVER.solve(DenseOperator(matrix), b32())
    assert Status(int(streamed.status)) is Status(int(whole.status)) is Status.CONVERGED
    np.testing.assert_allclose(as_vector(streamed.value), as_vector(whole.value), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kill_at", [1, 3, 6, 9])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_killed_solve_goes_on_with_bit_identical_iterates(tmp_path, kill_at, preconditioned):
    diagonal = DensePreconditioner(jnp.diag(1 / jnp.asarray((rows() ** 2).mean(0) + 0.1)))
    solve = partial(
        solve_streamed,
        ConjugateGradients(rtol=0.0, max_steps=11),
        rhs=b32(),
        every=2,
        preconditioner=diagonal if preconditioned else None,
    )
    whole = solve(operator(), checkpoint_directory=tmp_path / "whole")
    with pytest.raises(Killed):
        solve(operator(kill_at), checkpoint_directory=tmp_path / "killed")
    # Of the products made before the kill, at most every - 1 are made again; the last is the true residual's.
    resumed = solve(operator(1 + 11 + 1 - 2 * ((kill_at - 1) // 2)), checkpoint_directory=tmp_path / "killed")
    assert_identical(resumed, whole)
    assert int(whole.num_steps) == 11


def test_calling_again_after_the_end_costs_one_product(tmp_path):
    first = solve_streamed(SOLVER, operator(), b32(), checkpoint_directory=tmp_path)
    again = solve_streamed(SOLVER, operator(kill_at=2), b32(), checkpoint_directory=tmp_path)
    assert_identical(again, first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rhs": as_tree(rhs(3).astype(np.float32))}, "right-hand side was"),
        ({"solver": ConjugateGradients(rtol=1e-3, max_steps=40)}, "rtol was '1e-06', is '0.001'"),
        ({"solver": ConjugateGradients(rtol=1e-6, max_steps=50)}, "max_steps was 40, is 50"),
        ({"preconditioner": DensePreconditioner(jnp.eye(D))}, "preconditioner was 'none'"),
        ({"description": "other data"}, "description was 'data A', is 'other data'"),
    ],
)
def test_the_state_of_another_solve_is_refused_by_name(tmp_path, change, named):
    arguments = {"solver": SOLVER, "rhs": b32(), "description": "data A", **change}
    with pytest.raises(Killed):
        solve_streamed(SOLVER, operator(4), b32(), checkpoint_directory=tmp_path, every=1, description="data A")
    with pytest.raises(ValueError) as error:
        solve_streamed(operator=operator(), checkpoint_directory=tmp_path, **arguments)
    assert named in str(error.value) and "directory of its own" in str(error.value)


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="not the directory of a resumable solve"):
        solve_streamed(SOLVER, operator(), b32(), checkpoint_directory=tmp_path)


def test_every_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="every is 0"):
        solve_streamed(SOLVER, operator(), b32(), checkpoint_directory=tmp_path, every=0)


def test_a_process_killed_outright_goes_on_with_bit_identical_iterates(tmp_path):
    child = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8)\n"
        "import os, signal, sys\n"
        "from tests.solvers import test_streamed as t\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.solve_streamed(t.SOLVER, t.operator(6, kill), t.b32(), checkpoint_directory=sys.argv[1], every=2)\n"
    )
    root = pathlib.Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", child, str(tmp_path / "killed")], check=False, cwd=root)
    assert ended.returncode == -signal.SIGKILL
    whole = solve_streamed(SOLVER, operator(), b32(), checkpoint_directory=tmp_path / "whole", every=2)
    products = int(whole.num_steps) - 4 + 1
    resumed = solve_streamed(
        SOLVER, operator(products + 1), b32(), checkpoint_directory=tmp_path / "killed", every=2
    )
    assert_identical(resumed, whole)
