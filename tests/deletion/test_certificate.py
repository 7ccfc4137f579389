"""From the console: requests, erasures, certificates, and every tampering with any of them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmeraser_jax.cli import main
from llmeraser_jax.deletion import Ledger, add_entry, certify, verify_certificate, verify_ledger
from llmeraser_jax.deletion.signature import SignatureError, load_private_key
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.evaluation.tasks import auc_metric
from llmeraser_jax.runs import load_run
from llmeraser_jax.unlearning.drift import drift_after
from tests.deletion.small import SECRET, make_run
from tests.deletion.test_ledger import rechained
from tests.training import tiny

PATH = ["path", "--num-steps", "2", "--sample-size", "4", "--solver", "cg:rtol=0.05,max_steps=4"]


def new_key(path):
    """An Ed25519 key in PEM, made by openssl."""
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def run(work):
    return make_run(work)[1]


@pytest.fixture(scope="module")
def calibration(work):
    return tiny.write_rows(work / "unseen.jsonl", [{**row, "id": "h" + row["id"]} for row in tiny.rows(12)[10:]])


@pytest.fixture(scope="module")
def key(work):
    return new_key(work / "key.pem")


@pytest.fixture(scope="module")
def console():
    """Runs a command; returns its exit status and what it printed."""
    import contextlib
    import io

    def call(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
        return status, out.getvalue() + err.getvalue()

    return call


@pytest.fixture(scope="module")
def processed(run, work, calibration, key, console):
    """A ledger with two batches and the certificate of the first one; the console's answers on the way."""
    ledger = ("--ledger", work / "ledger")
    add = ("queue", "add", *ledger, "--received", "2026-03-02", "--requester", "data subject")
    status, told = console(*add, "--subject", "Ada", "--ids", "r1")
    assert status == 1 and "no ledger" in told and not (work / "ledger").exists()
    status, told = console(*add, "--subject", "Ada", "--where", "user=U1", "--run", work / "nowhere")
    assert status == 1 and "nowhere" in told and not (work / "ledger").exists()
    status, told = console(*add, "--subject", "Ada", "--where", "user=U1", "--run", run.path, "--reason", "Art. 17")
    assert status == 0 and "Entry 3: 2 rows" in told
    correction = tiny.write_rows(
        work / "correction.jsonl", [{"id": "r5", "action": "correct_response", "response": SECRET}]
    )
    assert console(*add, "--pseudonym", "case 7", "--requests", correction, "--due", "2026-05-01")[0] == 0
    status, told = console("queue", "due", *ledger, "--by", "2026-04-01")
    assert status == 0 and "Nothing is due by 2026-04-01. 2 entries wait, the next until 2026-04-02." in told
    assert console("queue", "due", *ledger, "--by", "2026-04-02")[0] == 3
    process = ("queue", "process", *ledger, "--chunk-size", "4", "--calibration", calibration)
    status, told = console(*process, "--by", "2026-04-02", *PATH)
    assert status in (0, 3, 4) and "done: " in told and "since training" in told and "1 erasure of 2 rows" in told
    status, told = console("certify", work / "ledger" / "runs" / "batch-0005", "--key", key)
    assert status == 0, told
    status, told = console(*process, "--all", *PATH)
    assert status in (0, 3, 4) and "2 erasures of 3 rows" in told
    status, told = console("queue", "list", *ledger)
    assert status == 0 and told.count("done: ") == 2
    status, told = console(*process, "--all")
    assert status == 0 and "No entry waits." in told
    return work / "ledger"


@pytest.fixture(scope="module")
def out(processed):
    return processed / "runs" / "batch-0005"


@pytest.fixture(scope="module")
def content(out):
    return json.loads((out / "certificate" / "certificate.json").read_text())


def test_everything_verifies_from_the_console(processed, out, console, work):
    status, told = console("verify", processed)
    assert status == 0 and "as it should be" in told and "FAILED" not in told
    public = out / "certificate" / "certificate.json.pub.pem"
    assert console("verify", out, "--public-key", public)[0] == 0
    assert console("verify", work / "run")[0] == 0
    status, told = console("verify", work / "run", "--public-key", public)
    assert status == 3 and "certify" in told


def test_openssl_verifies_the_signature(out):
    directory = out / "certificate"
    names = [str(directory / f"certificate.json{suffix}") for suffix in (".pub.pem", "", ".sig")]
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin"]
    done = subprocess.run(
        [*command, "-inkey", names[0], "-in", names[1], "-sigfile", names[2]], capture_output=True
    )
    assert done.returncode == 0 and b"Verified Successfully" in done.stdout


def test_requests_are_answered_under_pseudonyms(content, processed):
    (request,) = content["requests"]
    assert request["subject"] == Ledger(processed).pseudonym("Ada") and request["rows"] == ["r1", "r2"]
    assert request["received"] == "2026-03-02" and request["due"] == "2026-04-02" and request["reason"] == "Art. 17"
    assert content["actions"] == {"remove": 2, "modify_query": 0, "correct_response": 0}
    assert content["chain"]["number"] == 6 and len(content["chain"]["receipts"]) == 1


def test_what_is_measured_is_what_scoring_measures(content, run, out, calibration):
    model, erased = run.load_model(), load_run(out)
    examples = {example.id: example for example in run.load_examples()}
    forget = run.encode([examples["r1"], examples["r2"]], model.tokenizer)
    unseen = run.encode(run.load_unseen(calibration), model.tokenizer)
    measured = content["measured"]
    for when, of in (("before", run), ("after", erased)):
        lora = of.load_adapter(model)
        inside, outside = (score_examples(model, lora, rows).losses for rows in (forget, unseen))
        assert measured["forget"][when]["mean"] == pytest.approx(inside.mean(), rel=1e-5)
        assert measured["calibration"][when]["mean"] == pytest.approx(outside.mean(), rel=1e-5)
        auc = auc_metric("", -inside, -outside)
        assert measured["membership_auc"][when]["value"] == pytest.approx(auc.value)
    assert [point["steps"] for point in measured["relearning"]] == [0, 5, 8]
    assert measured["four_bit"]["survival"] is not None and measured["not_measured"] == []


def test_pages_say_the_same_and_refer_to_nothing_outside(out, content):
    page = (out / "certificate" / "certificate.html").read_text()
    text = (out / "certificate" / "certificate.md").read_text()
    for words in ("Certificate of erasure", "data subject", "Art. 17", content["run"]["adapter_sha256"], "4 bits",
                  "not the adapter that a retraining would have given"):  # fmt: skip
        assert words in page and words in text
    assert "http" not in page and "src=" not in page


def test_no_text_of_an_example_and_no_name_is_in_ledger_or_certificate(processed):
    directories = [processed / "runs" / name / "certificate" for name in ("batch-0005",)]
    found = [path for path in processed.rglob("*") if path.is_file() and "runs" not in path.parts]
    found += [path for directory in directories for path in directory.iterdir()]
    assert len(found) >= 8
    for path in found:
        written = path.read_bytes()
        assert not [
            word for word in (b"colour of", b"blue", b"grey", b"green", b"Ada", b"U1") if word in written
        ], path


def test_a_second_certificate_is_refused_and_one_without_its_line_gets_it(processed, tmp_path):
    ledger = Ledger(shutil.copytree(processed, tmp_path / "ledger"))
    run = load_run(ledger.path / "runs" / "batch-0005")
    with pytest.raises(FileExistsError, match="is there already"):
        certify(run)
    shutil.copytree(run.path / "certificate", tmp_path / "kept")
    shutil.rmtree(run.path / "certificate")
    (failed,) = (finding for finding in verify_ledger(ledger.path) if not finding.ok)
    assert failed.name == "certificate of batch-0005"
    # As if the process had died between the certificate and its line.
    content = json.loads((tmp_path / "kept" / "certificate.json").read_text())
    shutil.copytree(tmp_path / "kept", run.path / "certificate")
    (run.path / "certificate" / "certificate.json").write_text(json.dumps({**content, "time": "later"}))
    certify(run)
    assert Ledger(ledger.path).lines()[-1].kind == "certificate"


def test_without_the_run_before_the_receipt_s_numbers_are_certified(processed, run, tmp_path):
    out = shutil.copytree(processed / "runs" / "batch-0005", tmp_path / "alone")
    shutil.rmtree(out / "certificate")
    recorded = json.loads((out / "run.json").read_text())
    recorded["parent"]["path"] = str(tmp_path / "deleted")
    (out / "run.json").write_text(json.dumps(recorded))
    page = certify(load_run(out)).read_text()
    content = json.loads((out / "certificate" / "certificate.json").read_text())
    assert "Nothing is measured anew" in page and "made without a ledger" in page and "not signed" in page
    assert {row["id"] for row in content["judged"]["rows"]} == {"r1", "r2"}
    assert all(finding.ok for finding in verify_certificate(out))


def test_the_drift_of_two_erasures_is_that_of_their_sums_and_of_dense_products(processed, run):
    outs = [load_run(processed / "runs" / name) for name in ("batch-0005", "batch-0008")]
    receipts = [json.loads((out.path / "receipt.json").read_text()) for out in outs]
    first, last = (receipt["drift"] for receipt in receipts)

    def products(of):
        tensors = load_file(of.path / "adapter" / "adapter_model.safetensors")
        names = [name for name in tensors if "lora_A" in name]
        scaling = of.lora_config.alpha / of.lora_config.rank
        return {n: scaling * tensors[n.replace("lora_A", "lora_B")] @ tensors[n] for n in names}

    start, end = products(run), products(outs[1])
    distance = np.sqrt(sum(np.sum((end[name] - start[name]) ** 2) for name in start))
    norm = np.sqrt(sum(np.sum(product**2) for product in start.values()))
    assert last["product_distance"] == pytest.approx(distance, rel=1e-4)
    assert last["product_norm"] == pytest.approx(norm, rel=1e-4)
    assert first["product_distance"] == pytest.approx(first["product_walk"], rel=1e-4)
    assert last["product_walk"] == pytest.approx(np.hypot(*(r["product_change_norm"] for r in receipts)))
    assert (last["erasures"], last["rows"]) == (2, 3)
    for group in ("retained", "calibration"):
        rises = [receipt["validity"][group]["rise"]["mean"] for receipt in receipts]
        assert last[f"{group}_rise"] == pytest.approx(sum(rises))
    shares = [receipt["gradient_equivalents"]["share_of_retraining"] for receipt in receipts]
    assert last["cost"] == pytest.approx(sum(shares))


def test_without_the_trained_adapter_the_walk_stands_for_the_distance(processed, run, tmp_path):
    out = shutil.copytree(processed / "runs" / "batch-0008", tmp_path / "alone")
    recorded = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**recorded, "parent": {"path": "deleted", "sha256": "0"}}))
    model = run.load_model()
    receipt = {**json.loads((out / "receipt.json").read_text()), "product_change_norm": 100.0}
    drift = drift_after(load_run(out), receipt, model, load_run(out).load_adapter(model))
    assert drift is not None and drift.product_distance is None and drift.erasures == 3
    assert drift.product_walk >= 100 and drift.advice == "retrain now" and "trained norm" in " ".join(drift.reasons)
    assert drift_after(load_run(out), {**receipt, "method": "retrained"}, model, run.load_adapter(model)) is None


def test_the_same_request_again_reuses_losses_and_comes_to_the_same_adapter(
    processed, out, run, calibration, console, tmp_path
):
    requests = tiny.write_rows(tmp_path / "again.jsonl", [{"id": id_, "action": "remove"} for id_ in ("r1", "r2")])
    arguments = ("erase", "--run", run.path, "--requests", requests, "--workdir", tmp_path / "again")
    status, told = console(*arguments, "--chunk-size", "4", "--calibration", calibration, *PATH)
    assert status in (0, 3, 4), told
    first, again = (json.loads((path / "receipt.json").read_text()) for path in (out, tmp_path / "again"))
    saved = first["gradient_equivalents"]["diagnostics"] - again["gradient_equivalents"]["diagnostics"]
    assert again["reused_losses"] > first["reused_losses"]
    assert saved == pytest.approx((again["reused_losses"] - first["reused_losses"]) / 3)
    adapters = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (out, tmp_path / "again"))
    for (name, one), (other_name, other) in zip(*(sorted(tensors.items()) for tensors in adapters), strict=True):
        assert name == other_name
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def edited(name, change):
    """A tampering that edits a JSON file of a run."""

    def tamper(ledger, out):
        path = out / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return tamper


def flipped_adapter(ledger, out):
    path = out / "adapter" / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def scaled_adapter(ledger, out):
    path = out / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def lines_changed(change, again=False):
    """A tampering with the ledger's lines, with hashes made right again or not."""

    def tamper(ledger, out):
        path = ledger / "ledger.jsonl"
        lines = change([json.loads(line) for line in path.read_text().splitlines()])
        texts = rechained(lines) if again else [json.dumps(line, sort_keys=True) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))

    return tamper


def other_signer(ledger, out):
    from llmeraser_jax.deletion.signature import sign_file

    sign_file(out / "certificate" / "certificate.json", load_private_key(new_key(ledger / ".other.pem")))


def appended(name):
    def tamper(ledger, out):
        with open(out / "certificate" / name, "ab") as file:
            file.write(b" ")

    return tamper


def with_row_back(recorded):
    held = recorded["data"]
    return {**recorded, "data": {name: [*v, "r1"] if isinstance(v, list) else v for name, v in held.items()}}


def other_parent(recorded):
    return {**recorded, "parent": {**recorded["parent"], "sha256": "0" * 64}}


def from_the_other_run(ledger, out):
    other = ledger / "runs" / "batch-0008"
    shutil.copytree(other / "adapter", out / "adapter", dirs_exist_ok=True)


def last_run(tamper):
    return lambda ledger, out: tamper(ledger, ledger / "runs" / "batch-0008")


TAMPERINGS = {
    "a byte of the adapter": (flipped_adapter, "run batch-0005", "its adapter is another"),
    "another adapter": (scaled_adapter, "run batch-0005", "its adapter is another"),
    "the adapter of another run": (from_the_other_run, "run batch-0005", "its adapter is another"),
    "an edited receipt": (
        edited("receipt.json", lambda r: {**r, "outcome": "complete", "complete": True}),
        "run batch-0005",
        "its receipt was changed",
    ),
    "a swapped parent": (edited("run.json", other_parent), "run batch-0005", "comes from another run"),
    "an erased row in the data again": (
        last_run(edited("run.json", with_row_back)), "erased rows", "is trained on 'r1' of entry 3"),
    "the last run deleted": (
        lambda ledger, out: shutil.rmtree(ledger / "runs" / "batch-0008"), "run batch-0008", "not a run"),
    "a dropped ledger line": (lines_changed(lambda x: [*x[:3], *x[4:]]), "numbers", "dropped"),
    "a reordered chain": (lines_changed(lambda x: [*x[:3], x[4], x[3], *x[5:]]), "numbers", "moved"),
    "an edited ledger line, chained again": (
        lines_changed(lambda x: [*x[:2], {**x[2], "content": {**x[2]["content"], "due": "2027"}}, *x[3:]], True),
        "head", "is not the one that was written"),
    "the end of the ledger cut off": (lines_changed(lambda x: x[:-2]), "head", "missing at the end"),
    "an edited certificate": (
        edited("certificate/certificate.json", lambda c: {**c, "time": "2026"}), "certificate of batch-0005",
        "not the one recorded"),
    "an edited page": (
        appended("certificate.html"), "batch-0005: certificate.html", "missing or was changed"),
    "an edited signature": (
        appended("certificate.json.sig"), "batch-0005: signature of certificate.json", "not what the key"),
    "a removed signature": (
        lambda ledger, out: (out / "certificate" / "certificate.json.sig").unlink(),
        "batch-0005: signature of certificate.json", "not signed"),
    "another signer": (other_signer, "batch-0005: signature of certificate.json", "names the key"),
    "another ledger's key": (
        lambda ledger, out: (ledger / "ledger.key").write_bytes(b"k" * 32), "head", "this ledger's key"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_named(processed, tmp_path, name):
    tamper, check, words = TAMPERINGS[name]
    ledger = shutil.copytree(processed, tmp_path / "ledger")
    assert all(finding.ok for finding in verify_ledger(ledger))
    tamper(ledger, ledger / "runs" / "batch-0005")
    failed = {finding.name: finding.detail for finding in verify_ledger(ledger) if not finding.ok}
    assert words in failed.get(check, ""), failed


def test_the_wrong_key_is_named(processed, out, work):
    other = new_key(work / "other.pem")
    public = work / "other.pub.pem"
    subprocess.run(["openssl", "pkey", "-in", str(other), "-pubout", "-out", str(public)], check=True)
    for findings in (verify_ledger(processed, public_key=public), verify_certificate(out, public_key=public)):
        (failed,) = (finding for finding in findings if not finding.ok)
        assert "is signed with the key" in failed.detail and "other.pub.pem" in failed.detail


def test_new_texts_of_an_open_entry_that_were_changed_are_named(processed, tmp_path):
    ledger = Ledger(shutil.copytree(processed, tmp_path / "ledger"))
    row = {"id": "r6", "action": "correct_response", "response": SECRET}
    add_entry(ledger, pseudonym="x", requests_path=tiny.write_rows(tmp_path / "c.jsonl", [row]))
    assert all(finding.ok for finding in verify_ledger(ledger.path))
    (texts,) = (ledger.path / "pending").iterdir()
    texts.write_text(texts.read_text().replace(SECRET, "blue"))
    (failed,) = (finding for finding in verify_ledger(ledger.path) if not finding.ok)
    assert failed.name == "texts of entry 10" and "HMAC" in failed.detail


def test_keys_that_cannot_sign_are_refused(tmp_path, key):
    subprocess.run(["openssl", "genpkey", "-algorithm", "x25519", "-out", str(tmp_path / "x.pem")], check=True)
    with pytest.raises(SignatureError, match="no Ed25519 key"):
        load_private_key(tmp_path / "x.pem")
    (tmp_path / "no.pem").write_text("nothing")
    with pytest.raises(SignatureError, match="no private key in PEM"):
        load_private_key(tmp_path / "no.pem")
    command = [
        "openssl",
        "pkey",
        "-in",
        str(key),
        "-aes256",
        "-passout",
        "pass:word",
        "-out",
        str(tmp_path / "p.pem"),
    ]
    subprocess.run(command, check=True)
    with pytest.raises(SignatureError, match="passphrase"):
        load_private_key(tmp_path / "p.pem")


def test_a_key_of_ssh_keygen_signs(tmp_path, out):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "id")], check=True)
    assert type(load_private_key(tmp_path / "id")).__name__ == "Ed25519PrivateKey"


def test_without_the_extra_the_error_says_how_to_get_it(key, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(ImportError, match=r"llmeraser-jax\[certificate\]"):
        load_private_key(key)
