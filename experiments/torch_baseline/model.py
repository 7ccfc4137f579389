"""Owns the model, transformers' decoder with PEFT's adapter as a function of the adapter, and its batches.

The adapter is a dict from PEFT's tensor names (as in adapter_model.safetensors) to tensors; every vector of its
space is such a dict. Everything computed over data is `sum_i weights_i * f(example_i)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch.overrides import TorchFunctionMode

from llmeraser_jax.data import TokenDataset

Params = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One right-padded micro-batch.

    Attributes:
        tokens, attention_mask: [batch, time].
        positions: where the logits that predict the targets are read [batch, response].
        targets: token ids to predict [batch, response].
        target_weights: `1 / (tokens averaged over)`; 0 for padding [batch, response].
        weights: the examples' coefficients [batch].
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    target_weights: torch.Tensor
    weights: torch.Tensor


def make_batches(
    dataset: TokenDataset,
    indices: np.ndarray,
    weights: np.ndarray,
    *,
    chunk_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Lays examples out, those of similar length together, each micro-batch as long as its longest example.

    Args:
        dataset: encoded examples.
        indices: which [n]; repeats are allowed.
        weights: a coefficient each [n].
        chunk_size: examples in a micro-batch.
        dtype: of coefficients and target weights.
        device: where the tensors go.

    Raises:
        ValueError: no examples, or not one weight each.
    """
    indices, weights = np.asarray(indices), np.asarray(weights, np.float64)
    if len(indices) == 0 or indices.shape != weights.shape:
        msg = f"{len(indices)} indices with weights of shape {weights.shape}; give some, and one weight each."
        raise ValueError(msg)
    order = np.argsort([len(dataset.encoded[i].tokens) for i in indices], kind="stable")
    batches = []
    for start in range(0, len(order), chunk_size):
        rows = order[start : start + chunk_size]
        examples = [dataset.encoded[i] for i in indices[rows]]
        time, response = max(len(e.tokens) for e in examples), max(e.num_targets for e in examples)
        tokens, mask = np.zeros((2, len(rows), time), np.int64)
        positions, targets = np.zeros((2, len(rows), response), np.int64)
        target_weights = np.zeros((len(rows), response))
        for row, example in enumerate(examples):
            length, count = len(example.tokens), example.num_targets
            tokens[row, :length], mask[row, :length] = example.tokens, 1
            positions[row, :count], targets[row, :count] = example.targets - 1, example.tokens[example.targets]
            target_weights[row, :count] = 1.0 / (count if dataset.normalizer is None else dataset.normalizer)
        whole = {"tokens": tokens, "attention_mask": mask, "positions": positions, "targets": targets}
        parts = {name: torch.from_numpy(array).to(device) for name, array in whole.items()}
        numbers = {"target_weights": target_weights, "weights": weights[rows]}
        parts |= {name: torch.from_numpy(array).to(device, dtype) for name, array in numbers.items()}
        batches.append(Batch(**parts))
    return batches


def num_examples(batches: Sequence[Batch]) -> int:
    """Examples in the batches."""
    return sum(len(batch.weights) for batch in batches)


def weight_sum(batches: Sequence[Batch]) -> float:
    """Sum of all coefficients."""
    return float(sum(float(batch.weights.double().sum()) for batch in batches))


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

    def forward(self, tokens, attention_mask, positions):
        causal: Any = self.causal
        hidden = causal.model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return causal.lm_head(hidden.take_along_dim(positions[..., None], dim=1))


class AdaptedModel:
    """A frozen base with an adapter that is passed in at every call.

    Attributes:
        wide: computes in float64 throughout.
    """

    def __init__(self, peft_model: torch.nn.Module):
        inner: Any = peft_model
        self._module = _ResponseLogits(inner.base_model.model)
        self._inner_name, self._loaded = {}, {}
        for name, parameter in self._module.named_parameters():
            parameter.requires_grad_(False)
            if ".lora_" in name:
                outer = "base_model.model." + name.removeprefix("causal.").replace(".default.weight", ".weight")
                self._inner_name[outer], self._loaded[outer] = name, parameter
        self.wide = self.dtype == torch.float64
        if self.wide:
            rotary: Any = inner.base_model.model.model.rotary_emb
            with _Wide():
                fresh: Any = type(rotary)(rotary.config)
            rotary.inv_freq = fresh.inv_freq.to(rotary.inv_freq.device)
            rotary.original_inv_freq = fresh.original_inv_freq.to(rotary.inv_freq.device)
        self._module.train(False)

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

    def logits(self, params: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Logits [batch, response, vocab] at `batch.positions`."""
        inner = {self._inner_name[name]: tensor for name, tensor in params.items()}
        with _Wide() if self.wide else contextlib.nullcontext():
            arguments = (batch.tokens, batch.attention_mask, batch.positions)
            return torch.func.functional_call(self._module, inner, arguments)

    @contextlib.contextmanager
    def dropout_as(self, on: bool) -> Iterator[None]:
        """The adapter's dropout on or off for a while."""
        before = self._module.training
        self._module.train(on)
        try:
            yield
        finally:
            self._module.train(before)


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
    return AdaptedModel((model.double() if dtype == torch.float64 else model).to(device))


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
