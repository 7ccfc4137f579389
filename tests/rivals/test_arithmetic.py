"""Checkpoint arithmetic against the same sums made by hand from fine-tuned adapters."""

import dataclasses

import jax
import numpy as np
import pytest

from llmeraser_jax.rivals import MSA, TaskVector
from llmeraser_jax.training import finetune
from llmeraser_jax.unlearning import Workspace
from llmeraser_jax.unlearning.task import take

NAMED, WANTED = np.array([1, 4, 6]), np.array([10, 11])


@pytest.mark.parametrize(("method", "origin"), [(TaskVector, "adapter"), (MSA, "initial")])
def test_the_vectors_of_the_forget_set_and_of_its_replacements_are_subtracted_and_added(task, method, origin):
    assert task.initial is not None
    result = method(scale=0.5, epochs=2).run(task, Workspace())
    start, training = getattr(task, origin), dataclasses.replace(task.training, epochs=2)
    gone, learnt = (
        finetune(task.model, take(task.problem.examples, rows), training, lora=start).lora
        for rows in (NAMED, WANTED)
    )
    for got, trained, zero, minus, plus in zip(
        *map(jax.tree.leaves, (result.params, task.adapter, start, gone, learnt)), strict=True
    ):
        expected = trained - 0.5 * (minus - zero) + 0.5 * (plus - zero)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert not np.allclose(got, trained)
    assert result.cost.training == 2 * (3 + 2)
    assert len(result.details["vector_norms"]) == 2


def test_without_the_adapter_that_training_started_from_msa_is_refused(task):
    with pytest.raises(ValueError, match="the task has none"):
        MSA().run(dataclasses.replace(task, initial=None), Workspace())
