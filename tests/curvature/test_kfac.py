"""Kronecker factors: exact where the structure is, the best diagonal in their basis elsewhere; kept and refused."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.curvature.factor import example_rows, stacked_weights
from llmeraser_jax.curvature.kfac import EkFac, ekfac, example_factors, fingerprint, load_ekfac, save_ekfac
from llmeraser_jax.curvature.taps import _outputs_and_inputs, token_factors
from llmeraser_jax.losses import Objective, half_squared_error, half_squared_error_root
from llmeraser_jax.parallel import make_mesh, replicate
from llmeraser_jax.solvers import ConjugateGradients, Status
from tests.curvature.problem import decoder_problem
from tests.dense import materialise
from tests.problems import ArrayExamples, ridge_objective, split_params

RHO = 0.05
U = np.array([[0.8, -0.5, 0.3], [0.2, 1.1, -0.7]])  # what reads each of the two matrices' outputs


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def bilinear_outputs(readers, params, batch):
    """`sum_l u_l' W_l x`: with one token, the Gauss-Newton block of `W_l` is `u_l u_l' x E[x x']` exactly."""
    return jnp.einsum("lm,lmn,bn->b", readers, params["w"], batch.inputs)


@pytest.fixture(scope="module")
def linear():
    """Objective, two stacked matrices 3 x 4 in one leaf, and examples in two buckets with padding."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        objective = Objective(
            jnp.asarray(U), None, bilinear_outputs, half_squared_error, 0.02, half_squared_error_root
        )
        stack = ArrayExamples(rng.normal(size=(9, 4)), rng.normal(size=9), num_buckets=2).stack(
            np.arange(9), rng.uniform(0.5, 1.5, 9) / 9, chunk_size=4
        )
        return objective, {"w": jnp.asarray(rng.normal(size=(2, 3, 4)))}, stack


@pytest.fixture(scope="module")
def decoder():
    """Objective, adapter, stack and Kronecker factors of a small language model."""
    with jax.enable_x64(True):
        objective, lora, stack = decoder_problem("float64", rank=2)
        key = jax.random.key(4)

        @jax.jit
        def make(objective, lora, stack):
            factors = example_factors(objective, lora, stack, key)
            return ekfac(objective, lora, stack, key, factors=factors, damping=RHO, num_roots=2)

        return objective, lora, stack, make(objective, lora, stack)


def make_linear(linear) -> EkFac:
    objective, params, stack = linear
    key = jax.random.key(0)
    return ekfac(objective, params, stack, key, factors=example_factors(objective, params, stack, key), damping=RHO)


def test_a_linear_layer_has_its_blocks_inverted_exactly(linear):
    objective, params, stack = linear
    x = np.concatenate([np.asarray(b.inputs).reshape(-1, 4) for b in stack.batches])
    w = np.asarray(stacked_weights(stack))
    second_moment = np.einsum("b,bi,bj->ij", w, x, x)
    found = make_linear(linear)
    mu = RHO + objective.l2 * w.sum()
    v = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4)))}
    for layer in range(2):
        block = np.kron(np.outer(U[layer], U[layer]), second_moment) + mu * np.eye(12)
        flat = np.asarray(v["w"][layer]).reshape(-1)
        np.testing.assert_allclose(found.mv(v)["w"][layer].reshape(-1), block @ flat, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.solve(v)["w"][layer].reshape(-1), np.linalg.solve(block, flat), rtol=1e-9)
    exact = np.asarray(
        materialise(Damped(DatasetCurvature(objective, params, stack, CURVATURES["gauss-newton"]), RHO), params)
    )
    np.testing.assert_allclose(materialise(found, params)[:12, :12], exact[:12, :12], rtol=1e-10, atol=1e-12)


def test_eigenvalues_are_the_dense_diagonal_in_the_eigenbasis(decoder):
    """For the very same random roots, on every matrix of a decoder's adapter."""
    objective, lora, stack, found = decoder
    rows = jax.jit(partial(example_rows, kind="roots", num_roots=2))(objective, lora, stack, jax.random.key(4)).rows
    weights = np.repeat(np.asarray(stacked_weights(stack)) / 2, 2)
    checked = 0
    for g, left, right, s in zip(
        *(jax.tree.leaves(tree) for tree in (rows, found.left, found.right, found.eigenvalues)), strict=True
    ):
        for layer in range(g.shape[1]):
            flat = np.asarray(g)[:, layer].reshape(len(weights), -1)
            block = flat.T @ (weights[:, None] * flat)
            basis = np.kron(np.asarray(left[layer]), np.asarray(right[layer]))
            np.testing.assert_allclose(basis.T @ basis, np.eye(len(block)), atol=1e-10)
            expected = np.diag(basis.T @ block @ basis)
            np.testing.assert_allclose(np.asarray(s[layer]).reshape(-1), expected, rtol=1e-8, atol=1e-14)
            checked += 1
    assert checked == 8  # A and B of two modules in two layers


def test_the_matrix_is_symmetric_positive_definite_and_its_solve_the_inverse(decoder):
    objective, lora, stack, found = decoder
    matrix = np.asarray(materialise(found, lora))
    mu = RHO + objective.l2 * float(stacked_weights(stack).sum())
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    expected = np.sort(np.concatenate([np.ravel(s) for s in jax.tree.leaves(found.eigenvalues)])) + mu
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), expected, rtol=1e-9)
    v = trees.tree_random_normal(jax.random.key(1), lora)
    flat = np.asarray(ravel_pytree(v)[0])
    np.testing.assert_allclose(ravel_pytree(found.solve(v))[0], np.linalg.solve(matrix, flat), rtol=1e-8)
    other = np.linalg.solve(matrix + (0.7 - mu) * np.eye(len(flat)), flat)
    np.testing.assert_allclose(ravel_pytree(found.with_mu(0.7).solve(v))[0], other, rtol=1e-8)


def test_conjugate_gradients_reach_the_same_solution_with_it(decoder):
    objective, lora, stack, found = decoder
    operator = Damped(DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]), RHO)
    b = trees.tree_random_normal(jax.random.key(1), lora)
    solve = jax.jit(ConjugateGradients(rtol=1e-9, max_steps=200).solve)
    plain, helped = solve(operator, b), solve(operator, b, found)
    assert int(plain.status) == int(helped.status) == Status.CONVERGED
    np.testing.assert_allclose(ravel_pytree(helped.value)[0], ravel_pytree(plain.value)[0], rtol=1e-6, atol=1e-8)


def test_taps_give_every_tokens_share_of_the_gradient(decoder):
    """Summed over tokens, `s (B' g) x'` and `s g (A x)'` are the derivatives with respect to A and B."""
    objective, lora, stack, _ = decoder
    batch = jax.tree.map(lambda x: x[0], stack.batches[0])
    weights, key = stack.weights[0][0], jax.random.key(9)
    modules = lora.params["layers"]

    @jax.jit
    def token_rows(lora):
        taps = {n: jnp.zeros((len(m["b"]), *batch.tokens.shape, m["b"].shape[1])) for n, m in modules.items()}
        taps = {"layers": taps}
        logits, pull_back, inputs = jax.vjp(
            lambda t: _outputs_and_inputs(objective.outputs_fn.apply, objective.frozen, lora, t, batch),
            taps,
            has_aux=True,
        )
        outputs, pull_back_params = jax.vjp(lambda p: objective.outputs(p, batch), lora)
        root = objective.output_root_fn(logits, batch, key)
        return logits, outputs, inputs, pull_back(root)[0], pull_back_params(root)[0]

    logits, outputs, inputs, slopes, gradient = token_rows(lora)
    np.testing.assert_allclose(logits, outputs, rtol=1e-12)
    row = int(np.argmin(np.asarray(batch.attention_mask).sum(-1)))
    assert not np.all(batch.attention_mask[row])  # padding, which is to be left out
    one = jax.tree.map(lambda x: x[:1, row : row + 1], (stack.batches[0], stack.weights[0]))
    found = jax.jit(token_factors)(
        objective, lora, dataclasses.replace(stack, batches=(one[0],), weights=(one[1],)), key
    )
    assert jax.tree.structure(found.left) == jax.tree.structure(lora)
    for name, leaves in modules.items():
        x, g = np.asarray(inputs["layers"][name]), lora.config.scaling * np.asarray(slopes["layers"][name])
        a, b = np.asarray(leaves["a"]), np.asarray(leaves["b"])
        expected = {
            "a": np.einsum("lmr,lbtm,lbtn->lrn", b, g, x),
            "b": np.einsum("lbtm,lbtn,lrn->lmr", g, x, a),
        }
        for leaf, value in expected.items():
            np.testing.assert_allclose(gradient.params["layers"][name][leaf], value, rtol=1e-9, atol=1e-12)
        # The input side of A's factors: one example's real tokens.
        real = np.asarray(batch.attention_mask[row]).astype(bool)
        x = x[:, row, real]
        weight = float(weights[row])
        inner = np.einsum("ltn,lrn->ltr", x, a)
        for rows, factor in (
            (x, found.right.params["layers"][name]["a"]),
            (inner, found.right.params["layers"][name]["b"]),
        ):
            np.testing.assert_allclose(
                factor, weight * np.einsum("ltm,ltn->lmn", rows, rows), rtol=1e-9, atol=1e-12
            )
        for factor in (found.left.params["layers"][name][leaf] for leaf in ("a", "b")):
            assert np.linalg.eigvalsh(np.asarray(factor)).min() > -1e-12 and np.trace(np.asarray(factor)[0]) > 0


def test_a_layer_s_own_scale_acts_on_token_factors_as_rows_of_a_times_it(decoder):
    """Where only `S A` is read, the network and B's factors are those of that A, and A's pseudo-gradient is S's."""
    objective, lora, stack, _ = decoder
    first = r".*layers\.0\..*"
    config = dataclasses.replace(lora.config, alpha_pattern={first: 3 * lora.config.alpha})
    scales = np.array([3.0, 1.0])[:, None, None]
    scaled = {name: {**leaves, "a": scales * leaves["a"]} for name, leaves in lora.params["layers"].items()}
    of = jax.jit(lambda adapter: token_factors(objective, adapter, stack, jax.random.key(9)))
    found, plain = (
        of(dataclasses.replace(lora, config=config)),
        of(dataclasses.replace(lora, params={"layers": scaled})),
    )
    for side, leaf, factor in (("left", "a", scales**2), ("left", "b", 1), ("right", "a", 1), ("right", "b", 1)):
        got, expected = getattr(found, side).params["layers"], getattr(plain, side).params["layers"]
        for name in scaled:
            np.testing.assert_allclose(got[name][leaf], factor * expected[name][leaf], rtol=1e-9, atol=1e-12)


def test_factors_of_tokens_and_of_examples_agree_on_the_eigenbasis_of_one_token(linear):
    """One token, one output: `G = u x'`, so both bases hold `u / |u|` and the eigenvectors of `E[x x']`."""
    found = make_linear(linear)
    for layer in range(2):
        top = np.asarray(found.left["w"][layer])[:, -1]
        np.testing.assert_allclose(abs(top @ U[layer]), np.linalg.norm(U[layer]), rtol=1e-10)


def test_factors_are_kept_and_stale_ones_refused(tmp_path, linear):
    _, params, stack = linear
    found = make_linear(linear)
    path = tmp_path / "factors"
    save_ekfac(path, found, params, stack)
    again = load_ekfac(path, params, stack, mu=found.mu)
    for got, expected in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(got, expected)
    moved = {"w": params["w"].at[0, 0, 0].add(1e-12)}
    other = dataclasses.replace(stack, weights=(stack.weights[0] * 2, *stack.weights[1:]))
    for stale in ((moved, stack), (params, other)):
        with pytest.raises(ValueError, match="another adapter or other examples"):
            load_ekfac(path, *stale, mu=0.1)
    with pytest.raises(ValueError, match="expected"):
        load_ekfac(path, {"w": jnp.zeros((2, 3, 5))}, stack, mu=0.1)
    assert not np.array_equal(fingerprint(params, stack), fingerprint(moved, stack))


def test_factors_are_read_to_where_the_adapter_is(linear, tmp_path):
    """On a mesh: the next solve multiplies them with what lies there."""
    _, params, stack = linear
    found, mesh = make_linear(linear), make_mesh(data=2)
    placed = replicate(params, mesh)
    save_ekfac(tmp_path / "factors", found, params, stack)
    again = load_ekfac(tmp_path / "factors", placed, stack, mu=found.mu)
    assert all(leaf.sharding == jax.tree.leaves(placed)[0].sharding for leaf in (again.left["w"], again.right["w"]))
    expected = jax.tree.leaves(found.solve(params))
    for got, alone in zip(jax.tree.leaves(jax.jit(again.solve)(placed)), expected, strict=True):
        np.testing.assert_allclose(got, alone, rtol=1e-12)


def test_what_has_no_factors_is_refused(linear, decoder):
    objective, params, stack = linear
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="output_root_fn"):
        example_factors(objective.replace(output_root_fn=None), params, stack, key)
    with pytest.raises(ValueError, match="num_roots"):
        example_factors(objective, params, stack, key, num_roots=0)
    vectors = dataclasses.replace(ridge_objective(0.1), output_root_fn=half_squared_error_root)
    with pytest.raises(ValueError, match="no matrices"):
        example_factors(vectors, split_params(np.ones(4)), stack, key)
    with pytest.raises(ValueError, match="decoder"):
        token_factors(objective, decoder[1], stack, key)
