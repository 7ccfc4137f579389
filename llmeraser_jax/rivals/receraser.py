"""RecEraser: shards of similar rows, and an attention over their adapters.

Source: Chen et al. 2022, *Recommendation Unlearning* (arXiv 2201.06820). Rows are divided by balanced k-means on
embeddings, so that what belongs together is trained together (by rows: the source's interaction-based division; by
users: its user-based one); a request trains the shards that it touches again, and then the attention, which is
trained on the data that are left with all members frozen. What differs from the source: members are LoRA adapters
on one frozen base, not recommenders with embedding tables. So the embeddings that divide the data are the base's
mean last hidden state over the prompt (or any that are given), where the source trains a recommender for them; and
the attention reads that embedding and the shards' centroids, `softmax_k h' relu(W e + V c_k + b)`, where the
source reads each shard's own user and item vectors. It weighs the members' probabilities at each response
position, and is fitted to the responses' likelihood. An edited row stays in its shard, in its edited form. The
centroids are means over the rows that are left: they remember nothing that went.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from llmeraser_jax.data import TokenDataset
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import place_batch, to_host, whole_shares
from llmeraser_jax.rivals.descent import require_non_negative, require_positive
from llmeraser_jax.rivals.ensemble import AttentionGate, Ensemble, MeanHiddenState, make_ensemble
from llmeraser_jax.rivals.ensemble_model import ensemble_model, place_ensemble
from llmeraser_jax.rivals.partition import embedding_partition
from llmeraser_jax.rivals.shards import ShardedTraining, ShardTrainer
from llmeraser_jax.types import BaseParams, LoraParams, TokenBatch
from llmeraser_jax.unlearning import Result, UnlearningTask, Workspace
from llmeraser_jax.unlearning.budget import FORWARD, Cost
from llmeraser_jax.unlearning.task import take

_CHUNK_SIZE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecEraser:
    """Balanced shards of similar rows under an attention.

    Attributes:
        num_shards: adapters.
        by_user: divide users instead of rows where the task knows them.
        embed: `(base, tokens, attention_mask, last) -> [batch, width]`, hashable: embeds the prompt that ends at
            index `last`; None is the base's mean last hidden state.
        attention_rows: rows of the edited data that the attention is trained on; None is all.
        attention_width: hidden units.
        attention_steps: Adam steps over all these rows together.
        attention_learning_rate: of these.
        attention_l2: penalty `(l2 / 2) ||.||^2` on its parameters.
        seed: of the first centres, the rows of the attention and its first parameters.
    """

    num_shards: int = 4
    by_user: bool = True
    embed: Callable[..., Array] | None = None
    attention_rows: int | None = 512
    attention_width: int = 32
    attention_steps: int = 200
    attention_learning_rate: float = 1e-2
    attention_l2: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_shards", "attention_rows", "attention_width", "attention_steps"):
            value = getattr(self, name)
            if not ((value is None and name == "attention_rows") or (isinstance(value, int) and value >= 1)):
                msg = f"{name} is {value!r}; it must be a whole number of at least 1."
                raise ValueError(msg)
        require_positive(self, "attention_learning_rate")
        require_non_negative(self, "attention_l2")

    def trainer(self, task: UnlearningTask) -> ShardTrainer:
        """What trains a shard."""
        train = task.require_training()
        return ShardTrainer(
            model=task.language_model,
            initial=task.initial_adapter(train.seed),
            train=train,
            epochs=train.epochs,
            workdir=None if task.workdir is None else task.workdir / "receraser",
        )

    def embed_of(self, model: Model) -> Callable[..., Array]:
        """The embedding in use."""
        return MeanHiddenState(model.config) if self.embed is None else self.embed

    def prepare(self, task: UnlearningTask) -> ShardedTraining:
        """Divides the data as they stood and trains all shards.

        Raises:
            ValueError: fewer rows (or users) than shards, or a loss on more than the response.
        """
        if task.dataset.recipe.loss_on != "response":
            msg = (
                f"loss_on is {task.dataset.recipe.loss_on!r}; RecEraser weighs its members by the prompt, which "
                "a batch shows only where the loss is on the response alone. Use SISA."
            )
            raise ValueError(msg)
        n = len(task.dataset)
        embeddings, _ = _embeddings_and_log_probs(
            task.language_model, (), task.dataset, self.embed_of(task.language_model)
        )
        scale = float(np.sqrt(((embeddings - embeddings.mean(0)) ** 2).mean()))
        partition = embedding_partition(
            embeddings / max(scale, np.finfo(np.float32).tiny),
            self.num_shards,
            seed=self.seed,
            users=task.users if self.by_user else None,
        )
        trained = self.trainer(task).fit(task.problem.examples, partition, np.arange(n), name="before")
        return dataclasses.replace(trained, gradient_equivalents=trained.gradient_equivalents + FORWARD * n)

    def run(self, task: UnlearningTask, workspace: Workspace, prepared: ShardedTraining | None = None) -> Result:
        """Trains the shards that the requests touch again, then the attention on the edited data.

        Args:
            task: the task.
            workspace: not used.
            prepared: of `prepare` with the same task; None prepares.
        """
        started = time.perf_counter()
        if prepared is None:
            prepared = self.prepare(task)
        before, before_cost, _ = self._gated(task, prepared)
        prepared_at = time.perf_counter()
        after = self.trainer(task).fit(
            task.problem.examples, prepared.partition, task.current, before=prepared, name="after"
        )
        params, gate_cost, losses = self._gated(task, after)
        return Result(
            model=ensemble_model(task.language_model),
            params=params,
            before=before,
            cost=Cost(
                training=after.gradient_equivalents + gate_cost,
                preparation=prepared.gradient_equivalents + before_cost,
                retraining=task.cost_of_retraining,
            ),
            seconds=time.perf_counter() - prepared_at,
            details={
                "preparation_seconds": prepared_at - started,
                "shard_sizes": np.bincount(prepared.partition.shard_of, minlength=self.num_shards).tolist(),
                "num_shards_repeated": sum(first == 0 for first in after.repeated_from),
                "num_members": params.num_members,
                "attention_gradient_equivalents": gate_cost,
                "attention_loss_first_and_last": [float(losses[0]), float(losses[-1])],
            },
        )

    def _gated(self, task: UnlearningTask, training: ShardedTraining) -> tuple[Ensemble, float, np.ndarray]:
        """The ensemble with an attention of its own, what that cost, and the attention's loss at every step.

        Costs the members' and the base's forward passes; the attention itself is a few thousand numbers.
        """
        model, members = task.language_model, training.members
        embed = self.embed_of(model)
        there = np.flatnonzero(training.current >= 0)
        rng = np.random.default_rng([self.seed, 1])
        if self.attention_rows is not None and self.attention_rows < len(there):
            there = np.sort(rng.choice(there, self.attention_rows, replace=False))
        rows = take(task.problem.examples, training.current[there])
        embeddings, log_probs = _embeddings_and_log_probs(model, members, rows, embed)
        gate = self._first_gate(embeddings, training.partition.shard_of[there], training.occupied, embed)
        gate, losses = fit_gate(
            gate,
            jnp.asarray(embeddings),
            jnp.asarray(log_probs),
            num_steps=self.attention_steps,
            learning_rate=self.attention_learning_rate,
            l2=self.attention_l2,
        )
        ensemble = place_ensemble(make_ensemble(members, gate=gate), model)
        return ensemble, FORWARD * (len(members) + 1) * len(rows), np.asarray(losses)

    def _first_gate(
        self, embeddings: np.ndarray, shard_of: np.ndarray, occupied: tuple[int, ...], embed: Callable[..., Array]
    ) -> AttentionGate:
        """Equal weights: the output layer is zero, the others are drawn."""
        centre = embeddings.mean(0)
        scale = max(float(np.sqrt(((embeddings - centre) ** 2).mean())), float(np.finfo(np.float32).tiny))
        standard = (embeddings - centre) / scale
        # A shard whose rows are not in the sample has the mean of all as its centroid, which is zero.
        means = [standard[shard_of == k].mean(0) if np.any(shard_of == k) else 0 * centre for k in occupied]
        width, hidden = embeddings.shape[1], self.attention_width
        rng = np.random.default_rng([self.seed, 2])

        def drawn() -> Array:
            return jnp.asarray(rng.normal(size=(hidden, width)) / math.sqrt(width), jnp.float32)

        return AttentionGate(
            centre=jnp.asarray(centre, jnp.float32),
            scale=jnp.asarray(scale, jnp.float32),
            centroids=jnp.asarray(np.stack(means), jnp.float32),
            query=drawn(),
            key=drawn(),
            bias=jnp.zeros(hidden),
            out=jnp.zeros(hidden),
            embed=embed,
        )


_TRAINED = ("query", "key", "bias", "out")


@partial(jax.jit, static_argnames=("num_steps",))
def fit_gate(
    gate: AttentionGate,
    embeddings: Float[Array, "rows width"],
    log_probs: Float[Array, "members rows response"],
    *,
    num_steps: int,
    learning_rate: float | Array,
    l2: float | Array,
) -> tuple[AttentionGate, Float[Array, " steps"]]:
    """Fits the attention to the responses by Adam on all rows together.

    Args:
        gate: where to start.
        embeddings: of the rows' prompts.
        log_probs: of every response token under each member; 0 at padding, which then costs nothing.
        num_steps: of Adam.
        learning_rate: of these.
        l2: penalty on the trained parameters.

    Returns:
        The gate, and at each step its loss: minus the rows' mean log-probability under the weighted members, summed
        over response tokens, and the penalty.
    """
    adam = optax.adam(learning_rate)

    def loss(trained: dict[str, Any]):
        log_weights = dataclasses.replace(gate, **trained).log_weights(embeddings).T[:, :, None]
        mixed = jax.scipy.special.logsumexp(log_weights + log_probs, axis=0)
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(trained))
        return -jnp.mean(jnp.sum(mixed, axis=-1)) + 0.5 * l2 * penalty

    def step(state, _):
        trained, opt_state = state
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, opt_state = adam.update(gradient, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), value

    first = {name: getattr(gate, name) for name in _TRAINED}
    (last, _), losses = jax.lax.scan(step, (first, adam.init(first)), None, length=num_steps)
    fitted: Any = last
    return dataclasses.replace(gate, **fitted), losses


@partial(jax.jit, static_argnames=("embed",))
def _embed_batch(embed: Callable[..., Array], base: BaseParams, batch: TokenBatch) -> Float[Array, "batch width"]:
    return embed(base, batch.tokens, batch.attention_mask, batch.positions[:, 0], *batch.pictures)


@partial(jax.jit, static_argnames=("apply",))
def _target_log_probs(
    apply: Callable[..., Array], base: BaseParams, member: LoraParams, batch: TokenBatch
) -> Float[Array, "batch response"]:
    """Log-probability of every target, 0 at padding."""
    logits = apply(base, member, *batch.inputs)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    return jnp.where(batch.target_weights > 0, picked, 0)


def _embeddings_and_log_probs(
    model: Model, members: tuple[LoraParams, ...], dataset: TokenDataset, embed: Callable[..., Array]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of all prompts [n, width], and all targets' log-probabilities [members, n, response]."""
    n, width = len(dataset), dataset.uniform_shape.response
    stack = dataset.stack_uniform(np.arange(n), np.ones(n), chunk_size=whole_shares(_CHUNK_SIZE, model.mesh))
    embeddings, log_probs = [], []
    for chunk in range(stack.weights[0].shape[0]):
        batch = place_batch(jax.tree.map(lambda leaf, chunk=chunk: leaf[chunk], stack.batches[0]), model.mesh)
        embeddings.append(to_host(_embed_batch(embed, model.base, batch)).astype(np.float32))
        log_probs.append(
            np.stack(to_host([_target_log_probs(model.apply, model.base, member, batch) for member in members]))
            if members
            else np.zeros((0, len(embeddings[-1]), width), np.float32)
        )
    return np.concatenate(embeddings)[:n], np.concatenate(log_probs, axis=1)[:, :n]
