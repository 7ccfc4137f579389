"""Owns the merged model: base plus adapter in Hugging Face's layout, for servers that load no adapters.

Weights are merged in float32 from the base as the run had it, its quantised kernels dequantised, and rounded once.
Rounding can take back what erasing changed, so the losses of the examples are measured on the weights as they are
read back, before the directory gets its name.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from llmeraser_jax import convert, data, files, losses
from llmeraser_jax.convert import check_quantization, dequantized, quantize
from llmeraser_jax.data import Example
from llmeraser_jax.lora import COPIES, Lora, with_copies
from llmeraser_jax.models import Model, load_model
from llmeraser_jax.models.loading import checkpoint_shapes
from llmeraser_jax.runs import Run, RunError, copy_tokenizer, model_directory
from llmeraser_jax.training.measure import mean_loss
from llmeraser_jax.unlearning.job import REQUESTS_FILE

_log = logging.getLogger(__name__)

EXPORT_FILE = "llmeraser_export.json"
DTYPES = ("bfloat16", "float32", "float16")
SHARD_BYTES = 5_000_000_000
_BATCH_SIZE = 8
_SAMPLE_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupLosses:
    """Mean losses of some examples, in nats per token under the loss.

    Attributes:
        num_examples: how many.
        before: of the adapter that was erased from; None where the run is no erasure.
        adapter: of base and adapter, as the run has them.
        exported: of the merged weights as read back.
    """

    num_examples: int
    before: float | None
    adapter: float
    exported: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how much of the erasure survives its rounding.

    Attributes:
        path: the directory.
        dtype: of the weights, those aside that are quantised.
        quantization: one of `quantization.QUANTIZATIONS`, or None.
        num_files: files with weights.
        num_bytes: of the weights.
        forget: the examples named by the erasure's requests, as they were before it; None where the run is no
            erasure, or where their texts are gone.
        replacements: the edited examples of these requests; None where there are none.
        retained: a sample of the training examples that are still trained on.
        not_measured: why `forget` is missing though the run is an erasure; empty otherwise.
    """

    path: Path
    dtype: str
    quantization: str | None
    num_files: int
    num_bytes: int
    forget: GroupLosses | None
    replacements: GroupLosses | None
    retained: GroupLosses
    not_measured: str = ""

    @property
    def survival(self) -> float | None:
        """Share of the forget rows' change of loss that is left after rounding; None where nothing changed."""
        if self.forget is None or self.forget.before is None or self.forget.adapter == self.forget.before:
            return None
        return (self.forget.exported - self.forget.before) / (self.forget.adapter - self.forget.before)

    def to_mapping(self) -> dict[str, Any]:
        """JSON-like, without ids and texts of examples."""
        fields = dataclasses.asdict(self)
        del fields["path"]
        return {**fields, "survival": self.survival}


def export_run(
    run: Run,
    directory: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    data_path: str | os.PathLike[str] | None = None,
    num_retained: int = 64,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes base and adapter of a run as one model, and measures it as it is read back.

    Configuration, generation configuration and tokenizer are copied from the base, the tokenizer from the run where
    it has its own.

    Args:
        run: of any kind; with an erasure the forget rows are measured too.
        directory: new or empty; written whole or not at all.
        dtype: one of `DTYPES`.
        quantization: store the layers' kernels as bitsandbytes does, one of `quantization.QUANTIZATIONS`.
        data_path: where the training data is now, of an erasure that of its parent; None is where it was.
        num_retained: how many of the retained rows to measure, drawn by a fixed seed.
        shard_bytes: weights per file at most; more of them get an index.

    Raises:
        ValueError: an unknown dtype or quantisation, weights that `dtype` cannot hold, or unusable data.
        FileExistsError: `directory` holds something.
        RunError: model or data is not the run's.
    """
    if dtype not in DTYPES:
        msg = f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}."
        raise ValueError(msg)
    if quantization is not None:
        check_quantization(quantization)
    files.require_empty(directory)
    forget, replacements, before, reason = edited_rows(run, data_path)
    if reason:
        _log.warning("The forget rows are not measured: %s", reason)
    named = {example.id for example in (*forget, *replacements)}
    examples = run.load_examples(data_path if run.kind != "erase" else None)
    kept = [example for example in examples if example.id not in named] or list(examples)
    order = np.random.RandomState(_SAMPLE_SEED).permutation(len(kept))[:num_retained]
    groups = {"forget": forget, "replacements": replacements, "retained": tuple(kept[k] for k in sorted(order))}
    groups = {name: rows for name, rows in groups.items() if rows}

    model = run.load_model()
    measured: dict[str, dict[str, float]] = {}
    if before is not None:
        measured["before"] = _losses(run, model, before.load_adapter(model), groups)
    lora = run.load_adapter(model)
    measured["adapter"] = _losses(run, model, lora, groups)
    with files.atomic_directory(directory) as temporary:
        num_files, num_bytes = write_merged(
            temporary, model, lora, dtype=dtype, quantization=quantization, shard_bytes=shard_bytes
        )
        source = run.path / "tokenizer"
        copy_tokenizer(source if source.is_dir() else model_directory(run.model_path), temporary)
        del model, lora  # two models need not be in memory at once
        again = load_model(temporary, dtype=dtype, matmul_precision=run.matmul_precision)
        measured["exported"] = _losses(run, again, None, groups)
        results = {
            name: GroupLosses(
                num_examples=len(rows),
                before=measured["before"][name] if "before" in measured else None,
                adapter=measured["adapter"][name],
                exported=measured["exported"][name],
            )
            for name, rows in groups.items()
        }
        exported = Exported(
            path=Path(directory),
            dtype=dtype,
            quantization=quantization,
            num_files=num_files,
            num_bytes=num_bytes,
            forget=results.get("forget"),
            replacements=results.get("replacements"),
            retained=results["retained"],
            not_measured=reason,
        )
        content = {**exported.to_mapping(), "run_sha256": run.reference()["sha256"]}
        files.atomic_write_json(temporary / EXPORT_FILE, content)
    return exported


def edited_rows(
    run: Run, data_path: str | os.PathLike[str] | None
) -> tuple[tuple[Example, ...], tuple[Example, ...], Run | None, str]:
    """Of an erasure: the rows it names as they were, what replaced them, the run before it, and what is missing."""
    if run.kind != "erase" or run.parent is None:
        return (), (), None, ""
    try:
        parent = run.load_parent()
        examples = parent.load_examples(data_path)
        requests = data.load_requests(run.path / REQUESTS_FILE, examples)
    except (FileNotFoundError, RunError) as error:
        if data_path is not None:
            raise
        return (), (), None, str(error)
    named = {request.id for request in requests}
    edited = {example.id: example for example in data.apply_requests(examples, requests)}
    forget = tuple(example for example in examples if example.id in named)
    return forget, tuple(edited[e.id] for e in forget if e.id in edited), parent, ""


def _losses(run: Run, model: Model, lora: Lora | None, groups: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    """Mean loss of each group; without an adapter, of the model alone."""
    objective = losses.lm_objective(model.apply, model.base, l2=0.0)
    found = {}
    for name, rows in groups.items():
        dataset = run.encode(rows, model.tokenizer)
        if len(dataset):
            found[name] = mean_loss(objective, lora, dataset, batch_size=_BATCH_SIZE)
        else:
            msg = f"Cutting left no token under the loss of any of the {len(rows)} {name} rows to measure."
            raise ValueError(msg)
    return found


def write_merged(
    directory: Path,
    model: Model,
    lora: Lora,
    *,
    dtype: str,
    quantization: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[int, int]:
    """Writes config.json, generation_config.json and the merged weights into an existing directory.

    Args:
        directory: where.
        model: the base, read from files.
        lora: the adapter.
        dtype: one of `DTYPES`.
        quantization: one of `quantization.QUANTIZATIONS`, or None.
        shard_bytes: weights per file at most.

    Returns:
        Number of files with weights, and of bytes in them.

    Raises:
        ValueError: weights that `dtype` cannot hold, or quantisation of a model that sees pictures.
    """
    if quantization is not None and model.config.vision is not None:
        msg = f"quantization is {quantization!r}; a LLaVA model is exported unquantised only, so leave it out."
        raise ValueError(msg)
    source = model_directory(model.path)
    config = files.read_json(source / "config.json")
    config.pop("quantization_config", None)
    model = dataclasses.replace(model, base=with_copies(model.base, lora.params.get(COPIES, {})))
    if COPIES in lora.params:  # a tied head was trained by itself; tokens were added
        tied, rows = "lm_head" not in model.base, len(model.base["embed_tokens"]["embedding"])
        now = dataclasses.replace(model.config, tied_embeddings=tied, vocab_size=rows)
        model = dataclasses.replace(model, config=now)
        config |= {"tie_word_embeddings": tied, "vocab_size": rows}
    for name in [name for name in ("torch_dtype", "dtype") if name in config] or ["dtype"]:
        config[name] = dtype
    if quantization is not None:
        config["quantization_config"] = convert.quantization_config(quantization, dtype)
    files.atomic_write_json(directory / "config.json", config)
    generation = source / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, directory / generation.name)

    shards: list[dict[str, np.ndarray]] = [{}]
    names: list[list[str]] = []
    total = size = 0

    def flush() -> None:
        convert.write_safetensors(directory / f"part-{len(names)}", shards[-1])
        names.append(list(shards.pop()))
        shards.append({})

    for tensors in _merged_tensors(model, lora, dtype, quantization):
        here = sum(tensor.nbytes for tensor in tensors.values())
        if shards[-1] and size + here > shard_bytes:
            flush()
            size = 0
        shards[-1].update(tensors)
        size, total = size + here, total + here
    flush()
    finals = [f"model-{k + 1:05d}-of-{len(names):05d}.safetensors" for k in range(len(names))]
    if len(names) == 1:
        finals = ["model.safetensors"]
    for k, final in enumerate(finals):
        os.rename(directory / f"part-{k}", directory / final)
    if len(names) > 1:
        weight_map = {name: final for final, part in zip(finals, names, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files.atomic_write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return len(names), total


def _merged_tensors(
    model: Model, lora: Lora, dtype: str, quantization: str | None
) -> Iterator[dict[str, np.ndarray]]:
    """Weight by weight what goes to disk: one tensor, or the parts of a quantised one."""
    tower = {} if model.vision is None else {"vision": model.vision}
    leaves: dict[str, Any] = flatten_dict({**model.base, **tower}, sep="/")
    numpy_dtype = convert.numpy_dtype(dtype)
    quantized = jax.jit(quantize, static_argnums=1)
    for name, target, _ in convert.base_table(model.config).entries(checkpoint_shapes(model.config)):
        parts = target.path.split("/")
        is_kernel = parts[0] == "layers" and parts[-1] == "kernel"
        leaf = jax.tree.map(lambda x, place=target.place: np.asarray(x[place]), leaves[target.path])
        weight = np.asarray(dequantized(leaf), np.float32)
        adapter = lora.params.get(parts[0], {}).get(parts[1]) if parts[-1] == "kernel" else None
        if adapter is not None:
            place = target.place or (0,)  # the projector's is not stacked
            a, b = lora.config.scaled_rows(parts[1], adapter["a"])[place], adapter["b"][place]
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            weight = weight + lora.config.scaling * (b @ a).T
        with np.errstate(over="ignore"):
            rounded = weight.astype(numpy_dtype)
        if not np.all(np.isfinite(rounded.astype(np.float32))):
            msg = f"{name} reaches {np.max(np.abs(weight)):.3g}, which {dtype} cannot hold; export another dtype."
            raise ValueError(msg)
        if quantization is not None and is_kernel:
            yield convert.quantized_tensors(name, jax.device_get(quantized(rounded, quantization)))
        else:
            yield {name: np.ascontiguousarray(target.transform.to_disk(rounded))}
