"""The decoder problem that the curvature tests share: two length buckets, so that nothing rests on one scan."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmeraser_jax import trees
from llmeraser_jax.types import ExampleStack
from tests.small_lm import random_stack, small_config, small_lora, small_objective

L2 = 1e-2


def decoder_problem(dtype: str, *, rank: int = 1, targets=("q_proj", "down_proj"), l2: float = L2):
    """Objective, adapter and a stack of 2 + 1 micro-batches of three examples."""
    config = small_config()
    lora = small_lora(config, dtype, rank=rank, targets=targets)
    long, short = random_stack(2, 3, dtype), random_stack(1, 3, dtype, time=9, response=2)
    stack = ExampleStack(long.batches + short.batches, long.weights + short.weights)
    return small_objective(config, dtype, l2), lora, stack


def relative_difference(a, b) -> float:
    """`||a - b|| / ||b||`."""
    return float(trees.tree_norm(trees.tree_sub(a, b)) / trees.tree_norm(b))


def random_vectors(lora, count: int):
    """Vectors of adapter space on a leading axis."""
    vectors = [trees.tree_random_normal(jax.random.key(20 + k), lora) for k in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors)


class Compiled(NamedTuple):
    """One executable for every operator of one tree structure; compilation is all that takes time here."""

    structure: Any
    executable: Any

    def __call__(self, operator, v):
        leaves, structure = jax.tree.flatten(operator)
        assert structure == self.structure, "another program than the one compiled"
        return self.executable(leaves, v)

    @property
    def flops(self) -> float:
        """As XLA counts them, a loop's body once."""
        return self.executable.cost_analysis()["flops"]


def compile_product(operator, v, multiply=lambda op, v: op.mv(v)) -> Compiled:
    """`multiply` compiled for the structure and shapes of its arguments."""
    leaves, structure = jax.tree.flatten(operator)

    # Leaves, because the run-time shape checks refuse the placeholders that `lower` puts into a batch.
    def run(leaves, v):
        return multiply(jax.tree.unflatten(structure, leaves), v)

    return Compiled(structure, jax.jit(run).lower(leaves, v).compile())
