"""The run directory: an adapter, and everything that a later erasure needs to know about it.

A run directory holds

    run.json            the record: model and its fingerprint, recipe, configurations, versions, training
                        examples by id with the hashes of content and tokens, final losses, the parent run, the
                        receipts since
    adapter/            the adapter, in PEFT's format, and the tokenizer where it is not the base model's
    initial_adapter/    the adapter that training started from; absent where it is not known
    tokenizer/          the tokenizer, where it is not the base model's
    metrics.jsonl       one line per training step; absent where the training was not ours
    train.jsonl         the training examples, where they are the edited ones of an erasure or a retraining, and
    pictures/           their pictures
    features/           what the vision tower makes of pictures, see `models.features`
    hash.key            the key of all hashes of content, see `runs.keys`

`run.json` is written last: a directory without it is no run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llmeraser_jax import data, files
from llmeraser_jax.data import BucketShape, Example, Recipe, TokenDataset
from llmeraser_jax.environment import library_versions
from llmeraser_jax.lora import Lora, LoraConfig, load_adapter, save_adapter
from llmeraser_jax.lora.peft_io import WEIGHTS_FILE
from llmeraser_jax.models import MatmulPrecision, Model, load_model, load_tokenizer
from llmeraser_jax.parallel import mirrored
from llmeraser_jax.runs.keys import KEY_FILE, KEYED, PLAIN, RunKeys
from llmeraser_jax.runs.model_files import (
    base_dtype,
    copy_tokenizer,
    file_sha256,
    model_fingerprint,
    tokenizer_source,
)
from llmeraser_jax.runs.train_config import TrainConfig
from llmeraser_jax.text import one_line, show

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
KINDS = ("finetune", "adopt", "erase", "retrain")
RUN_FILE = "run.json"
ADAPTER_DIRECTORY = "adapter"
INITIAL_ADAPTER_DIRECTORY = "initial_adapter"
TOKENIZER_DIRECTORY = "tokenizer"
EXAMPLES_FILE = "train.jsonl"
FEATURES_DIRECTORY = "features"
CHECKPOINT_DIRECTORY = "checkpoints"
_MAX_LISTED = 10


class RunError(ValueError):
    """A run directory, its data or its model is missing, damaged or changed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory, read and validated. Its arrays, examples and model are loaded on demand.

    Attributes:
        path: the directory.
        kind: "finetune", "adopt", "erase" or "retrain".
        model_path: directory or hub id of the base model.
        model_dtype: the dtype that the base was stored in while it was used.
        model_sha256: fingerprint of the base model, see `model_fingerprint`.
        model_quantization: how its kernels were quantised, one of `convert.QUANTIZATIONS`, or None.
        matmul_precision: the setting for products with its matrices, see `models.precision`.
        recipe: how examples become tokens, resolved.
        normalizer: with reduction "token", the constant that sums over tokens are divided by; else None.
        lora_config: of the adapter.
        train_config: how it was trained.
        unstated: fields of `train_config` that the recipe of an adopted adapter left out: nobody knows them.
        data_path: the training examples; inside the directory where it holds them.
        data_ids: their ids, in order.
        data_hashes: their `content_hash`, in the same order.
        token_hashes: the same of their tokens and loss masks, in the same order, None for an example that cutting
            left without a token under the loss; or None altogether, where they were not recorded.
        knows_initial_adapter: whether `initial_adapter/` is there.
        result: final losses, gradient norms and cost.
        parent: path and `run.json` hash of the run that this one was derived from, or None.
        receipts: of all erasures since the training, earliest first.
        versions: of Python and of the packages that computed it.
        hashes: what the hashes of content are: `keys.KEYED`, or `keys.PLAIN` of old directories.
        keys: of the hashes; None where they are plain, and where `hash.key` was destroyed: then ids are all that
            examples can be checked by.
    """

    path: Path
    kind: str
    model_path: str
    model_dtype: str
    model_sha256: str
    model_quantization: str | None
    matmul_precision: MatmulPrecision
    recipe: Recipe
    normalizer: float | None
    lora_config: LoraConfig
    train_config: TrainConfig
    unstated: tuple[str, ...]
    data_path: Path
    data_ids: tuple[str, ...]
    data_hashes: tuple[str, ...]
    knows_initial_adapter: bool
    result: Mapping[str, Any]
    parent: Mapping[str, str] | None
    receipts: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str | None]
    token_hashes: tuple[str | None, ...] | None = None
    hashes: str = PLAIN
    keys: RunKeys | None = dataclasses.field(default=None, repr=False)

    def load_examples(self, data_path: str | os.PathLike[str] | None = None) -> tuple[Example, ...]:
        """The examples that the adapter was trained on, in the order of training's indices.

        Args:
            data_path: where they are now; None is where they were.

        Raises:
            FileNotFoundError: there is no such file.
            RunError: they are not those that were trained on; missing, additional and changed ids are named.
        """
        path = mirrored(self.data_path if data_path is None else data_path)
        if not path.exists():
            msg = f"{path}: the training data of {self.path} is not there; say where it is now."
            raise FileNotFoundError(msg)
        examples = data.load_examples(path)
        self.verify_examples(examples, source=str(path))
        by_id = {example.id: example for example in examples}
        return tuple(by_id[id_] for id_ in self.data_ids)

    def verify_examples(self, examples: Iterable[Example], *, source: str = "the data given") -> None:
        """Refuses examples that are not those that were trained on; their order does not matter.

        Without the run's key their ids alone are compared, and the log says so.

        Raises:
            RunError: names missing, additional and changed ids.
        """
        then = dict(zip(self.data_ids, self.data_hashes, strict=True))
        if self.can_hash:
            now = {example.id: self.content_hash(example) for example in examples}
        else:
            _log.warning("%s It is not checked that the examples of %s are those.", self._no_key, source)
            now = {example.id: then.get(example.id) for example in examples}
        problems = [
            f"{len(ids)} {what}: {_listed(ids)}"
            for what, ids in (
                ("missing", [id_ for id_ in then if id_ not in now]),
                ("that were not there", [id_ for id_ in now if id_ not in then]),
                ("changed", [id_ for id_ in then if id_ in now and now[id_] != then[id_]]),
            )
            if ids
        ]
        if problems:
            msg = (
                f"{source} is not what {self.path} was trained on ({len(then)} examples). Examples "
                f"{'; '.join(problems)}. Give the data as it was, or train on the data as it is."
            )
            raise RunError(msg)

    @property
    def can_hash(self) -> bool:
        """Whether content can be compared with the run's hashes: they are plain, or their key is there."""
        return self.hashes == PLAIN or self.keys is not None

    def content_hash(self, example: Example) -> str:
        """The hash of an example under this run's key.

        Raises:
            RunError: the key is not there any more.
        """
        return self._keyed(RunKeys.example, data.content_hash(example))

    def shown_hash(self, example: Example) -> str:
        """The hash of a held-out example, as receipts have it.

        Raises:
            RunError: the key is not there any more.
        """
        return self._keyed(RunKeys.shown, data.content_hash(example))

    def _keyed(self, hash_of: Callable[[RunKeys, str], str], sha256: str) -> str:
        if self.hashes == PLAIN:
            return sha256
        if self.keys is None:
            msg = f"{self._no_key} Content cannot be compared with what it records; put the key back."
            raise RunError(msg)
        return hash_of(self.keys, sha256)

    @property
    def _no_key(self) -> str:
        return f"{self.path / KEY_FILE}, the key of this run's hashes, is not there."

    def load_unseen(self, path: str | os.PathLike[str]) -> tuple[Example, ...]:
        """Held-out examples, without those whose content this run was trained on: they are not unseen.

        Raises:
            RunError: all of them were trained on, or the run's key is not there to tell.
        """
        examples = data.load_examples(mirrored(path))
        known = frozenset(self.data_hashes)
        unseen = tuple(example for example in examples if self.content_hash(example) not in known)
        if not unseen:
            msg = f"{path}: {self.path} was trained on all its {len(examples)} examples; give some that it was not."
            raise RunError(msg)
        if len(unseen) < len(examples):
            dropped = [example.id for example in examples if self.content_hash(example) in known]
            _log.warning(
                "%s: %d of its %d examples were trained on (%s) and are left out.",
                path,
                len(dropped),
                len(examples),
                _listed(dropped),
            )
        return unseen

    def encode(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        *,
        buckets: Sequence[BucketShape] | None = None,
    ) -> TokenDataset:
        """Examples as this run's training saw them: its recipe, and its normaliser of sums over tokens.

        Args:
            examples: any, such as the edited or the held-out ones.
            tokenizer: the model's; ignored where the run has its own.
            buckets: shapes to share with another data set.

        Raises:
            RunError: an example that was trained on does not become the tokens that it was.
        """
        if self.tokenizer is not None:
            if (places := data.places_of(tokenizer)) is not None:
                self.tokenizer.picture_places = places  # the model's, which makes features
            tokenizer = self.tokenizer
        dataset = data.encode_examples(
            examples,
            self.recipe,
            tokenizer,
            buckets=buckets,
            normalizer=self.normalizer,
            features_directory=self.path / FEATURES_DIRECTORY,
        )
        self._verify_tokens(examples, dataset)
        return dataset

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The run's own tokenizer; None where it is the base model's."""
        directory = self.path / TOKENIZER_DIRECTORY
        return load_tokenizer(directory) if directory.is_dir() else None

    def _verify_tokens(self, examples: Sequence[Example], dataset: TokenDataset) -> None:
        """Refuses trained examples whose tokens or loss masks are not those of the training."""
        if not self.can_hash:
            _log.warning("%s It is not checked that the examples become the tokens of the training.", self._no_key)
            return
        then = dict(zip(self.data_ids, zip(self.data_hashes, self._token_hashes, strict=True), strict=True))
        known = [e for e in examples if e.id in then and then[e.id][0] == self.content_hash(e)]
        if self.token_hashes is None:
            if known:
                _log.warning(
                    "%s records no token hashes: it is not checked that the examples become the tokens that it was "
                    "trained on.",
                    self.path,
                )
            return
        now = {id_: self._keyed(RunKeys.tokens, sha256) for id_, sha256 in dataset.token_sha256.items()}
        differing = [e.id for e in known if now.get(e.id) != then[e.id][1]]
        if differing:
            version, version_now = (v.get("transformers") for v in (self.versions, library_versions()))
            msg = (
                f"{len(differing)} of {len(known)} examples do not become the tokens that {self.path} was trained "
                f"on: {_listed(differing)}. Tokenizer, chat template or date is another, or transformers is "
                f"({version} then, {version_now} now). Give the run what it was trained with; `llmeraser preview` "
                "shows the tokens."
            )
            raise RunError(msg)

    @property
    def _token_hashes(self) -> Sequence[str | None]:
        return (None,) * len(self.data_ids) if self.token_hashes is None else self.token_hashes

    def with_model_at(self, path: str | None) -> Run:
        """The run with its base model at another place, whose files are compared on loading; None leaves it."""
        return self if path is None else dataclasses.replace(self, model_path=path)

    def load_model(self, *, dtype: str | None = None, mesh: Mesh | None = None) -> Model:
        """The base model, after comparing its files with those that were used.

        Args:
            dtype: None is the dtype it had.
            mesh: devices to shard it over.

        Raises:
            RunError: the files are not there, or have changed.
        """
        self._verify_fingerprint(self.model_path)
        model = load_model(
            self.model_path,
            dtype=dtype or self.model_dtype,
            mesh=mesh,
            quantization=self.model_quantization,
            matmul_precision=self.matmul_precision,
        )
        return model if self.tokenizer is None else dataclasses.replace(model, tokenizer=self.tokenizer)

    def load_or_verify_model(self, model: Model | None, *, mesh: Mesh | None = None) -> Model:
        """The base model: the one given, if it is the one that was used, or else loaded; see `load_model`.

        Raises:
            RunError: see `load_model` and `verify_model`.
        """
        if model is None:
            return self.load_model(mesh=mesh)
        self.verify_model(model)
        return model

    def verify_model(self, model: Model) -> None:
        """Refuses a loaded base model that is not the one that was used.

        Raises:
            RunError: its files, its dtype or its quantisation differ.
        """
        self._verify_fingerprint(model.path)
        if base_dtype(model) != self.model_dtype:
            msg = f"The base model is in {base_dtype(model)}; {self.path} was trained in {self.model_dtype}."
            raise RunError(msg)
        if model.quantization != self.model_quantization:
            msg = (
                f"The base model's quantisation is {model.quantization}; {self.path} was trained with "
                f"{self.model_quantization}."
            )
            raise RunError(msg)
        if self.tokenizer is not None and tokenizer_source(model) is None:
            msg = (
                f"{self.path} has a tokenizer of its own, and the model given has the base's; use run.load_model()."
            )
            raise RunError(msg)

    def _verify_fingerprint(self, model_path: str) -> None:
        try:
            found = model_fingerprint(model_path)
        except FileNotFoundError as error:
            msg = f"{error} {self.path} was trained on it; name where it is now (--model)."
            raise RunError(msg) from error
        if found != self.model_sha256:
            msg = (
                f"The base model at {model_path} is not the one that {self.path} was trained on: its "
                f"fingerprint is {found[:16]}, expected {self.model_sha256[:16]}."
            )
            raise RunError(msg)

    def load_adapter(self, model: Model) -> Lora:
        """The adapter of this run."""
        return load_adapter(self.path / ADAPTER_DIRECTORY, model)

    def load_initial_adapter(self, model: Model) -> Lora | None:
        """The adapter that training started from, or None where it is not known."""
        if not self.knows_initial_adapter:
            return None
        return load_adapter(self.path / INITIAL_ADAPTER_DIRECTORY, model)

    @property
    def adapter_sha256(self) -> str:
        """SHA-256 (hex) of the file with the adapter's weights."""
        return file_sha256(self.path / ADAPTER_DIRECTORY / WEIGHTS_FILE)

    def load_parent(self) -> Run:
        """The run that this one was derived from, as it was then.

        Raises:
            FileNotFoundError: it is not where it was.
            RunError: there is none, or it is damaged or has changed.
        """
        if self.parent is None:
            msg = f"{self.path} was derived from no other run."
            raise RunError(msg)
        parent = load_run(self.parent["path"])
        if parent.reference()["sha256"] != self.parent["sha256"]:
            msg = f"{parent.path} is not the run that {self.path} was derived from: its {RUN_FILE} has changed."
            raise RunError(msg)
        return parent

    def reference(self) -> dict[str, str]:
        """The `parent` entry of a run derived from this one."""
        return {"path": str(self.path.resolve()), "sha256": file_sha256(self.path / RUN_FILE)}

    def settings(self) -> dict[str, Any]:
        """Everything that determines the adapter; runs with equal settings are the same run."""
        return run_settings(
            kind=self.kind,
            model_sha256=self.model_sha256,
            model_dtype=self.model_dtype,
            model_quantization=self.model_quantization,
            matmul_precision=self.matmul_precision,
            recipe=self.recipe,
            lora_config=self.lora_config,
            train_config=self.train_config,
            data_ids=self.data_ids,
            data_hashes=self.data_hashes,
            parent=self.parent,
        )


def run_settings(
    *,
    kind: str,
    model_sha256: str,
    model_dtype: str,
    model_quantization: str | None,
    matmul_precision: str,
    recipe: Recipe,
    lora_config: LoraConfig,
    train_config: TrainConfig,
    data_ids: Sequence[str],
    data_hashes: Sequence[str],
    parent: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Names and values of all that determines a trained adapter, one level deep, for comparing runs."""
    examples = hashlib.sha256("\n".join(map(repr, zip(data_ids, data_hashes, strict=True))).encode())
    flat = {
        **recipe.to_mapping(),
        **{f"lora.{k}": v for k, v in dataclasses.asdict(lora_config).items()},
        **train_config.to_mapping(),
        "kind": kind,
        "model_sha256": model_sha256,
        "model_dtype": model_dtype,
        "model_quantization": model_quantization,
        "matmul_precision": matmul_precision,
        "training data": examples.hexdigest(),
        "parent": None if parent is None else parent["sha256"],
    }
    # How often a checkpoint is written changes nothing in the result.
    return {k: v for k, v in flat.items() if k != "checkpoint_every_steps"}


def differing_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The differences between two settings, in words; empty when they are equal."""
    return [
        f"{key} ({found.get(key)!r} there, {wanted.get(key)!r} now)"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def write_run(
    path: str | os.PathLike[str],
    *,
    kind: str,
    model: Model,
    recipe: Recipe,
    normalizer: float | None,
    train_config: TrainConfig,
    examples: Sequence[Example],
    data_path: str | os.PathLike[str] | None,
    lora: Lora,
    initial_lora: Lora | None,
    result: Mapping[str, Any],
    unstated: Sequence[str] = (),
    parent: Mapping[str, str] | None = None,
    receipts: Sequence[Mapping[str, Any]] = (),
    dataset: TokenDataset | None = None,
    keys: RunKeys | None = None,
    also: Sequence[str] = (),
) -> Run:
    """Writes everything of a run directory but `metrics.jsonl`.

    The directory may hold other files. What an interrupted call left of the parts named here is replaced.

    Args:
        path: the directory; it must not be a finished run.
        kind: one of `KINDS`.
        model: the base model.
        recipe: resolved.
        normalizer: `TokenDataset.normalizer` of the training set.
        train_config: how the adapter was trained.
        examples: the training examples, in order.
        data_path: the file they are in; None writes them to `train.jsonl` inside the directory.
        lora: the adapter.
        initial_lora: the adapter that training started from, or None where it is not known.
        result: JSON-like; final losses, gradient norms, cost.
        unstated: fields of `train_config` that are not known.
        parent: `Run.reference` of the run that this one was derived from.
        receipts: of all erasures since the training, earliest first.
        dataset: `examples`, encoded; None encodes them here, for the hashes of their tokens.
        keys: of the hashes; None draws new ones.
        also: names of other files and directories in `path` whose hashes are recorded.

    Returns:
        The run as `load_run` reads it back.

    Raises:
        FileExistsError: `path` is a finished run.
        ValueError: unknown kind, or a recipe that is not resolved.
    """
    path = Path(path)
    if kind not in KINDS:
        msg = f"kind is {kind!r}; it must be one of {', '.join(KINDS)}."
        raise ValueError(msg)
    if not recipe.is_resolved:
        msg = "The recipe is not resolved; pass TokenDataset.recipe."
        raise ValueError(msg)
    if (path / RUN_FILE).exists():
        msg = f"{path} is a finished run; name another directory."
        raise FileExistsError(msg)
    if dataset is None:
        dataset = data.encode_examples(examples, recipe, model.tokenizer, normalizer=normalizer)
    path.mkdir(parents=True, exist_ok=True)
    keys = RunKeys.new() if keys is None else keys
    keys.save(path)
    shutil.rmtree(path / TOKENIZER_DIRECTORY, ignore_errors=True)
    for name, adapter in ((ADAPTER_DIRECTORY, lora), (INITIAL_ADAPTER_DIRECTORY, initial_lora)):
        shutil.rmtree(path / name, ignore_errors=True)
        if adapter is not None:
            save_adapter(path / name, adapter, model)
    source = tokenizer_source(model)
    if source is not None:
        copy_tokenizer(source, path / TOKENIZER_DIRECTORY)
        copy_tokenizer(source, path / ADAPTER_DIRECTORY)  # servers look for it beside the adapter
    if data_path is None:
        data.save_examples(path / EXAMPLES_FILE, examples)
    recorded = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "model": {
            "path": _absolute_if_local(model.path),
            "dtype": base_dtype(model),
            "sha256": model_fingerprint(model.path),
            "quantization": model.quantization,
            "matmul_precision": model.config.matmul_precision,
        },
        "recipe": recipe.to_mapping(),
        "normalizer": normalizer,
        "lora": dataclasses.asdict(lora.config),
        "train": train_config.to_mapping(),
        "unstated": list(unstated),
        "seed": None if "seed" in unstated else train_config.seed,
        "initial_adapter_known": initial_lora is not None,
        "result": dict(result),
        "parent": None if parent is None else dict(parent),
        "receipts": [dict(receipt) for receipt in receipts],
        "versions": library_versions(),
        "data": {
            "path": EXAMPLES_FILE if data_path is None else str(Path(data_path).resolve()),
            "ids": [example.id for example in examples],
            "hashes": KEYED,
            "key_check": keys.check,
            "content": [keys.example(data.content_hash(example)) for example in examples],
            "tokens": [h and keys.tokens(h) for h in (dataset.token_sha256.get(e.id) for e in examples)],
        },
        "files": recorded_files(path, keys, also),
    }
    recorded = json.loads(files.to_json(recorded))
    files.atomic_write_json(path / RUN_FILE, {**recorded, "mac": keys.mac(recorded)})
    return load_run(path)


def recorded_files(path: Path, keys: RunKeys, also: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Hashes of a run directory's files: SHA-256 of those in directories (parameters), keyed ones of texts.

    Args:
        path: the run directory.
        keys: its keys.
        also: files and directories in it besides the adapters, the tokenizer and the examples.
    """
    plain, keyed = {}, {}
    for name in (ADAPTER_DIRECTORY, INITIAL_ADAPTER_DIRECTORY, TOKENIZER_DIRECTORY, EXAMPLES_FILE, *also):
        if (path / name).is_file():
            keyed[name] = keys.file(path / name)
        for part in sorted(p for p in (path / name).rglob("*") if p.is_file()):
            plain[part.relative_to(path).as_posix()] = file_sha256(part)
    return {PLAIN: plain, KEYED: keyed}


def load_run(path: str | os.PathLike[str]) -> Run:
    """Reads and validates `run.json`; loads no arrays.

    Of several processes each has to call this; those without the directory read a copy, see `parallel.hosts`.

    Args:
        path: the run directory.

    Raises:
        RunError: no run, an unfinished one, one of another format version, or a damaged one.
    """
    path = mirrored(path, but=(CHECKPOINT_DIRECTORY,))
    with files.reading(path, RunError):
        return _load_run(path)


def _load_run(path: Path) -> Run:
    if not (path / RUN_FILE).is_file():
        state = "holds an unfinished training" if (path / "training.json").exists() else "is not a run directory"
        msg = f"{path} {state}: there is no {RUN_FILE}."
        raise RunError(msg)
    recorded = files.read_json(path / RUN_FILE)
    version = recorded.get("format_version") if isinstance(recorded, dict) else None
    if version != FORMAT_VERSION:
        msg = f"{path / RUN_FILE} has format_version {show(version)}; this package reads {FORMAT_VERSION}."
        raise RunError(msg)
    try:
        run = _from_recorded(path, recorded)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        msg = f"{path / RUN_FILE} is damaged: {type(error).__name__}: {one_line(error, 400)}."
        raise RunError(msg) from error
    if run.kind not in KINDS or not len(run.data_ids) == len(run.data_hashes) == len(run._token_hashes):
        msg = f"{path / RUN_FILE} is damaged: kind {show(run.kind)}, {len(run.data_ids)} ids."
        raise RunError(msg)
    expected = [ADAPTER_DIRECTORY] + [INITIAL_ADAPTER_DIRECTORY] * run.knows_initial_adapter
    missing = [name for name in expected if not (path / name).is_dir()]
    if missing:
        msg = f"{path} is damaged: {' and '.join(missing)} is missing."
        raise RunError(msg)
    return run


def _keys_of(path: Path, recorded: Mapping[str, Any]) -> RunKeys | None:
    """The keys of a run; what is missing is said."""
    if "hashes" not in recorded["data"]:
        _log.warning(
            "%s holds plain SHA-256 of its examples, from which whoever reads it can guess short ones; what is "
            "derived from it has keyed hashes.",
            path / RUN_FILE,
        )
        return None
    keys = RunKeys.load(path)
    if keys is None:
        _log.warning("%s is not there: %s can be loaded, and no data be checked against it.", path / KEY_FILE, path)
    elif keys.check != recorded["data"]["key_check"]:
        msg = f"{KEY_FILE} is not the key that its hashes were made with; put that back, or remove this one"
        raise ValueError(msg)
    return keys


def _from_recorded(path: Path, recorded: Mapping[str, Any]) -> Run:
    held = recorded["data"]
    keyed = "hashes" in held
    token_hashes = held.get("tokens" if keyed else "token_sha256")
    return Run(
        path=path,
        kind=recorded["kind"],
        model_path=recorded["model"]["path"],
        model_dtype=recorded["model"]["dtype"],
        model_sha256=recorded["model"]["sha256"],
        model_quantization=recorded["model"].get("quantization"),
        matmul_precision=recorded["model"].get("matmul_precision", "auto"),
        recipe=_read_recipe(recorded["recipe"]),
        normalizer=recorded["normalizer"],
        lora_config=LoraConfig.from_mapping(recorded["lora"]),
        train_config=TrainConfig.from_mapping(recorded["train"]),
        unstated=tuple(recorded["unstated"]),
        data_path=path / held["path"],  # an absolute path stays as it is
        data_ids=tuple(held["ids"]),
        data_hashes=tuple(held["content" if keyed else "sha256"]),
        knows_initial_adapter=recorded["initial_adapter_known"],
        result=recorded["result"],
        parent=recorded["parent"],
        receipts=tuple(recorded["receipts"]),
        versions=recorded["versions"],
        token_hashes=None if token_hashes is None else tuple(token_hashes),
        hashes=held["hashes"] if keyed else PLAIN,
        keys=_keys_of(path, recorded),
    )


def _read_recipe(recorded: Mapping[str, Any]) -> Recipe:
    """The recipe of a run; without the key `truncate` it is of a time when only prompts were cut."""
    if "truncate" not in recorded:
        recorded = {**recorded, "truncate": "prompt"}
        if recorded["template"] == "chat":
            recorded["tokenization"] = "joint"
    return Recipe.from_mapping(recorded)


def _listed(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(id_) for id_ in ids[:_MAX_LISTED])
    return shown + (f" and {len(ids) - _MAX_LISTED} more" if len(ids) > _MAX_LISTED else "")


def _absolute_if_local(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).is_dir() else path
