"""Every tampering with a run directory is named, and a directory that nobody touched is found as recorded."""

# The fixtures that a test takes are imported, and so redefined by its arguments.
# ruff: noqa: F811

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from llmeraser_jax import data
from llmeraser_jax.cli import main
from llmeraser_jax.deletion import seal, verify_directory
from llmeraser_jax.runs import RunError, RunKeys, load_run
from tests.deletion import made
from tests.training import tiny
from tests.training.conftest import data_path, model, model_path  # noqa: F401

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def chain(model, data_path, tmp_path_factory):
    """A trained run, and three erasures one after the other."""
    work = tmp_path_factory.mktemp("chain")
    shutil.copy(data_path, work / "train.jsonl")
    run = made.trained(work / "run", model, work / "train.jsonl")
    for number, id_ in enumerate(("r1", "r2", "r3"), start=1):
        requests = made.REQUESTS if number == 1 else [{"id": id_, "action": "remove"}]
        run = made.erased(run, work / f"out{number}", model, requests)
    return work


@pytest.fixture
def work(chain, tmp_path):
    """A copy to tamper with, its runs derived from each other in the new place."""
    names = ("run", "out1", "out2", "out3", "train.jsonl")
    for name in names:
        (shutil.copytree if (chain / name).is_dir() else shutil.copy)(chain / name, tmp_path / name)
    before, receipts = None, []
    for name in names[:-1]:
        directory = tmp_path / name
        keys = keys_of(directory)
        record = edit(directory / "run.json", lambda r: None)
        if before is None:
            record["data"]["path"] = str(tmp_path / "train.jsonl")
        else:
            record["parent"] = load_run(before).reference()
            previous = receipts[-1]["sha256"] if receipts else None
            edit(directory / "receipt.json", lambda r, v=(record["parent"], previous): set_receipt(r, *v))
            entry = {**record["receipts"][-1], "sha256": sha256(directory / "receipt.json"), "previous": previous}
            receipts = [*receipts, entry]
            record["receipts"] = receipts
        del record["mac"]
        (directory / "run.json").write_text(json.dumps({**record, "mac": keys.mac(record)}))
        before = directory
    return tmp_path


def keys_of(directory) -> RunKeys:
    keys = RunKeys.load(directory)
    assert keys is not None
    return keys


def set_receipt(receipt, parent, previous):
    receipt.update(parent=parent, previous=previous)


def sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content


def flip(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def failures(path, **options):
    return {finding.name: finding.detail for finding in verify_directory(path, **options) if not finding.ok}


def test_directories_that_nobody_touched_are_as_recorded(work, capsys):
    for name in ("run", "out1", "out2", "out3"):
        assert failures(work / name) == {}
    assert main(["verify", str(work / "out3")]) == 0
    said = capsys.readouterr().out
    assert "ok      chain of receipts: 3 from the training to here" in said and "FAILED" not in said
    for name in ("out2", "out1", "run"):
        assert f"ok      parent {work / name}: is as it was derived from" in said
    seal(work / "out3")
    assert failures(work / "out3") == {}


def drop_receipt(work):
    edit(work / "out3/run.json", lambda r: r["receipts"].pop(1))


def drop_first_receipt(work):
    edit(work / "out3/run.json", lambda r: r["receipts"].pop(0))


def reorder_receipts(work):
    edit(work / "out3/run.json", lambda r: r["receipts"].insert(0, r["receipts"].pop(1)))


def swap_parent(work):
    shutil.rmtree(work / "out2")
    shutil.copytree(work / "out1", work / "out2")


def another_key(work):
    RunKeys.new().save(work / "out3")


def adapter_of_parent(work):
    shutil.copy(work / "out3/parent_adapter/adapter_model.safetensors", work / "out3" / WEIGHTS)


def initial_adapter(work):
    shutil.copy(work / "out3/initial_adapter/adapter_model.safetensors", work / "out3" / WEIGHTS)


def put_row_back(work, id_="r3", number=3, new_id=None):
    row = {**tiny.rows(12)[number], "id": new_id or id_}
    with open(work / "out3/train.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def put_old_row_back(work):
    """The row that the first erasure replaced, as it was."""
    path = work / "out1/train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    old = {row["id"]: row for row in tiny.rows()}
    tiny.write_rows(path, [old["r7"] if row["id"] == "r7" else row for row in rows])


def sealed_then(change):
    def tamper(work):
        shutil.copytree(work / "out3", work / "copy")
        seal(work / "out3")
        change(work)

    return tamper


def put_back(work):
    shutil.copytree(work / "copy/parent_adapter", work / "out3/parent_adapter")


def put_delta_back(work):
    (work / "out3/delta").mkdir()
    (work / "out3/delta/array").write_bytes(b"1")


def put_back_renamed(work):
    shutil.copy(work / "copy/parent_adapter/adapter_model.safetensors", work / "out3/certificate.bin")


def solver_state_back(work):
    (work / "out3.solves").mkdir()


# What is done to the directory, which of its check fails, and what that says. Others may fail too.
TAMPERINGS = {
    "a byte of the adapter": (lambda w: flip(w / "out3" / WEIGHTS), "adapter", "safetensors was changed"),
    "a byte of the initial adapter": (
        lambda w: flip(w / "out3/initial_adapter/adapter_model.safetensors"),
        "initial_adapter",
        "was changed",
    ),
    "the adapter is the one before": (adapter_of_parent, "adapter", "is parent_adapter/adapter_model.safetensors"),
    "the adapter is the initial one": (initial_adapter, "adapter", "is initial_adapter/adapter_model.safetensors"),
    "the adapter is gone": (lambda w: (w / "out3" / WEIGHTS).unlink(), "adapter", "is missing"),
    "lora_alpha changed": (
        lambda w: edit(w / "out3/adapter/adapter_config.json", lambda c: c.update(lora_alpha=400)),
        "adapter as described",
        "lora_alpha is 400 in adapter_config.json and 4.0 in run.json",
    ),
    "an edited receipt": (
        lambda w: edit(w / "out3/receipt.json", lambda r: r.update(outcome="complete, and more")),
        "receipt.json",
        "was edited",
    ),
    "an edited run.json": (
        lambda w: edit(w / "out3/run.json", lambda r: r["train"].update(epochs=1)),
        "run.json",
        "was edited",
    ),
    "run.json is no JSON": (lambda w: (w / "out3/run.json").write_text("{"), "run.json", "cannot be read"),
    "an edited receipt of the parent": (
        lambda w: edit(w / "out2/receipt.json", lambda r: r.update(seconds=1.5)),
        "parent {out2}",
        "was edited",
    ),
    "a byte of the parent's adapter": (lambda w: flip(w / "out1" / WEIGHTS), "parent {out1}", "was changed"),
    "a swapped parent": (swap_parent, "parent {out2}", "is not the run that was derived from"),
    "an edited parent": (
        lambda w: edit(w / "run/run.json", lambda r: r["result"].update(loss=0.1)),
        "parent {run}",
        "was edited",
    ),
    "the key is gone": (lambda w: (w / "out3/hash.key").unlink(), "key", "is not there"),
    "a wrong key": (another_key, "key", "is not the key"),
    "half a key": (lambda w: (w / "out3/hash.key").write_text("ab\ncd\n"), "key", "two keys of 32 bytes"),
    "a key for everybody": (lambda w: os.chmod(w / "out3/hash.key", 0o644), "key", "mode 644"),
    "an edited request": (
        lambda w: (w / "out3/requests.jsonl").write_text('{"id": "r5", "action": "remove"}\n'),
        "requests.jsonl",
        "was edited",
    ),
    "a request for another row": (
        lambda w: (w / "out3/requests.jsonl").write_text('{"id": "r5", "action": "remove"}\n'),
        "requests as described",
        "differ in 'r3', 'r5'",
    ),
    "a receipt dropped": (drop_receipt, "chain of receipts", "receipt 2 is not the one after"),
    "the first receipt dropped": (drop_first_receipt, "chain of receipts", "receipt 1 is not the first"),
    "receipts in another order": (reorder_receipts, "chain of receipts", "their order changed"),
    "the erased row is back": (put_row_back, "training data", "holds erased rows again: 'r3'"),
    "the erased row is back under another id": (
        lambda w: put_row_back(w, new_id="x"),
        "training data",
        "holds erased rows under other ids: 'x'",
    ),
    "a row that was not there": (lambda w: put_row_back(w, "y", 11), "training data", "'y' were added"),
    "the data is gone": (lambda w: (w / "out3/train.jsonl").unlink(), "training data", "is not there"),
    "after sealing: the adapter before": (sealed_then(put_back), "seal", "is back: 'parent_adapter'"),
    "after sealing: a delta": (sealed_then(put_delta_back), "seal", "is back: 'delta'"),
    "after sealing: under another name": (sealed_then(put_back_renamed), "seal", "other names: 'certificate.bin'"),
    "after sealing: a solver's state": (sealed_then(solver_state_back), "seal", "is back: '../out3.solves'"),
    "after sealing: a stranger": (
        sealed_then(lambda w: (w / "out3/notes").write_text("1")),
        "seal",
        "what no erasure writes is there, and may restore it: 'notes'",
    ),
    "an edited seal": (
        sealed_then(lambda w: edit(w / "out3/seal.json", lambda r: r["removed"].pop())),
        "seal",
        "seal.json was edited",
    ),
    "the seal of another directory": (
        sealed_then(lambda w: edit(w / "out3/run.json", lambda r: r.update(seed=5))),
        "seal",
        "run.json is not the one that was sealed",
    ),
    "a seal that is no JSON": (
        sealed_then(lambda w: (w / "out3/seal.json").write_text("{")),
        "seal",
        "cannot be checked: ValueError",
    ),
    "the seal is gone": (
        sealed_then(lambda w: (w / "out3/seal.json").unlink()),
        "parent_adapter",
        "adapter_model.safetensors is missing",
    ),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_every_tampering_is_named(work, what):
    tamper, name, detail = TAMPERINGS[what]
    tamper(work)
    found = failures(work / "out3")
    name = name.format(**{path: work / path for path in ("run", "out1", "out2")})
    assert detail in found[name], found


def test_a_replaced_row_that_is_as_it_was_is_an_erased_row(work, capsys):
    put_old_row_back(work)
    assert "holds erased rows again: 'r7'" in failures(work / "out1")["training data"]
    assert main(["verify", str(work / "out1")]) == 3
    assert "FAILED  training data: holds erased rows again: 'r7'" in capsys.readouterr().out


def test_the_file_that_trainings_read_is_searched_for_the_rows_of_the_whole_chain(work):
    found = failures(work / "out3", data_path=work / "train.jsonl")
    assert found.keys() == {"rows erased in out3", "rows erased in out2", "rows erased in out1"}
    assert found["rows erased in out1"].endswith("'r1', 'r4', 'r7'")
    assert found["rows erased in out3"].endswith("'r3'")
    assert failures(work / "out3", data_path=work / "out3/train.jsonl") == {}
    # Other rows and other ids are nobody's business.
    rows = [{**row, "id": f"n{k}"} for k, row in enumerate(tiny.rows(12)[10:])]
    assert failures(work / "out3", data_path=tiny.write_rows(work / "new.jsonl", rows)) == {}
    # Without the runs before only the last erasure's rows are looked for, and that is said.
    shutil.rmtree(work / "out2")
    findings = {f.name: f for f in verify_directory(work / "out3", work / "train.jsonl")}
    assert not findings["rows erased in out3"].ok and "is not at hand" in findings["rows erased before"].detail
    assert findings[f"parent {work / 'out2'}"].detail == "is not at hand, and not checked"


def test_without_its_key_a_run_can_be_loaded_and_no_hash_of_it_linked_to_a_row(work, caplog):
    path = work / "out1"
    examples = load_run(path).load_examples()
    (path / "hash.key").unlink()
    caplog.clear()
    run = load_run(path)
    assert f"{path / 'hash.key'} is not there: {path} can be loaded, and no data be checked" in caplog.text
    assert run.load_examples() == examples
    assert "It is not checked that the examples of" in caplog.text
    with pytest.raises(RunError, match="1 missing: 'r0'"):
        run.verify_examples(examples[1:])
    with pytest.raises(RunError, match="Content cannot be compared with what it records; put the key back"):
        run.load_unseen(work / "train.jsonl")
    RunKeys.new().save(path)
    with pytest.raises(RunError, match=r"hash\.key is not the key that its hashes were made with"):
        load_run(path)


def test_each_directory_has_a_key_of_its_own_and_shares_that_of_held_out_rows(work, model):
    keys = [keys_of(work / name) for name in ("run", "out1", "out2")]
    assert len({k.own for k in keys}) == 3 and len({k.heldout for k in keys}) == 1
    assert all((work / name / "hash.key").stat().st_mode & 0o777 == 0o600 for name in ("run", "out1"))
    (row,) = (e for e in data.load_examples(work / "train.jsonl") if e.id == "r0")
    hashes = {load_run(work / name).content_hash(row) for name in ("run", "out1", "out2")}
    assert len(hashes) == 3 and data.content_hash(row) not in hashes
    other = dataclasses.replace(row, id="another id")
    assert load_run(work / "out1").content_hash(other) in hashes


def test_a_hash_is_hmac_sha_256_as_rfc_2104_defines_it(work):
    import hashlib

    keys = keys_of(work / "out1")
    block = keys.own.ljust(64, b"\0")
    inner, outer = (bytes(byte ^ pad for byte in block) for pad in (0x36, 0x5C))
    content = b"example\0" + b"ab" * 32
    expected = hashlib.sha256(outer + hashlib.sha256(inner + content).digest()).hexdigest()
    assert keys.example("ab" * 32) == expected


def test_a_directory_without_hashes_of_files_says_what_it_cannot_show(chain, tmp_path):
    shutil.copytree(chain / "out1", tmp_path / "out")
    edit(tmp_path / "out/run.json", lambda r: [r.pop(key) for key in ("files", "mac")])
    edit(tmp_path / "out/run.json", lambda r: [r["data"].pop(key) for key in ("hashes", "key_check")])
    edit(tmp_path / "out/run.json", lambda r: r["data"].update(sha256=r["data"]["content"]))
    found = failures(tmp_path / "out")
    assert "short ones can be guessed" in found["key"] and "older version" in found["files"]
    assert Path(load_run(tmp_path / "out").path).is_dir()


def test_an_erasure_from_a_directory_without_keys_has_keys(model, data_path, tmp_path, caplog):
    run = made.trained(tmp_path / "run", model, data_path)
    path = tmp_path / "run/run.json"

    def without_keys(record):
        held = record["data"]
        examples = data.load_examples(data_path)
        held.update(sha256=[data.content_hash(e) for e in examples])
        tokens = run.encode(examples, model.tokenizer).token_sha256
        held.update(token_sha256=[tokens[e.id] for e in examples])
        for key in ("hashes", "key_check", "content", "tokens"):
            del held[key]
        del record["files"], record["mac"]

    edit(path, without_keys)
    (tmp_path / "run/hash.key").unlink()
    old = load_run(tmp_path / "run")
    assert "holds plain SHA-256 of its examples, from which whoever reads it can guess" in caplog.text
    assert old.content_hash(old.load_examples()[1]) == data.content_hash(old.load_examples()[1])
    out = made.erased(old, tmp_path / "out", model)
    assert out.keys is not None
    (detail,) = failures(out.path).values()  # of the parent
    assert "older version and has no hashes of the adapter's files" in detail
    receipt = json.loads((out.path / "receipt.json").read_text())
    assert receipt["named"][0]["hash_before"] == out.content_hash(old.load_examples()[1])
    assert load_run(out.path).load_examples() == out.load_examples()
    with pytest.raises(RunError, match="1 changed: 'r2'"):
        changed = [dataclasses.replace(e, response="x") if e.id == "r2" else e for e in out.load_examples()]
        out.verify_examples(changed)
