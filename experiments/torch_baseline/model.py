"""Owns the model: transformers' decoder with a PEFT adapter, as a function of the adapter's tensors.

The adapter is a dict from PEFT's tensor names (as in adapter_model.safetensors) to tensors; every vector of its
space is such a dict. Nothing here comes from the JAX package.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
import transformers
from torch.overrides import TorchFunctionMode

from experiments.torch_baseline.batches import Batch

Params = dict[str, torch.Tensor]


class _Wide(TorchFunctionMode):
    """Reads every request for float32 as one for float64.

    transformers computes norms, attention weights and rotary angles in float32 whatever the model's dtype is, so
    that a float64 model is one in name only.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


class _ResponseLogits(torch.nn.Module):
    """Logits at given positions; a module, so that `functional_call` can exchange the adapter."""

    def __init__(self, causal: torch.nn.Module):
        super().__init__()
        self.causal = causal

    def forward(self, tokens, attention_mask, positions, at_response: bool):
        causal: Any = self.causal
        if at_response:
            hidden = causal.model(
                input_ids=tokens, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
            return causal.lm_head(hidden.take_along_dim(positions[..., None], dim=1))
        logits = causal(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits
        return logits.take_along_dim(positions[..., None], dim=1)


class AdaptedModel:
    """A frozen base with an adapter that is passed in at every call.

    Attributes:
        peft_model: PEFT's model; its own adapter weights are those it was loaded with.
        names: of the adapter's tensors, in the module's order.
        scaling: what multiplies B A.
        wide: computes in float64 throughout.
    """

    def __init__(self, peft_model: torch.nn.Module):
        self.peft_model: Any = peft_model
        self._module = _ResponseLogits(self.peft_model.base_model.model)
        self._inner_name = {}
        self._loaded: Params = {}
        for inner, parameter in self._module.named_parameters():
            parameter.requires_grad_(False)
            if ".lora_" in inner:
                name = "base_model.model." + inner.removeprefix("causal.").replace(".default.weight", ".weight")
                self._inner_name[name] = inner
                self._loaded[name] = parameter
        self.names = tuple(self._inner_name)
        adapted = [module for module in self._module.modules() if hasattr(module, "lora_A")]
        (self.scaling,) = {float(module.scaling["default"]) for module in adapted}  # pyright: ignore
        self.wide = next(iter(self._loaded.values())).dtype == torch.float64
        if self.wide:
            self._recompute_rotary_frequencies()
        self.dropout(False)

    def _recompute_rotary_frequencies(self) -> None:
        causal: Any = self._module.causal
        rotary: Any = causal.model.rotary_emb
        with _Wide():
            fresh: Any = type(rotary)(rotary.config)
        rotary.inv_freq = fresh.inv_freq.to(rotary.inv_freq.device)
        rotary.original_inv_freq = fresh.original_inv_freq.to(rotary.inv_freq.device)

    def dropout(self, on: bool) -> None:
        """Turns the adapter's dropout on or off."""
        self._module.train(on)

    @property
    def device(self) -> torch.device:
        return next(iter(self._loaded.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapter."""
        return next(iter(self._loaded.values())).dtype

    def loaded_params(self) -> Params:
        """A copy of the adapter that the model was loaded with."""
        return {name: tensor.detach().clone() for name, tensor in self._loaded.items()}

    def logits(self, params: Mapping[str, torch.Tensor], batch: Batch, *, at_response: bool = True) -> torch.Tensor:
        """Logits [batch, response, vocab] at `batch.positions`.

        Args:
            params: the adapter.
            batch: tokens and positions.
            at_response: apply the head at these positions alone; False computes all logits and takes some, as a
                plain call of transformers' model does.
        """
        inner = {self._inner_name[name]: tensor for name, tensor in params.items()}
        with _Wide() if self.wide else contextlib.nullcontext():
            arguments = (batch.tokens, batch.attention_mask, batch.positions, at_response)
            return torch.func.functional_call(self._module, inner, arguments)

    @contextlib.contextmanager
    def dropout_as(self, on: bool) -> Iterator[None]:
        """Dropout on or off for a while."""
        before = self._module.training
        self.dropout(on)
        try:
            yield
        finally:
            self.dropout(before)


def load_adapted_model(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AdaptedModel:
    """Reads a base model and an adapter in PEFT's format.

    Attention is transformers' eager one: the fused kernels have no second derivative.

    Args:
        base: directory in Hugging Face layout.
        adapter: directory that holds adapter_config.json and adapter_model.safetensors.
        dtype: of the base. The adapter is float32, or float64 with a float64 base.
        device: where the model goes.
    """
    causal: Any = transformers.AutoModelForCausalLM.from_pretrained(
        os.fspath(base), dtype=dtype, attn_implementation="eager"
    )
    model: Any = peft.PeftModel.from_pretrained(causal, os.fspath(adapter))
    if dtype == torch.float64:
        model = model.double()
    return AdaptedModel(model.to(device))


# Vectors of adapter space.


def zeros_like(params: Params) -> Params:
    """The zero vector."""
    return {name: torch.zeros_like(tensor) for name, tensor in params.items()}


def vdot(x: Params, y: Params) -> torch.Tensor:
    """`<x, y>`, accumulated in float64."""
    return torch.stack([(x[name].double() * y[name].double()).sum() for name in x]).sum()


def norm(x: Params) -> float:
    """Euclidean norm."""
    return float(vdot(x, x).sqrt())


def axpy(alpha: float | torch.Tensor, x: Params, y: Params) -> Params:
    """`alpha x + y`, in the dtype of y."""
    return {name: (alpha * x[name] + y[name]).to(y[name].dtype) for name in y}


def scaled(alpha: float, x: Params) -> Params:
    """`alpha x`."""
    return {name: alpha * tensor for name, tensor in x.items()}
