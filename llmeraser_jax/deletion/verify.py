"""Checks of a run directory against its own record: every hash, the chain of receipts, the data, the seal.

The record says what belongs together, and a key in the same directory stands for it: that shows accidents,
exchanged files and edits by whoever does not compute the hashes anew. Somebody who has the key can; against them
there is the signature of a certificate, whose key lies elsewhere.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmeraser_jax import convert, data, files
from llmeraser_jax.deletion.findings import Finding
from llmeraser_jax.deletion.seal import (
    MARKER_FILE,
    SEAL_FILE,
    restoring_roots,
    sealed_state,
    unknown_entries,
)
from llmeraser_jax.lora.peft_io import CONFIG_FILE, EXTRAS_FILE, WEIGHTS_FILE
from llmeraser_jax.runs import (
    ADAPTER_DIRECTORY,
    EXAMPLES_FILE,
    KEY_FILE,
    KEYED,
    PLAIN,
    RUN_FILE,
    RunKeys,
    file_sha256,
)
from llmeraser_jax.training.finetune import CHECKPOINT_DIRECTORY
from llmeraser_jax.unlearning.job import PARENT_ADAPTER_DIRECTORY, RECEIPT_FILE, REQUESTS_FILE

_MAX_LISTED = 5
_NORM_RTOL = 1e-4  # of norms that were summed in float32


class _Directory:
    """A run directory as its files say, whatever is wrong with them."""

    def __init__(self, path: Path):
        self.path = path
        self.record: Mapping[str, Any] = files.read_json(path / RUN_FILE)
        self.kind: str = self.record["kind"]
        self.receipts: Sequence[Mapping[str, Any]] = self.record["receipts"]
        self.parent: Mapping[str, str] | None = self.record["parent"]
        self.held: Mapping[str, Any] = self.record["data"]
        self.files: Mapping[str, Mapping[str, str]] | None = self.record.get("files")
        self.is_keyed = "hashes" in self.held
        self.data_path = path / self.held["path"]
        self.receipt: Mapping[str, Any] | None = _read_or_none(path / RECEIPT_FILE)
        self.key, self.keys = self._read_keys()
        sealed = _read_or_none(path / SEAL_FILE)
        self.removed = {} if sealed is None else {entry["name"]: entry for entry in sealed["removed"]}

    def _read_keys(self) -> tuple[Finding, RunKeys | None]:
        path = self.path / KEY_FILE
        if not self.is_keyed:
            words = f"{RUN_FILE} holds plain SHA-256 of rows, from which short ones can be guessed"
            return Finding("key", self.kind != "erase", words), None
        try:
            keys = RunKeys.load(self.path)
        except ValueError as error:
            return Finding("key", False, str(error)), None
        if keys is None:
            return Finding("key", False, f"{KEY_FILE} is not there: no content can be checked"), None
        if keys.check != self.held["key_check"]:
            return Finding("key", False, f"{KEY_FILE} is not the key that the hashes were made with"), None
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            return Finding("key", False, f"{KEY_FILE} can be read by others (mode {mode:o}); chmod 600 it"), keys
        return Finding("key", True, f"{KEY_FILE} is the key of all hashes"), keys

    def hash_of(self, example: data.Example) -> str | None:
        """The hash of a row as this directory has it; None without the key."""
        sha256 = data.content_hash(example)
        if not self.is_keyed:
            return sha256
        return None if self.keys is None else self.keys.example(sha256)

    @property
    def content(self) -> dict[str, str]:
        """The recorded hash of each row, by id."""
        return dict(zip(self.held["ids"], self.held["content" if self.is_keyed else "sha256"], strict=True))

    @property
    def erased(self) -> dict[str, str]:
        """The hash of each row that was removed or changed, as it was before, by id."""
        named = () if self.receipt is None else self.receipt["named"]
        return {one["id"]: one["hash_before"] for one in named if one["hash_before"] is not None}


def _read_or_none(path: Path) -> Any:
    """What a JSON file holds; None where it is missing or holds none."""
    try:
        return files.read_json(path)
    except (FileNotFoundError, ValueError):
        return None


def verify_directory(
    path: str | os.PathLike[str], data_path: str | os.PathLike[str] | None = None
) -> list[Finding]:
    """Checks everything that a run directory records.

    Args:
        path: made by `finetune`, `adopt`, `erase` or `retrain`.
        data_path: more data, such as the file that trainings read, in which no erased row may be.

    Returns:
        One finding per check; all `ok` where nothing is wrong.
    """
    path = Path(path).resolve()
    try:
        directory = _Directory(path)
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        return [Finding(RUN_FILE, False, f"cannot be read: {type(error).__name__}: {error}")]
    checks = {
        RUN_FILE: _check_record(directory),
        "files": _check_files(directory),
        "adapter as described": _check_adapter(directory),
        RECEIPT_FILE: _check_receipt(directory),
        "requests as described": _check_requests(directory),
        "chain of receipts": _check_chain(directory),
        "parents": _check_parents(directory),
        "training data": _check_data(directory),
        "checkpoints": _check_checkpoints(directory),
        "other data": () if data_path is None else _check_other_data(directory, Path(data_path)),
        "seal": _check_seal(directory),
    }
    return [directory.key, *(finding for name, check in checks.items() for finding in _whole(name, check))]


def _whole(name: str, check: Iterable[Finding]) -> Iterator[Finding]:
    """The findings of a check; that it cannot be made, since something is not what it reads, is one too."""
    try:
        yield from check
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        yield Finding(name, False, f"cannot be checked: {type(error).__name__}: {error}")


def _check_record(directory: _Directory) -> Iterator[Finding]:
    mac = directory.record.get("mac")
    if mac is None:
        yield Finding(RUN_FILE, not directory.is_keyed, "has no code of its own to check it by")
    elif directory.keys is None:
        yield Finding(RUN_FILE, False, "cannot be checked without the key")
    elif directory.keys.mac(directory.record) != mac:
        yield Finding(RUN_FILE, False, "was edited: it does not give the code at its end")
    else:
        yield Finding(RUN_FILE, True, "is as it was written")


def _check_files(directory: _Directory) -> Iterator[Finding]:
    """Each directory of parameters and each file of texts."""
    if directory.files is None:
        yield Finding("files", False, f"{RUN_FILE} is of an older version and has no hashes of the adapter's files")
        return
    groups: dict[str, list[str]] = {}
    for name, expected in directory.files[PLAIN].items():
        if name in directory.removed:
            continue  # the seal's check says whether it is back
        problems = groups.setdefault(name.split("/")[0], [])
        if not (directory.path / name).is_file():
            problems.append(f"{name} is missing")
        elif (found := file_sha256(directory.path / name)) != expected:
            problems.append(f"{name} {_what_it_is(directory, name, found)}")
    for name, expected in directory.files[KEYED].items():
        problems = groups.setdefault(name, [])
        if not (directory.path / name).is_file():
            problems.append(f"{name} is missing")
        elif directory.keys is None:
            problems.append("cannot be checked without the key")
        elif directory.keys.file(directory.path / name) != expected:
            problems.append("was edited")
    for group, problems in groups.items():
        yield Finding(group, not problems, "; ".join(problems) or "every file is as it was written")


def _what_it_is(directory: _Directory, name: str, found: str) -> str:
    """In words, what stands in the place of a recorded file."""
    assert directory.files is not None
    others = [n for n, sha256 in directory.files[PLAIN].items() if sha256 == found and n != name]
    return f"is {others[0]}" if others else "was changed"


def _check_adapter(directory: _Directory) -> Iterator[Finding]:
    """The adapter is one that run.json and the receipt describe, by what it is and not by its file's hash."""
    path = directory.path / ADAPTER_DIRECTORY
    config, recorded = files.read_json(path / CONFIG_FILE), directory.record["lora"]
    problems = [
        f"{key} is {config[key]} in {CONFIG_FILE} and {recorded[ours]} in {RUN_FILE}"
        for key, ours in (("r", "rank"), ("lora_alpha", "alpha"))
        if config[key] != recorded[ours]
    ]
    tensors = _tensors(path)
    norms = {} if directory.receipt is None else {"adapter_norm_after": _norm(tensors)}
    before = directory.path / PARENT_ADAPTER_DIRECTORY
    if norms and before.is_dir() and sealed_state(directory.path) == "open":
        old = _tensors(before)
        if old.keys() == tensors.keys():
            norms["delta_norm"] = _norm({k: tensors[k] - old[k] for k in old})
    for key, found in norms.items():
        assert directory.receipt is not None
        expected = directory.receipt[key]
        if not math.isclose(found, expected, rel_tol=_NORM_RTOL, abs_tol=_NORM_RTOL * _norm(tensors)):
            problems.append(f"{key} is {found:.6g}, and {expected:.6g} in {RECEIPT_FILE}")
    by = RUN_FILE if directory.receipt is None else f"{RUN_FILE} and {RECEIPT_FILE}"
    words = "; ".join(problems) or f"has the scale and the norms that {by} have"
    yield Finding("adapter as described", not problems, words)


def _tensors(path: Path) -> dict[str, np.ndarray]:
    found = {}
    for name in (WEIGHTS_FILE, EXTRAS_FILE):
        if name == WEIGHTS_FILE or (path / name).exists():
            source = convert.SafetensorsSource.from_file(path / name)
            found |= {tensor: np.asarray(source.read(tensor)).astype(np.float64) for tensor in source.shapes()}
    return found


def _norm(tensors: Mapping[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.sum(tensor**2)) for tensor in tensors.values()))


def _check_receipt(directory: _Directory) -> Iterator[Finding]:
    if directory.kind != "erase":
        return
    path = directory.path / RECEIPT_FILE
    if directory.receipt is None:
        yield Finding(RECEIPT_FILE, False, "is missing or no JSON")
        return
    last = directory.receipts[-1] if directory.receipts else {}
    problems = []
    if file_sha256(path) != last.get("sha256"):
        problems.append(f"was edited, or is not the last receipt that {RUN_FILE} names")
    if directory.receipt.get("parent") != directory.parent:
        problems.append(f"names another parent than {RUN_FILE}")
    yield Finding(RECEIPT_FILE, not problems, "; ".join(problems) or "is the last receipt of the chain")


def _check_requests(directory: _Directory) -> Iterator[Finding]:
    """The request file asks for what the receipt says was done."""
    if directory.kind != "erase" or directory.receipt is None:
        return
    lines = (directory.path / REQUESTS_FILE).read_text(encoding="utf-8").splitlines()
    asked = [(row["id"], row["action"]) for row in map(json.loads, lines)]
    done = [(one["id"], one["action"]) for one in directory.receipt["named"]]
    differing = sorted({id_ for id_, _ in set(asked) ^ set(done)})
    words = f"{REQUESTS_FILE} and {RECEIPT_FILE} differ in {_listed(differing)}"
    words = words if differing else f"{len(done)} requests, all in {RECEIPT_FILE}"
    yield Finding("requests as described", not differing, words)


def _check_chain(directory: _Directory) -> Iterator[Finding]:
    """Every receipt names the one before it, back to the training."""
    if not directory.receipts:
        return
    problems, before = [], None
    for number, entry in enumerate(directory.receipts, start=1):
        if "previous" not in entry:
            problems.append(f"receipt {number} is of an older version and does not name the one before it")
        elif entry["previous"] != before:
            there = "the first" if before is None else f"the one after {before[:12]}"
            problems.append(f"receipt {number} is not {there}: one was dropped or added, or their order changed")
        before = entry["sha256"]
    number = len(directory.receipts)
    yield Finding("chain of receipts", not problems, "; ".join(problems) or f"{number} from the training to here")


def _check_parents(directory: _Directory) -> Iterator[Finding]:
    """The runs before, as far as they are at hand."""
    child = directory
    while child.parent is not None:
        path = Path(child.parent["path"])
        name = f"parent {path}"
        if not (path / RUN_FILE).is_file():
            yield Finding(name, True, "is not at hand, and not checked")
            return
        if file_sha256(path / RUN_FILE) != child.parent["sha256"]:
            words = f"is not the run that was derived from: its {RUN_FILE} is another, or was edited"
            yield Finding(name, False, words)
            return
        parent = _Directory(path)
        problems = [f.detail for f in (*_check_files(parent), *_check_receipt(parent)) if not f.ok]
        if child.kind == "erase":
            if list(child.receipts[:-1]) != list(parent.receipts):
                problems.append(f"its receipts are not those that {child.path.name} names before its own")
            if child.files is not None and parent.files is not None:
                own, before = child.files[PLAIN], parent.files[PLAIN]
                changed = [
                    part
                    for part in (WEIGHTS_FILE, CONFIG_FILE, EXTRAS_FILE)
                    if own.get(f"{PARENT_ADAPTER_DIRECTORY}/{part}") != before.get(f"{ADAPTER_DIRECTORY}/{part}")
                ]
                if changed:
                    problems.append(f"its {_listed(changed)} is not what {child.path.name} was erased from")
        yield Finding(name, not problems, "; ".join(problems) or "is as it was derived from")
        child = parent


def _check_data(directory: _Directory) -> Iterator[Finding]:
    """The training data is what it was, and holds no erased row."""
    name, path = "training data", directory.data_path
    if not path.exists():
        inside = path == directory.path / EXAMPLES_FILE
        yield Finding(name, not inside, f"{path} is not there" + ("" if inside else ", and not checked"))
        return
    if directory.is_keyed and directory.keys is None:
        yield Finding(name, False, "cannot be checked without the key")
        return
    now = {example.id: directory.hash_of(example) for example in data.load_examples(path)}
    then, erased = directory.content, directory.erased
    back = [id_ for id_ in erased if now.get(id_) == erased[id_] and then.get(id_) != erased[id_]]
    copies = [id_ for id_ in now if id_ not in back and now[id_] in erased.values() and then.get(id_) != now[id_]]
    other = {
        "are missing": [id_ for id_ in then if id_ not in now],
        "were added": [id_ for id_ in now if id_ not in then and id_ not in back],
        "were changed": [id_ for id_ in then if id_ in now and now[id_] != then[id_] and id_ not in back],
    }
    problems = [f"holds erased rows again: {_listed(back)}"] if back else []
    problems += [f"holds erased rows under other ids: {_listed(copies)}"] if copies else []
    problems += [f"{_listed(ids)} {what}" for what, ids in other.items() if ids]
    yield Finding(name, not problems, "; ".join(problems) or f"{len(then)} rows as recorded, no erased one")


def _check_other_data(directory: _Directory, path: Path) -> Iterator[Finding]:
    """No erased row of the chain, as far as its runs are at hand, is in a file."""
    examples = data.load_examples(path)
    child: _Directory | None = directory
    while child is not None:
        if child.kind == "erase":
            name = f"rows erased in {child.path.name}"
            if child.is_keyed and child.keys is None:
                yield Finding(name, False, f"cannot be looked for in {path} without the key")
            else:
                retained = set(child.content.values())
                gone = set(child.erased.values()) - retained
                back = [example.id for example in examples if child.hash_of(example) in gone]
                words = f"are still in {path}: {_listed(back)}" if back else f"are not in {path}"
                yield Finding(name, not back, words)
        if child.parent is None:
            return
        before = Path(child.parent["path"])
        at_hand = (before / RUN_FILE).is_file() and file_sha256(before / RUN_FILE) == child.parent["sha256"]
        if not at_hand and len(child.receipts) > 1:
            yield Finding("rows erased before", True, f"are not looked for in {path}: {before} is not at hand")
        child = _Directory(before) if at_hand else None


def _check_checkpoints(directory: _Directory) -> Iterator[Finding]:
    kept = directory.record["result"].get("checkpoints")
    if kept:
        missing = [step for step in kept if not (directory.path / CHECKPOINT_DIRECTORY / step).is_dir()]
        words = f"of steps {_listed(missing)} are missing" if missing else f"of {len(kept)} steps are there"
        yield Finding("checkpoints", not missing, words)


def _check_seal(directory: _Directory) -> Iterator[Finding]:
    """After sealing nothing in the directory, or beside it, restores the erased state."""
    path, name = directory.path, "seal"
    if directory.kind != "erase":
        return
    state = sealed_state(path)
    if state == "sealing":
        yield Finding(name, False, "was begun and not finished; run `llmeraser seal` again")
        return
    if state == "open":
        yield Finding(name, True, f"none yet: {PARENT_ADAPTER_DIRECTORY} restores the adapter before the erasure")
        return
    record = files.read_json(path / SEAL_FILE)
    keys = RunKeys.load(path) if directory.keys is None and not directory.is_keyed else directory.keys
    problems = []
    if keys is None:
        problems.append("cannot be checked without the key")
    elif record.get("mac") not in (keys.mac(record), None):
        problems.append(f"{SEAL_FILE} was edited")
    if record["run_sha256"] != file_sha256(path / RUN_FILE):
        problems.append(f"{RUN_FILE} is not the one that was sealed")
    back = [os.path.relpath(root, path) for root in restoring_roots(path)]
    if (path / MARKER_FILE).exists():
        back.append(MARKER_FILE)
    if back:
        problems.append(f"what restores the erased state is back: {_listed(back)}")
    unknown = unknown_entries(path)
    if unknown:
        problems.append(f"what no erasure writes is there, and may restore it: {_listed(unknown)}")
    if keys is not None:
        hashes = {entry["hmac_sha256"]: entry["name"] for entry in directory.removed.values() if entry["bytes"]}
        again = [p for p in sorted(path.rglob("*")) if p.is_file() and _is_back(p, keys, hashes, directory)]
        if again:
            where = [p.relative_to(path).as_posix() for p in again]
            problems.append(f"removed files are there under other names: {_listed(where)}")
    count = len(record["removed"])
    words = "; ".join(problems) or f"{count} files removed, nothing in the directory restores the erased state"
    yield Finding(name, not problems, words)


def _is_back(path: Path, keys: RunKeys, removed: Mapping[str, str], directory: _Directory) -> bool:
    """Whether a file has the content of a removed one. Adapters share their configuration, and nothing is in it."""
    name = path.relative_to(directory.path).as_posix()
    recorded = {} if directory.files is None else directory.files[PLAIN]
    if path.name == CONFIG_FILE or keys.file(path) not in removed:
        return False
    return recorded.get(name) != file_sha256(path)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(map(repr, names[:_MAX_LISTED])) + more
