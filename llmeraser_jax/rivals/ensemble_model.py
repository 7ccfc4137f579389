"""A model that reads ensembles, and greedy generation by one: each token is the most probable under all members.

Each member has a key/value cache of its own. A gated ensemble is weighed once, by the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax.models import Model, ModelConfig, generate
from llmeraser_jax.models.decoder import KVCache, bind
from llmeraser_jax.models.generation import append, empty_cache, generate_batches, greedy_search, make_stale
from llmeraser_jax.parallel import replicate
from llmeraser_jax.rivals.ensemble import ApplyEnsemble, Ensemble
from llmeraser_jax.types import BaseParams


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EnsembleModel(Model):
    """A base model that reads ensembles besides adapters.

    Attributes:
        member: the model of one adapter; all other fields are its own.
    """

    member: Model

    @property
    def apply(self) -> ApplyEnsemble:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes an adapter, an `Ensemble`, or None."""
        return ApplyEnsemble(self.member.apply)

    @property
    def adapter_extras(self) -> tuple[str, ...]:
        """The member's."""
        return self.member.adapter_extras

    def init_lora(self, key: Any, config: Any) -> Any:
        """A fresh adapter of the member."""
        return self.member.init_lora(key, config)

    def generate(self, params: Any, *arguments: Any, **options: Any) -> list[list[int]]:
        """`models.generate` for an adapter, the same by all members together for an `Ensemble`."""
        if isinstance(params, Ensemble):
            return generate_ensemble(self, params, *arguments, **options)
        return generate(self.member, params, *arguments, **options)


def ensemble_model(model: Model) -> EnsembleModel:
    """The same base, reading ensembles too."""
    if isinstance(model, EnsembleModel):
        return model
    return EnsembleModel(
        config=model.config,
        base=model.base,
        tokenizer=model.tokenizer,
        path=model.path,
        mesh=model.mesh,
        vision=model.vision,
        member=model,
    )


def place_ensemble(ensemble: Ensemble, model: Model) -> Ensemble:
    """The ensemble on every device of the model's mesh."""
    return replicate(ensemble, model.mesh)


def generate_ensemble(
    model: EnsembleModel,
    ensemble: Ensemble,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 16,
    stop_ids: Sequence[int] | None = None,
    images: Sequence[np.ndarray] | np.ndarray | None = None,
) -> list[list[int]]:
    """What `models.generate` is for one adapter.

    Args:
        model: the base, reading ensembles.
        ensemble: the adapters.
        prompts: token ids, of any lengths.
        max_new_tokens: the most tokens to add to each prompt.
        batch_size: prompts computed together.
        stop_ids: tokens that end a text; None is the model's end-of-sequence tokens.
        images: features of each prompt's pictures; see `models.generate`.

    Returns:
        New tokens of each prompt, in the order given, without the stop token.

    Raises:
        ValueError: as `models.generate`.
    """

    def decode(tokens, mask, stops, *pictures):
        inputs = (tokens, mask, stops, *pictures)
        return _decode(model.apply, model.config, model.base, ensemble, *inputs, max_new_tokens=max_new_tokens)

    return generate_batches(
        decode, model.config, prompts, max_new_tokens, batch_size=batch_size, stop_ids=stop_ids, images=images
    )


@partial(jax.jit, static_argnames=("apply", "config", "max_new_tokens"))
def _decode(
    apply: ApplyEnsemble,
    config: ModelConfig,
    base: BaseParams,
    ensemble: Ensemble,
    tokens: Int[Array | np.ndarray, "batch time"],
    mask: Bool[Array | np.ndarray, "batch time"],
    stop_ids: Int[Array | np.ndarray, " stops"],
    *pictures: Float[Array | np.ndarray, "batch images features size"],
    max_new_tokens: int,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    last = jnp.full(tokens.shape[0], tokens.shape[1] - 1, jnp.int32)  # padding is on the left
    return greedy_search_of_members(
        partial(append, config, base, images=pictures[0] if pictures else None),
        partial(empty_cache, config, bind(config, base, ensemble.member(0))[0].dtype),
        ensemble,
        apply.log_weights(base, ensemble, tokens, mask, last, *pictures),
        tokens,
        mask,
        stop_ids,
        max_new_tokens,
        make_stale(config),
    )


def greedy_search_of_members(
    append: Callable[..., tuple[Array, KVCache]],
    make_cache: Callable[[int, int], KVCache],
    ensemble: Ensemble,
    log_weights: Float[Array, "members batch"],
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    stop_ids: Int[Array | np.ndarray, " stops"],
    max_new_tokens: int,
    stale: Callable[[Array], Array] | None = None,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """`models.generation.greedy_search` with all members; a pure function, to be jitted.

    Args:
        append: `(member, cache, *call) -> (logits [batch, 1, vocab], cache)`, as `models.generation.append` with
            its model given.
        make_cache: `(batch, slots)` -> an empty one.
        ensemble: the adapters.
        log_weights: see `ApplyEnsemble.log_weights`.
        tokens, mask, stop_ids, max_new_tokens: see `models.generation.greedy_decode`.
        stale: see `models.generation.greedy_search`.

    Returns:
        New tokens (0 after the end), and how many each row has, the stop token not counted.
    """

    def append_to_all(caches, *call):
        def one(total, member_cache_and_weight):
            member, cache, log_weight = member_cache_and_weight
            logits, cache = append(member, KVCache(*cache), *call)
            log_probs = jax.nn.log_softmax(logits, axis=-1)
            return ensemble.add(total, log_weight.astype(log_probs.dtype), log_probs), (cache.keys, cache.values)

        first = KVCache(*(leaf[0] for leaf in caches))
        shape = jax.eval_shape(lambda: append(ensemble.member(0), first, *call)[0])
        start = ensemble.nothing_added(shape.shape, shape.dtype)
        return jax.lax.scan(one, start, (ensemble.members, caches, log_weights))

    def make_caches(batch, slots):
        one = make_cache(batch, slots)
        return tuple(jnp.stack([leaf] * ensemble.num_members) for leaf in (one.keys, one.values))

    return greedy_search(append_to_all, make_caches, tokens, mask, stop_ids, max_new_tokens, stale)
