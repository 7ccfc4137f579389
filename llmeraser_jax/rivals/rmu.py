"""RMU: activations of an early layer are driven to a random direction on S and held on retained rows.

Source: Li et al. 2024, the WMDP benchmark (arXiv 2403.03218), with the target's length of Adaptive RMU (Dang et
al. 2024, arXiv 2408.06223): `steering` times the norm of the trained adapter's own activation of that token, so
that it needs no choice for each model. With h the residual stream after a layer and u a fixed random direction,
minimised is

    mean_t |h_t - steering |h0_t| u|^2 / width on S + retain_weight mean_t |h_t - h0_t|^2 / width on R

What differs from the sources: all adapted matrices up to that layer move, where the sources move the down
projections of three layers; response tokens alone; the layer is a share of the depth (the sources: 7 of 32);
`steering` is chosen here, `retain_weight` is WMDP's for Zephyr-7B; and edits, whose wanted pair is descended on
with coefficient 1, through all layers. Passes end at the layer, and cost the share of the layers that they go
through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmeraser_jax.lora import Lora
from llmeraser_jax.models import ApplyDecoder, ModelConfig
from llmeraser_jax.models.decoder import Decoder, bind, token_positions
from llmeraser_jax.rivals.descent import Descent, Phase, require_positive
from llmeraser_jax.rivals.terms import ExampleLoss
from llmeraser_jax.types import BaseParams, TokenBatch


@dataclasses.dataclass(frozen=True)
class HiddenAtResponse:
    """`(base, lora, tokens, attention_mask, positions) -> residual stream after the first layers`; hashable.

    Attributes:
        config: of the whole model.
        num_layers: how many layers are read.
    """

    config: ModelConfig
    num_layers: int

    def __call__(
        self, base: BaseParams, lora: Lora, tokens: Array, attention_mask: Array, positions: Array
    ) -> Float[Array, "batch response width"]:
        """At the response positions."""
        count, whole = self.num_layers, self.config
        cut = {
            name: None if getattr(whole, name) is None else getattr(whole, name)[:count]
            for name in ("windowed_layers", "unrotated_layers")
        }
        layers = {}
        for name, leaves in lora.params["layers"].items():
            if rank := lora.config.stack_rank(name, count):
                layers[name] = {"a": leaves["a"][:count, :rank], "b": leaves["b"][:count, :, :rank]}
        module, variables = bind(
            dataclasses.replace(whole, num_layers=count, **cut),
            {**base, "layers": jax.tree.map(lambda leaf: leaf[:count], base["layers"])},
            Lora(params={"layers": layers}, config=lora.config),
        )
        valid = jnp.asarray(attention_mask).astype(bool)
        where = token_positions(valid)
        hidden: Any = module.apply(variables, tokens, where, where, valid, None, None, method=Decoder._hidden)
        return jnp.take_along_axis(hidden[0], positions[..., None], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationLoss(ExampleLoss):
    """Mean square of the difference of activations from the trained adapter's, or from a random direction.

    Attributes:
        depth: share of the layers after which they are read.
        steering: length of the direction, as a multiple of the trained adapter's activation; None is that itself.
        seed: of the direction.
    """

    num_teachers: ClassVar[int] = 1
    depth: float
    steering: float | None = None
    seed: int = 0

    def network(self, apply: Callable[..., Array]) -> HiddenAtResponse:
        """The first layers.

        Raises:
            TypeError: `apply` is not the package's decoder.
        """
        if not isinstance(apply, ApplyDecoder):
            msg = f"RMU reads activations of the package's decoder; this model's apply is {type(apply).__name__}."
            raise TypeError(msg)
        return HiddenAtResponse(apply.config, max(1, round(self.depth * apply.config.num_layers)))

    def network_share(self, apply: Callable[..., Array]) -> float:
        """The share of the layers."""
        network = self.network(apply)
        return network.num_layers / network.config.num_layers

    def __call__(self, logits: Array, teachers: tuple[Array, ...], batch: TokenBatch) -> Array:
        """Mean over response tokens; `logits` and `teachers` are activations."""
        target = teachers[0]
        if self.steering is not None:
            direction = jax.random.uniform(jax.random.key(self.seed), target.shape[-1:], target.dtype)
            length = self.steering * jnp.linalg.norm(target, axis=-1, keepdims=True)
            target = length * direction / jnp.linalg.norm(direction)
        return jnp.sum(jnp.mean((logits - target) ** 2, axis=-1) * batch.target_weights, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMU(Descent):
    """Misdirects the representation of S.

    Attributes:
        steering: length of the target, as a multiple of the activation's.
        retain_weight: coefficient of the retained rows' activations.
        depth: the layer, as a share of all layers.
    """

    steering: float = 5.0
    retain_weight: float = 1200.0
    depth: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "steering", "retain_weight", "depth")
        if self.depth > 1:
            msg = f"depth is {self.depth}; it is a share of the layers, at most 1."
            raise ValueError(msg)

    def phases(self) -> tuple[Phase, ...]:
        """One, on S and R."""
        return (
            Phase(
                epochs=self.epochs,
                forget=ActivationLoss(depth=self.depth, steering=self.steering, seed=self.seed),
                retain=ActivationLoss(depth=self.depth),
                retain_weight=self.retain_weight,
            ),
        )
