"""The compatibility solver against PyTorch's Adam on the script's loss, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.solvers import ReferenceCompat
from tests.solvers.systems import DenseSum, as_tree, as_vector, noisy_terms, rhs, symmetric

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("constants", [{}, {"learning_rate": 0.05, "weight_decay": 0.3, "start": 0.1}])
def test_every_step_is_that_of_torch_adam(constants):
    import torch

    matrices, b = noisy_terms(symmetric(np.linspace(0.5, 4, 12)), 7, 0.3), rhs()
    with jax.enable_x64(True):
        operator = DenseSum(jnp.asarray(matrices))
        solver = ReferenceCompat(**constants)
        ours = [
            as_vector(ReferenceCompat(**constants, num_steps=n).solve(operator, as_tree(b)).value)
            for n in (1, 2, 3, 10, solver.num_steps)
        ]

    d = torch.full((12,), solver.start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([d], lr=solver.learning_rate, weight_decay=solver.weight_decay)
    theirs = {}
    for step in range(1, solver.num_steps + 1):
        product = torch.tensor(matrices[(step - 1) % 7]) @ d
        loss = d @ product.detach() / 2 - torch.tensor(b) @ d
        adam.zero_grad()
        loss.backward()
        adam.step()
        theirs[step] = d.detach().numpy().copy()
    for step, value in zip((1, 2, 3, 10, solver.num_steps), ours, strict=True):
        np.testing.assert_allclose(value, theirs[step], rtol=1e-10, atol=1e-16)
