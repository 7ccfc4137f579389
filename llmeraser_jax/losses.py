"""The objective `l(z; theta)` and its sums over data.

`l` is split into network outputs and a convex loss of them, because the Gauss-Newton matrix needs the split;
the L2 term `(l2 / 2) ||theta - prior||^2` belongs to each example, so that a removal drops its share and an
edit's share cancels. Losses that are reported leave the L2 term out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.parallel import map_over_devices, sum_over_devices, to_host
from llmeraser_jax.types import Batch, ExampleStack, Key, LoraParams, Outputs, PyTree, TokenBatch


@flax.struct.dataclass
class Objective:
    """Per-example loss as data: the frozen arrays are leaves, so a jitted function takes them as arguments.

    Attributes:
        frozen: whatever `outputs_fn` needs besides the adapter; for a language model its base parameters.
        prior: the adapter that the L2 term pulls towards, or None for zero.
        outputs_fn: `(frozen, params, batch) -> outputs`, leaves beginning with the axis "batch". Hashable.
        output_loss_fn: `(outputs, batch) -> [batch]`, convex in `outputs`. Hashable.
        l2: lambda of the method, at least 0.
        output_root_fn: `(outputs, batch, key) -> c` with `E[c c'] = H_out` of each example, the Hessian of
            `output_loss_fn` with respect to its outputs; None where no sketch of the curvature is offered.
        log_odds_fn: `(outputs, batch) -> [batch]`, `log(exp(l) - 1)` of each example's data loss `l`, computed so
            that it is exact where `l` is below rounding; None where the loss is no negative log-likelihood, or
            where its rounded value has to do.
        token_losses_fn: `(outputs, batch) -> [batch, tokens]`, the loss of each token before it is averaged; None
            where examples have no tokens.
    """

    frozen: PyTree
    prior: LoraParams | None
    outputs_fn: Callable[[PyTree, LoraParams, Batch], Outputs] = flax.struct.field(pytree_node=False)
    output_loss_fn: Callable[[Outputs, Batch], Float[Array, " batch"]] = flax.struct.field(pytree_node=False)
    l2: float = flax.struct.field(pytree_node=False, default=0.0)
    output_root_fn: Callable[[Outputs, Batch, Key], Outputs] | None = flax.struct.field(
        pytree_node=False, default=None
    )
    log_odds_fn: Callable[[Outputs, Batch], Float[Array, " batch"]] | None = flax.struct.field(
        pytree_node=False, default=None
    )
    token_losses_fn: Callable[[Outputs, Batch], Float[Array, "batch tokens"]] | None = flax.struct.field(
        pytree_node=False, default=None
    )

    def outputs(self, params: LoraParams, batch: Batch) -> Outputs:
        """Network outputs, e.g. logits at the response positions."""
        return self.outputs_fn(self.frozen, params, batch)

    def data_losses(self, params: LoraParams, batch: Batch) -> Float[Array, " batch"]:
        """Each example's loss without the L2 term: what is reported."""
        return self.output_loss_fn(self.outputs(params, batch), batch)

    def output_log_odds(self, outputs: Outputs, batch: Batch) -> Float[Array, " batch"]:
        """`log(exp(l) - 1)` of each example's data loss `l`, in nats: the log-odds against it."""
        if self.log_odds_fn is not None:
            return self.log_odds_fn(outputs, batch)
        return loss_log_odds(self.output_loss_fn(outputs, batch))

    def from_prior(self, params: LoraParams) -> LoraParams:
        """`theta - prior`, the gradient of the L2 term at `l2 = 1`."""
        return params if self.prior is None else trees.tree_sub(params, self.prior)

    def l2_loss(self, params: LoraParams) -> Float[Array, ""]:
        """`(l2 / 2) ||theta - prior||^2`: one example's share."""
        offset = self.from_prior(params)
        return 0.5 * self.l2 * trees.tree_vdot(offset, offset)


def response_cross_entropy(
    logits: Float[Array, "batch response vocab"], batch: TokenBatch
) -> Float[Array, " batch"]:
    """Cross entropy of each example's response, averaged as `batch.target_weights` states."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * batch.target_weights.astype(logits.dtype), axis=-1)


def loss_log_odds(losses: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """`log(exp(l) - 1)` of losses that were rounded already: none below the rounding of a probability near 1."""
    floor = float(jnp.finfo(losses.dtype).eps)
    return jnp.log(jnp.expm1(jnp.maximum(losses, floor)))


def odds_against(logits: Float[Array, "*lead vocab"], targets: Int[Array, "*lead"]) -> Float[Array, "*lead"]:
    """The log-odds against each target: `logsumexp over v != y of (z_v - z_y)`, exact however well it is known."""
    at_target = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    others = jnp.where(at_target, -jnp.inf, logits)
    return jax.nn.logsumexp(others, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def log_softplus(x: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
    """`log(log(1 + exp(x)))`, exact where `exp(x)` is below rounding: `x - exp(x) / 2` there."""
    small = x < -10
    return jnp.where(
        small, x - 0.5 * jnp.exp(jnp.where(small, x, -10.0)), jnp.log(jax.nn.softplus(jnp.where(small, 0.0, x)))
    )


def cross_entropy_log_odds(
    logits: Float[Array, "batch response vocab"],
    targets: Int[Array, "batch response"],
    weights: Float[Array, "batch response"],
) -> Float[Array, " batch"]:
    """`log(exp(l) - 1)` of `l = sum_t w_t l_t`, the weighted mean of cross entropies, through log-odds of tokens.

    A loss of 1e-14 nats is rounding noise in `log_softmax`; the log-odds it comes from, -32, are not.
    """
    log_weights = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1)), -jnp.inf)
    log_loss = jax.nn.logsumexp(log_weights + log_softplus(odds_against(logits, targets)), axis=-1)
    # log(exp(l) - 1) = log l + log((exp(l) - 1) / l), whose second term vanishes with l.
    small = log_loss < -10
    loss = jnp.exp(jnp.where(small, -1.0, log_loss))
    exact = loss + jnp.log(-jnp.expm1(-loss))
    return jnp.where(small, log_loss + 0.5 * jnp.exp(jnp.where(small, log_loss, -10.0)), exact)


def response_log_odds(logits: Float[Array, "batch response vocab"], batch: TokenBatch) -> Float[Array, " batch"]:
    """The log-odds against each example's response: `log(exp(l) - 1)` of `response_cross_entropy`."""
    return cross_entropy_log_odds(logits, batch.targets, batch.target_weights.astype(logits.dtype))


def response_token_losses(
    logits: Float[Array, "batch response vocab"], batch: TokenBatch
) -> Float[Array, "batch response"]:
    """Cross entropy of each response token; nan where there is none."""
    losses = jax.nn.softplus(odds_against(logits, batch.targets))
    return jnp.where(batch.target_weights > 0, losses, jnp.nan)


def response_cross_entropy_root(
    logits: Float[Array, "batch response vocab"], batch: TokenBatch, key: Key
) -> Float[Array, "batch response vocab"]:
    """A random square root of cross entropy's Hessian: `sqrt(w) (sqrt(p) e - p <sqrt(p), e>)`, `e` signs.

    `diag(p) - p p'` is `B B'` with `B = diag(sqrt p) - p sqrt(p)'`, and independent signs (Rademacher) make
    `E[(B e)(B e)'] = B B'` without the variance that normal numbers would have on a matrix of rank one.
    """
    root = jnp.exp(0.5 * jax.nn.log_softmax(logits, axis=-1))
    noisy = root * jax.random.rademacher(key, logits.shape, logits.dtype)
    draw = noisy - root**2 * jnp.sum(noisy, axis=-1, keepdims=True)
    return draw * jnp.sqrt(batch.target_weights.astype(logits.dtype))[..., None]


def half_squared_error(outputs: Float[Array, " batch"], batch: Batch) -> Float[Array, " batch"]:
    """`(output - y)^2 / 2` on batches with a field `targets`: the loss of ridge regression."""
    return 0.5 * (outputs - batch.targets) ** 2


def half_squared_error_root(outputs: Float[Array, " batch"], batch: Batch, key: Key) -> Float[Array, " batch"]:
    """The root of squared error's Hessian, which is 1 and needs no randomness."""
    return jnp.ones_like(outputs)


@dataclasses.dataclass(frozen=True)
class LogitsAtResponse:
    """`outputs_fn` of a language model: logits at the response positions.

    Attributes:
        apply: `(base, lora, *batch.inputs) -> logits`; hashable.
    """

    apply: Callable[..., Array]

    def __call__(self, base: PyTree, lora: LoraParams, batch: TokenBatch) -> Array:
        return self.apply(base, lora, *batch.inputs)


def lm_objective(
    apply: Callable[..., Array], base: PyTree, *, l2: float, prior: LoraParams | None = None
) -> Objective:
    """The objective of response-masked language modelling.

    Args:
        apply: `(base, lora, *batch.inputs) -> logits [batch, response, vocab]`; hashable.
        base: frozen parameters.
        l2: lambda, at least 0.
        prior: adapter the L2 term pulls towards; None is zero.
    """
    if not l2 >= 0:
        msg = f"l2 is {l2}; it must be at least 0."
        raise ValueError(msg)
    return Objective(
        frozen=base,
        prior=prior,
        outputs_fn=LogitsAtResponse(apply),
        output_loss_fn=response_cross_entropy,
        l2=float(l2),
        output_root_fn=response_cross_entropy_root,
        log_odds_fn=response_log_odds,
        token_losses_fn=response_token_losses,
    )


def scan_weighted_sum(
    fn: Callable[[Batch, Float[Array, " batch"]], PyTree], stack: ExampleStack, zero: PyTree
) -> PyTree:
    """`sum over micro-batches of fn(batch, weights)`, one at a time, so that memory is one micro-batch's.

    It does not look at the stack's mesh; `sum_over_examples` does.

    Args:
        fn: returns a pytree of the structure, shapes and dtypes of `zero`.
        stack: the data.
        zero: the sum over nothing.
    """
    total = zero
    for batches, weights in zip(stack.batches, stack.weights, strict=True):

        def body(carry, chunk):
            return trees.tree_add(carry, fn(*chunk)), None

        total, _ = jax.lax.scan(body, total, (batches, weights))
    return total


def weight_sum(stack: ExampleStack) -> Float[Array, ""]:
    """Sum of all coefficients."""
    return sum((jnp.sum(w) for w in stack.weights), start=jnp.zeros((), stack.weights[0].dtype))


def sum_over_examples(
    fn: Callable[..., PyTree], stack: ExampleStack, *args: PyTree, zero: PyTree
) -> tuple[Float[Array, ""], PyTree]:
    """`sum_i weights_i`, and `sum over micro-batches of fn(*args, batch, weights)`; devices share the examples.

    Both are in one reduction over devices: an L2 term, which counts once per unit of weight, needs the first.

    Args:
        fn: a pure function of one micro-batch, that returns a pytree of the structure, shapes and dtypes of `zero`.
        stack: the data.
        args: whatever `fn` takes that is the same for all examples.
        zero: the sum over nothing.
    """

    def of_stack(stack, zero, *args):
        return weight_sum(stack), scan_weighted_sum(partial(fn, *args), stack, zero)

    return sum_over_devices(of_stack, stack, zero, *args)


def _chunk_loss_sum(objective: Objective, params: LoraParams, batch: Batch, weights: Float[Array, " batch"]):
    return jnp.sum(weights * objective.data_losses(params, batch))


def chunk_gradient_sum(
    objective: Objective, params: LoraParams, batch: Batch, weights: Float[Array, " batch"]
) -> LoraParams:
    """`sum_i weights_i * grad data loss_i` over one micro-batch, without the L2 term."""
    return jax.grad(_chunk_loss_sum, argnums=1)(objective, params, batch, weights)


@jax.jit
def loss_sum(objective: Objective, params: LoraParams, stack: ExampleStack) -> Float[Array, ""]:
    """`sum_i weights_i * data loss_i`, without the L2 term."""
    zero = jnp.zeros((), stack.weights[0].dtype)
    return sum_over_examples(_chunk_loss_sum, stack, objective, params, zero=zero)[1]


@jax.jit
def loss_and_gradient_sums(
    objective: Objective, params: LoraParams, stack: ExampleStack
) -> tuple[Float[Array, ""], LoraParams]:
    """`sum_i weights_i * data loss_i` and its gradient, without the L2 term."""
    zero = jnp.zeros((), jnp.result_type(stack.weights[0], *jax.tree.leaves(params)))
    return sum_over_examples(
        jax.value_and_grad(_chunk_loss_sum, argnums=1),
        stack,
        objective,
        params,
        zero=(zero, trees.tree_zeros_like(params)),
    )[1]


@jax.jit
def gradient_sum(objective: Objective, params: LoraParams, stack: ExampleStack) -> LoraParams:
    """`sum_i weights_i * grad l_i`, the L2 term included once per unit of weight."""
    total_weight, data_term = sum_over_examples(
        chunk_gradient_sum, stack, objective, params, zero=trees.tree_zeros_like(params)
    )
    return trees.tree_axpy(objective.l2 * total_weight, objective.from_prior(params), data_term)


@partial(jax.jit, static_argnames="fn")
def _per_chunk(fn: Callable[..., PyTree], stack: ExampleStack, *args: PyTree) -> tuple[PyTree, ...]:
    def of_stack(stack, *args):
        return tuple(jax.lax.map(partial(fn, *args), batches) for batches in stack.batches)

    return map_over_devices(of_stack, stack, *args)


def per_example(fn: Callable[..., PyTree], stack: ExampleStack, *args: PyTree) -> PyTree:
    """`fn(*args, batch)` of every example, in the order in which the stack was asked for; on the host.

    Args:
        fn: a pure function of one micro-batch that returns a pytree of arrays [batch, ...]; hashable.
        stack: the examples, with their places.
        args: whatever `fn` takes besides; the same for all examples.

    Returns:
        Arrays [examples, ...], floats in float64. Where buckets differ in a trailing axis, rows end in nan (-1 in
        arrays of integers).
    """
    places = example_places(stack)
    found = [part for entry in stack.entries for part in _per_chunk(fn, entry, *args)]
    parts = [jax.tree.map(_flat, part) for part in to_host(found)]
    return jax.tree.map(lambda *leaves: _joined(leaves)[places], *parts)


def _flat(leaf: np.ndarray) -> np.ndarray:
    leaf = leaf.reshape(-1, *leaf.shape[2:])
    return leaf if np.issubdtype(leaf.dtype, np.integer) else leaf.astype(np.float64)


def _joined(leaves: Sequence[np.ndarray]) -> np.ndarray:
    if leaves[0].ndim == 1:
        return np.concatenate(leaves)
    width = max(leaf.shape[1] for leaf in leaves)
    fill = -1 if np.issubdtype(leaves[0].dtype, np.integer) else np.nan
    return np.concatenate(
        [np.pad(leaf, ((0, 0), (0, width - leaf.shape[1])), constant_values=fill) for leaf in leaves]
    )


def example_places(stack: ExampleStack) -> Int[np.ndarray, " examples"]:
    """Where each example is among all rows of a stack, padding included; in the order that was asked for.

    Raises:
        ValueError: the stack does not know.
    """
    if stack.places is None:
        msg = "This stack does not know the places of its examples; make it with ExampleSet.stack."
        raise ValueError(msg)
    places = np.concatenate([place.reshape(-1) for place in to_host(stack.places)])
    rows = np.flatnonzero(places >= 0)
    found = np.empty(len(rows), np.int64)
    found[places[rows]] = rows
    return found


def data_losses(objective: Objective, params: LoraParams, batch: Batch) -> Float[Array, " batch"]:
    """`Objective.data_losses`, for `per_example`."""
    return objective.data_losses(params, batch)


class ForwardValues(NamedTuple):
    """What one forward pass tells of a micro-batch; one program for all who ask for some of it."""

    losses: Float[Array, " batch"]
    log_odds: Float[Array, " batch"]
    # Of each loss token its id and its loss, nan where there is none; None where examples have no tokens.
    tokens: tuple[Int[Array, "batch tokens"], Float[Array, "batch tokens"]] | None


def forward_values(objective: Objective, params: LoraParams, batch: Batch) -> ForwardValues:
    """Data losses, their log-odds, and what they are made of, for `per_example`."""
    outputs = objective.outputs(params, batch)
    of_tokens = objective.token_losses_fn
    tokens = None if of_tokens is None else (batch.targets, of_tokens(outputs, batch))
    return ForwardValues(
        objective.output_loss_fn(outputs, batch), objective.output_log_odds(outputs, batch), tokens
    )


def example_losses(objective: Objective, params: LoraParams, stack: ExampleStack) -> Float[np.ndarray, " examples"]:
    """Each example's data loss, in the order that was asked for."""
    return per_example(data_losses, stack, objective, params)
