"""Gradients, Hessian and Gauss-Newton products: JAX against the PyTorch baseline, on the same model and data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature
from llmeraser_jax.losses import example_losses, gradient_sum

pytestmark = pytest.mark.torch

TOLERANCE = 1e-5
CASES = {"llama_gqa_tied_llama3_rope": "example", "qwen2_gqa_tied": "token"}
ADAPTER = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}


@pytest.fixture(scope="module", params=CASES)
def problem(request, tmp_path_factory):
    """In float32; test_baseline_solves.py has float64."""
    import torch

    from tests.torch_parity import baseline_problem

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield baseline_problem.load_problem(
        tmp_path_factory.mktemp("problem"), request.param, ADAPTER, wide=False, reduction=CASES[request.param]
    )
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uneven(problem):
    """Coefficients of both signs for all examples, laid out for PyTorch and for JAX."""
    indices = np.arange(len(problem.dataset))
    weights = np.random.default_rng(2).uniform(-0.3, 1.0, len(indices))
    stack = problem.dataset.stack(indices, weights, chunk_size=4)
    return problem.eraser().batches(indices, weights), stack


@partial(jax.jit, static_argnums=0)
def product(kind, objective, lora, stack, v):
    return DatasetCurvature(objective, lora, stack, CURVATURES[kind]).mv(v)


def test_the_data_has_padding_and_several_shapes(uneven):
    batches, _ = uneven
    assert any((batch.attention_mask == 0).any() for batch in batches) and len(batches) > 1
    assert any((batch.target_weights == 0).any() for batch in batches)


@pytest.mark.parametrize("request_name", ["removal", "query modification", "response correction", "all three"])
def test_right_hand_sides_agree_for_every_category(problem, request_name):
    from tests.torch_parity.baseline_problem import L2, NUM_TRAINED, relative_difference

    theirs = problem.as_lora(problem.eraser(request_name).rhs(problem.params))
    weighted = problem.edits(request_name)[1].influence_rhs()
    stack = problem.dataset.stack(weighted.indices, weighted.weights, chunk_size=4)
    ours = gradient_sum(problem.objective(), problem.lora, stack)
    assert relative_difference(theirs, ours) < TOLERANCE
    # The L2 term: a removal's share of it stays, an edit's cancels.
    plain = problem.eraser(request_name)
    plain.l2 = 0.0
    share = trees.tree_sub(theirs, problem.as_lora(plain.rhs(problem.params)))
    stays = {"removal": L2 / NUM_TRAINED, "all three": L2 / NUM_TRAINED}.get(request_name, 0.0)
    excess = trees.tree_norm(trees.tree_axpy(-stays, problem.lora, share))
    assert float(excess) < TOLERANCE * float(trees.tree_norm(ours))
    assert L2 / NUM_TRAINED * float(trees.tree_norm(problem.lora)) > 10 * TOLERANCE * float(trees.tree_norm(ours))


def test_hessian_products_agree(problem, uneven):
    from experiments.torch_baseline.curvature import hessian_product
    from tests.torch_parity.baseline_problem import L2, random_direction, relative_difference

    v = random_direction(problem.params)
    theirs = hessian_product(problem.theirs, problem.params, uneven[0], v, l2=L2)
    ours = product("hessian", problem.objective(), problem.lora, uneven[1], problem.as_lora(v))
    assert relative_difference(problem.as_lora(theirs), ours) < TOLERANCE


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_kept_graphs_give_the_same_products_again_and_again(problem, uneven, kind):
    from experiments.torch_baseline.curvature import KEPT, PRODUCTS
    from experiments.torch_baseline.model import axpy, norm
    from tests.torch_parity.baseline_problem import L2, random_direction

    kept = KEPT[kind](problem.theirs, problem.params, uneven[0], l2=L2)
    v = random_direction(problem.params)
    for direction in (v, {name: 2 * tensor + 1 for name, tensor in v.items()}):
        expected = PRODUCTS[kind](problem.theirs, problem.params, uneven[0], direction, l2=L2)
        found = kept(direction)
        assert found.keys() == expected.keys()
        assert norm(axpy(-1.0, expected, found)) < TOLERANCE * norm(expected)
        if kind == "hessian":  # the same graph: the same number, for each
            for name, tensor in found.items():
                np.testing.assert_allclose(tensor.numpy(), expected[name].numpy(), rtol=1e-5, atol=1e-7)


def test_gauss_newton_products_agree(problem, uneven):
    from experiments.torch_baseline.curvature import gauss_newton_product
    from tests.torch_parity.baseline_problem import L2, random_direction, relative_difference

    v = random_direction(problem.params)
    theirs = gauss_newton_product(problem.theirs, problem.params, uneven[0], v, l2=L2)
    ours = product("gauss-newton", problem.objective(), problem.lora, uneven[1], problem.as_lora(v))
    assert relative_difference(problem.as_lora(theirs), ours) < TOLERANCE
    hessian = product("hessian", problem.objective(), problem.lora, uneven[1], problem.as_lora(v))
    assert relative_difference(ours, hessian) > 1e-2, "the two matrices must differ for the test to tell them apart"


def test_losses_agree(problem):
    import torch

    from experiments.torch_baseline.curvature import data_losses
    from tests.torch_parity.baseline_problem import relative_difference

    indices = np.arange(len(problem.dataset))
    ours = example_losses(
        problem.objective(), problem.lora, problem.dataset.stack(indices, np.ones(len(indices)), chunk_size=4)
    )
    order = np.argsort([problem.dataset.bucket_of(int(i)) for i in indices], kind="stable")
    with torch.no_grad():
        theirs = [
            data_losses(
                problem.theirs, problem.params, problem.eraser().batches(indices[i : i + 1], 1.0)[0]
            ).numpy()
            for i in order
        ]
    assert relative_difference(jnp.concatenate([jnp.asarray(t) for t in theirs]), ours) < TOLERANCE
