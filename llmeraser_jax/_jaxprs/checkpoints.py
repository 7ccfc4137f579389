"""Sets what a function's checkpoints save, from outside of the function.

A model that rematerialises its layers saves only their inputs, so every product of its linearisation would repeat
the forward pass. Saving the results of matrix multiplications avoids that. Saving everything is not faster:
elementwise values and attention's products are two fifths and more of all values, and reading them takes about as
long as computing them (measured in `experiments/benchmarks`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.extend.core.primitives import remat_p

from llmeraser_jax._jaxprs.bfloat16 import bfloat16_matmul_p
from llmeraser_jax._jaxprs.rewriting import rewrite_equations

Policy = Callable[..., bool]  # as `jax.checkpoint` takes it


def _bfloat16_matmuls(primitive, *_, **__) -> bool:
    return primitive is bfloat16_matmul_p


_either = jax.checkpoint_policies.save_from_both_policies
MATMULS: Policy = _either(jax.checkpoint_policies.dots_saveable, _bfloat16_matmuls)
MATMULS_WITH_MATRICES: Policy = _either(  # attention's are recomputed
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _bfloat16_matmuls
)


def set_checkpoints(fn: Callable, policy: Policy) -> Callable:
    """`fn` with the policy of every `jax.checkpoint` inside it replaced. The values of `fn` do not change.

    Args:
        fn: a pure function of pytrees of arrays, before any derivative is taken.
        policy: selects what is saved; derivatives recompute the rest.
    """

    def with_policy(equation):
        if equation.primitive is not remat_p:
            return [equation]
        return [equation.replace(params={**equation.params, "policy": policy})]

    return rewrite_equations(fn, with_policy)
