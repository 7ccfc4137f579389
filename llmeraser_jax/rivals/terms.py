"""Owns what descent-type rivals minimise: losses of one example, and their weighted sums with gradients.

A loss sees the logits of the adapter being moved and those of frozen ones (its teachers) at the response positions.
All are frozen dataclasses, so that they are static arguments of the one compiled function here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmeraser_jax import trees
from llmeraser_jax.losses import response_cross_entropy, sum_over_examples
from llmeraser_jax.types import BaseParams, ExampleStack, LoraParams, TokenBatch

Logits = Float[Array, "batch response vocab"]


@runtime_checkable
class ExampleLoss(Protocol):
    """Loss of each example; hashable."""

    num_teachers: ClassVar[int]

    def __call__(self, logits: Array, teachers: tuple[Array, ...], batch: TokenBatch) -> Array:
        """[batch], from logits [batch, response, vocab] of the adapter and of `num_teachers` teachers."""
        ...


def response_log_probs(logits: Logits, batch: TokenBatch) -> Float[Array, " batch"]:
    """`log p(y | x)`: summed over all tokens under the loss, however they are weighted in it."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(batch.target_weights > 0, picked, 0), axis=-1)


def kl_to_teacher(teacher_logits: Logits, logits: Logits, batch: TokenBatch) -> Float[Array, " batch"]:
    """`KL(teacher || model)` of next tokens, averaged over the response as the loss is."""
    teacher, model = jax.nn.log_softmax(teacher_logits, axis=-1), jax.nn.log_softmax(logits, axis=-1)
    per_token = jnp.sum(jnp.exp(teacher) * (teacher - model), axis=-1)
    return jnp.sum(per_token * batch.target_weights, axis=-1)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """`sign * l(z)`: descent on the response, or ascent with `sign = -1`."""

    num_teachers: ClassVar[int] = 0
    sign: float = 1.0

    def __call__(self, logits: Array, teachers: tuple[Array, ...], batch: TokenBatch) -> Array:
        """The response's cross entropy, averaged as the recipe states."""
        return self.sign * response_cross_entropy(logits, batch)


@dataclasses.dataclass(frozen=True)
class KLToReference:
    """`KL(reference || theta) + cross_entropy * l(z)`, of one teacher."""

    num_teachers: ClassVar[int] = 1
    cross_entropy: float = 0.0

    def __call__(self, logits: Array, teachers: tuple[Array, ...], batch: TokenBatch) -> Array:
        """Mean over response tokens."""
        divergence = kl_to_teacher(teachers[0], logits, batch)
        if self.cross_entropy:
            divergence = divergence + self.cross_entropy * response_cross_entropy(logits, batch)
        return divergence


@dataclasses.dataclass(frozen=True)
class NegativePreference:
    """`(2 / beta) log(1 + (p_theta(y|x) / p_reference(y|x))^beta)`, of one teacher."""

    num_teachers: ClassVar[int] = 1
    beta: float

    def __call__(self, logits: Array, teachers: tuple[Array, ...], batch: TokenBatch) -> Array:
        """From the log-probability of the whole response."""
        log_ratio = response_log_probs(logits, batch) - response_log_probs(teachers[0], batch)
        return 2 / self.beta * jax.nn.softplus(self.beta * log_ratio)


@dataclasses.dataclass(frozen=True)
class SimpleNegativePreference:
    """`-(2 / beta) log sigmoid(-(beta / |y|) log p_theta(y|x) - gamma)`."""

    num_teachers: ClassVar[int] = 0
    beta: float
    gamma: float

    def __call__(self, logits: Array, teachers: tuple[Array, ...], batch: TokenBatch) -> Array:
        """From the mean log-probability of the response's tokens."""
        count = jnp.maximum(jnp.sum(batch.target_weights > 0, axis=-1), 1)
        mean = response_log_probs(logits, batch) / count
        return 2 / self.beta * jax.nn.softplus(self.beta * mean + self.gamma)


@dataclasses.dataclass(frozen=True)
class ForgettingTeacher:
    """`KL(softmax(z - alpha relu(z_augmented - z)) || theta)`, z the logits of the first of two teachers."""

    num_teachers: ClassVar[int] = 2
    alpha: float

    def __call__(self, logits: Array, teachers: tuple[Array, ...], batch: TokenBatch) -> Array:
        """Mean over response tokens."""
        original, augmented = teachers
        return kl_to_teacher(original - self.alpha * jax.nn.relu(augmented - original), logits, batch)


@partial(jax.jit, static_argnames=("apply", "terms"))
def terms_gradient(
    apply: Callable[..., Array],
    base: BaseParams,
    params: LoraParams,
    teachers: tuple[LoraParams, ...],
    stacks: tuple[ExampleStack, ...],
    *,
    terms: tuple[ExampleLoss, ...],
) -> tuple[Float[Array, " terms"], LoraParams]:
    """`sum over terms t, examples i of weights_ti * loss_t(z_ti)`: the sum of each term, and the gradient of all.

    Args:
        apply: `(base, params, *batch.inputs) -> logits`; hashable.
        base: frozen parameters.
        params: the adapter.
        teachers: frozen adapters; a loss takes the first `num_teachers` of them.
        stacks: the examples of each term with their coefficients.
        terms: the losses.
    """
    gradient = trees.tree_zeros_like(params)
    values = []
    for term, stack in zip(terms, stacks, strict=True):

        def chunk(base, params, teachers, batch, weights, term=term):
            def logits_of(adapter):
                return apply(base, adapter, *batch.inputs)

            frozen = tuple(logits_of(teacher) for teacher in teachers)
            return jax.value_and_grad(lambda p: jnp.sum(weights * term(logits_of(p), frozen, batch)))(params)

        zero = jnp.zeros((), jnp.result_type(stack.weights[0], *jax.tree.leaves(params)))
        _, (value, term_gradient) = sum_over_examples(
            chunk,
            stack,
            base,
            params,
            teachers[: term.num_teachers],
            zero=(zero, trees.tree_zeros_like(params)),
        )
        values.append(value)
        gradient = trees.tree_add(gradient, term_gradient)
    return jnp.stack(values), gradient
