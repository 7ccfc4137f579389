"""Products of a model that sees pictures: the adapter covers text model and projector, the tower is absent."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, linearise
from llmeraser_jax.curvature.taps import token_factors
from llmeraser_jax.losses import gradient_sum, lm_objective
from llmeraser_jax.models import ApplyDecoder, greedy_decode, init_base, init_vision
from llmeraser_jax.models.vision import VisionConfig, vision_features
from llmeraser_jax.types import ExampleStack
from tests.dense import materialise
from tests.small_lm import VOCAB, random_stack, small_config, small_lora

VISION = VisionConfig(
    image_token=VOCAB, image_size=8, patch_size=4, width=6, mlp_width=8, num_layers=2, num_heads=2
)
CONFIG = dataclasses.replace(small_config(vocab_size=VOCAB + 1), vision=VISION)
L2 = 1e-2


def with_pictures(stack, dtype):
    """The stack with one picture in the first row of each micro-batch, two in the second, and none in the third."""
    vision = init_vision(VISION, jax.random.key(3), dtype)
    (batch,) = stack.batches
    count = VISION.num_features
    tokens = np.array(batch.tokens)
    assert int(batch.attention_mask.sum(-1).min()) >= 6
    tokens[:, 0, 1 : 1 + count] = VISION.image_token
    tokens[:, 1, :count] = VISION.image_token
    tokens[:, 1, count : count + count] = VISION.image_token
    mask = np.array(batch.attention_mask)
    mask[:, 1] = 1
    chunks = len(tokens)
    pixels = jax.random.normal(jax.random.key(4), (chunks * 3, 3, 8, 8), dtype)
    features = vision_features(VISION, vision, pixels).reshape(chunks, 3, count, -1)
    images = jnp.zeros((chunks, 3, 2, count, VISION.feature_width), dtype)
    images = images.at[:, 0, 0].set(features[:, 0]).at[:, 1].set(features[:, 1:])
    batch = dataclasses.replace(batch, tokens=jnp.asarray(tokens), attention_mask=jnp.asarray(mask), images=images)
    return ExampleStack((batch,), stack.weights, stack.places)


@pytest.fixture(scope="module")
def problem():
    """A float64 problem small enough for dense matrices."""
    with jax.enable_x64(True):
        base = jax.tree.map(lambda x: 2.0 * x, init_base(CONFIG, jax.random.key(0), "float64"))
        objective = lm_objective(ApplyDecoder(CONFIG), base, l2=L2)
        lora = small_lora(CONFIG, "float64", rank=1, targets=("q_proj", "down_proj", "linear_1", "linear_2"))
        yield objective, lora, with_pictures(random_stack(2, 3, "float64"), "float64")


def total_objective(objective, stack, params):
    """`sum_i w_i l_i` with the L2 term, written without the package's own sums."""
    total, squares = 0.0, sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
    (batches,), (weights,) = stack.batches, stack.weights
    for chunk in range(len(weights)):
        batch = jax.tree.map(lambda x, chunk=chunk: x[chunk], batches)
        logits = objective.outputs(params, batch)
        nll = -jax.nn.log_softmax(logits) * jax.nn.one_hot(batch.targets, logits.shape[-1])
        losses = (nll.sum(-1) * batch.target_weights).sum(-1)
        total = total + jnp.sum(weights[chunk] * (losses + 0.5 * L2 * squares))
    return total


def test_hessian_product_equals_dense_jax_hessian(problem):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        flat, unravel = ravel_pytree(lora)
        dense = jax.jit(jax.hessian(lambda x: total_objective(objective, stack, unravel(x))))(flat)
        got = jax.jit(materialise)(DatasetCurvature(objective, lora, stack, CURVATURES["hessian"]), lora)
        np.testing.assert_allclose(got, dense, rtol=1e-5, atol=1e-10)
        of_projector = ravel_pytree(
            jax.tree_util.tree_map_with_path(
                lambda path, x: jnp.full(x.shape, "projector" in str(path)), lora.params
            )
        )[0]
        coupling = np.asarray(dense)[of_projector][:, ~of_projector]
        assert np.abs(coupling).max() > 1e-3, "projector and text model should couple"
        kept = linearise(DatasetCurvature(objective, lora, stack, CURVATURES["hessian"]))
        v = trees.tree_random_normal(jax.random.key(8), lora)
        product = ravel_pytree(jax.jit(lambda operator, v: operator.mv(v))(kept, v))[0]
        np.testing.assert_allclose(product, dense @ ravel_pytree(v)[0], rtol=1e-7, atol=1e-9)


def test_gauss_newton_product_is_that_of_the_jacobian(problem):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        flat, unravel = ravel_pytree(lora)
        (batches,), (weights,) = stack.batches, stack.weights
        expected = L2 * float(weights.sum()) * np.eye(len(flat))
        outputs = jax.jit(jax.jacfwd(lambda x, batch: objective.outputs(unravel(x), batch)))
        for chunk in range(len(weights)):
            batch = jax.tree.map(lambda x, chunk=chunk: x[chunk], batches)
            jacobian = np.asarray(outputs(flat, batch))
            p = np.asarray(jax.nn.softmax(objective.outputs(lora, batch)))
            hessian = np.einsum("brv,vw->brvw", p, np.eye(p.shape[-1])) - np.einsum("brv,brw->brvw", p, p)
            scale = np.asarray(weights[chunk][:, None] * batch.target_weights)
            expected += np.einsum("brvp,brvw,br,brwq->pq", jacobian, hessian, scale, jacobian, optimize=True)
        got = jax.jit(materialise)(DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]), lora)
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-10)


def test_the_vision_tower_is_in_no_program(problem):
    """No program takes its parameters, or has its convolution; that of the features has one."""
    with jax.enable_x64(True):
        objective, lora, stack = problem
        batch = jax.tree.map(lambda x: x[0], stack.batches[0])
        stops = np.array([2], np.int32)
        operators = [DatasetCurvature(objective, lora, stack, CURVATURES[name]) for name in CURVATURES]
        programs = {
            "gradient": jax.make_jaxpr(gradient_sum)(objective, lora, stack),
            **{
                name: jax.make_jaxpr(lambda v, operator=operator: operator.mv(v))(lora)
                for name, operator in zip(CURVATURES, operators, strict=True)
            },
            "generation": jax.make_jaxpr(
                lambda base, lora, images: greedy_decode(
                    CONFIG, base, lora, batch.tokens, batch.attention_mask, stops, 2, images
                )
            )(objective.frozen, lora, batch.images),
        }
        for name, program in programs.items():
            assert "conv_general_dilated" not in str(program), name
        vision = init_vision(VISION, jax.random.key(3), "float64")
        tower = jax.make_jaxpr(partial(vision_features, VISION))(vision, jnp.zeros((1, 3, 8, 8)))
        assert "conv_general_dilated" in str(tower)
        assert set(objective.frozen) == {"embed_tokens", "layers", "final_norm", "lm_head", "projector"}


def test_token_factors_of_the_projector_are_sums_over_the_vectors_of_pictures(problem):
    """With one row that has all its places filled, A's input side is its features' second moment."""
    with jax.enable_x64(True):
        objective, lora, stack = problem
        (batch,), (weights,) = stack.batches, stack.weights
        factors = {}
        for row in range(3):
            one = jax.tree.map(lambda x, row=row: x[:1, row : row + 1], (batch, weights))
            found = jax.jit(token_factors)(objective, lora, ExampleStack((one[0],), (one[1],)), jax.random.key(9))
            factors[row] = found.right.params["projector"]["linear_1"]["a"][0] / weights[0, row]
            assert jax.tree.structure(found.left) == jax.tree.structure(lora)
        features = np.asarray(batch.images[0])
        np.testing.assert_allclose(factors[0], features[0, 0].T @ features[0, 0], rtol=1e-9)
        flat = features[1].reshape(-1, features.shape[-1])
        np.testing.assert_allclose(factors[1], flat.T @ flat, rtol=1e-9)
        np.testing.assert_array_equal(factors[2], 0)
        text = dataclasses.replace(one[0], images=None)  # the last row, as a batch of texts has it
        alone = jax.jit(token_factors)(objective, lora, ExampleStack((text,), (one[1],)), jax.random.key(9))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), alone, found)
