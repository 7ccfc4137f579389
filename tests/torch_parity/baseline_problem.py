"""One problem for both implementations: a random model, an adapter, encoded examples with edits, and conversions.

Imports PyTorch, so import it inside a test or fixture marked torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.torch_baseline.erase import BaselineConfig, EditedData, Eraser
from experiments.torch_baseline.model import AdaptedModel, Params, load_adapted_model
from llmeraser_jax.data import EncodedExample, Recipe, TokenDataset, choose_buckets
from llmeraser_jax.lora import Lora, load_adapter
from llmeraser_jax.losses import Objective, lm_objective
from llmeraser_jax.models import Model, load_model
from llmeraser_jax.unlearning import EditProblem
from tests.golden.cases import CASES
from tests.torch_parity import reference

VOCAB = 40
NUM_TRAINED = 7
L2 = 0.05
# Rows that are named, and how their replacements differ.
REMOVED, QUERY_MODIFIED, RESPONSE_CORRECTED = 1, 3, 4
REQUESTS = {
    "removal": (REMOVED,),
    "query modification": (QUERY_MODIFIED,),
    "response correction": (RESPONSE_CORRECTED,),
    "all three": (REMOVED, QUERY_MODIFIED, RESPONSE_CORRECTED),
}


def write_model(directory: Path, case: str, adapter: dict[str, Any]) -> tuple[Path, Path]:
    """A random base and adapter (A and B both random) on disk; returns their directories."""
    reference.build(CASES[case], seed=3).save_pretrained(str(directory / "base"))
    adapted = reference.adapt(reference.build(CASES[case], seed=3), adapter, seed=4)
    adapted.save_pretrained(str(directory / "adapter"))
    return directory / "base", directory / "adapter"


def random_examples(longest: int, reduction: str) -> TokenDataset:
    """Trained examples of several lengths, then a modified query and a corrected response, longer than before."""
    rng = np.random.default_rng(11)

    def tokens(count):
        return rng.integers(3, VOCAB, count)

    def encode(name, prompt, response):
        joined = np.concatenate([prompt, response]).astype(np.int32)
        mask = np.arange(len(joined)) >= len(prompt)
        return EncodedExample(id=name, tokens=joined, response_start=len(prompt), loss_mask=mask)

    prompts = [tokens(n) for n in np.linspace(3, longest - 4, NUM_TRAINED).astype(int)]
    responses = [tokens(1 + k % 4) for k in range(NUM_TRAINED)]
    encoded = [encode(f"r{k}", p, r) for k, (p, r) in enumerate(zip(prompts, responses, strict=True))]
    modified = np.concatenate([prompts[QUERY_MODIFIED][:1], tokens(3), prompts[QUERY_MODIFIED][2:]])
    encoded.append(encode("r3'", modified, responses[QUERY_MODIFIED]))
    encoded.append(encode("r4'", prompts[RESPONSE_CORRECTED], tokens(3)))
    return TokenDataset(
        encoded,
        Recipe(reduction=reduction),  # pyright: ignore[reportArgumentType]
        buckets=choose_buckets(encoded),
        normalizer=float(np.mean([e.num_targets for e in encoded])) if reduction == "token" else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Both sides of it."""

    theirs: AdaptedModel
    params: Params
    model: Model
    lora: Lora
    dataset: TokenDataset

    def objective(self) -> Objective:
        return lm_objective(self.model.apply, self.model.base, l2=L2)

    def edits(self, request: str = "all three") -> tuple[EditedData, EditProblem[TokenDataset]]:
        """The request for PyTorch and for JAX."""
        named = np.array(REQUESTS[request], np.int64)
        replacement = {QUERY_MODIFIED: NUM_TRAINED, RESPONSE_CORRECTED: NUM_TRAINED + 1}
        replacements = np.array([replacement.get(int(i), -1) for i in named], np.int64)
        wanted = replacements[replacements >= 0]
        theirs = EditedData(dataset=self.dataset, num_trained=NUM_TRAINED, named=named, wanted=wanted)
        return theirs, EditProblem(self.dataset, NUM_TRAINED, named, replacements)

    def eraser(self, request: str = "all three", **config) -> Eraser:
        return Eraser(self.theirs, self.edits(request)[0], BaselineConfig(**{"chunk_size": 3, **config}), l2=L2)

    def as_lora(self, vector: Params) -> Lora:
        """A vector of PyTorch's adapter space as one of ours."""
        return to_lora(vector, self.lora)


def load_problem(
    directory: Path,
    case: str,
    adapter: dict[str, Any],
    *,
    wide: bool,
    longest: int = 14,
    reduction: str = "example",
) -> Problem:
    """Writes a model and reads it on both sides, in float64 (under jax.enable_x64) or in float32."""
    base_path, adapter_path = write_model(directory, case, adapter)
    theirs = load_adapted_model(base_path, adapter_path, dtype=torch.float64 if wide else torch.float32)
    model = load_model(base_path)
    lora = load_adapter(adapter_path, model)
    if wide:
        base, lora = jax.tree.map(lambda x: x.astype(jnp.float64), (model.base, lora))
        model = dataclasses.replace(model, base=base)
    return Problem(
        theirs=theirs,
        params=theirs.loaded_params(),
        model=model,
        lora=lora,
        dataset=random_examples(longest, reduction),
    )


def to_lora(vector: Params, like: Lora) -> Lora:
    """PEFT's names to stacked leaves, in the dtype they have."""
    leaves: dict[str, Any] = flatten_dict(like.params, sep="/")  # pyright: ignore[reportAssignmentType]
    for path, leaf in leaves.items():
        _, name, side = path.split("/")
        found = [n for n in vector if f".{name}.lora_{side.upper()}." in n]
        layers = sorted(found, key=lambda n: int(n.split(".layers.")[1].split(".")[0]))
        leaves[path] = jnp.asarray(np.stack([vector[n].numpy() for n in layers]), leaf.dtype)
        assert leaves[path].shape == leaf.shape
    assert sum(leaf.size for leaf in leaves.values()) == sum(t.numel() for t in vector.values())
    return Lora(params=unflatten_dict(leaves, sep="/"), config=like.config)


def random_direction(params: Params, seed: int = 5) -> Params:
    """A standard normal vector of adapter space, in the order of its names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t.dtype) for n, t in params.items()
    }


def relative_difference(got: Any, expected: Any) -> float:
    """`||got - expected|| / ||expected||` over all leaves, in float64."""
    got, expected = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (got, expected)
    )
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
