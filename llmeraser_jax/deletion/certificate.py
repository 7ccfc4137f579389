"""The certificate of an erasure: a page for people (HTML, Markdown), the same for machines (JSON), and a signature.

`OUT/certificate/` holds

    certificate.json            everything that is stated, with the hashes of the two pages
    certificate.html, .md       for people; the HTML needs no other file
    certificate.json.sig        Ed25519, 64 bytes; and certificate.json.pub.pem; where a key was given

No text of an example is in any of them. What is stated of rows is measured here, while the texts of the erased rows
are still to be had from the run before; else it is what the receipt recorded, and the certificate says so.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llmeraser_jax import data, files
from llmeraser_jax.deletion.findings import Finding
from llmeraser_jax.deletion.ledger import LEDGER_FILE, Ledger, Line, utc_now
from llmeraser_jax.deletion.pending import Entry, read_state
from llmeraser_jax.deletion.seal import ADAPTERS_BEFORE, sealed_state
from llmeraser_jax.deletion.signature import (
    PUBLIC_KEY_SUFFIX,
    check_signature,
    fingerprint,
    load_private_key,
    load_public_key,
    sign_file,
)
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.evaluation import measures
from llmeraser_jax.evaluation.page import ACTION_NAMES
from llmeraser_jax.evaluation.render import (
    MISSING,
    Block,
    Bullets,
    Details,
    Heading,
    Page,
    Table,
    Text,
    render_html,
    render_markdown,
    show_number,
)
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.evaluation.tasks import auc_metric
from llmeraser_jax.export import edited_rows
from llmeraser_jax.models import Model
from llmeraser_jax.runs import RUN_FILE, Run, RunError, load_run
from llmeraser_jax.runs.model_files import file_sha256
from llmeraser_jax.unlearning import UnlearningTask
from llmeraser_jax.unlearning.drift import words_of
from llmeraser_jax.unlearning.job import REQUESTS_FILE
from llmeraser_jax.unlearning.receipt import read_receipt

FORMAT = 1
CERTIFICATE_DIRECTORY = "certificate"
JSON_FILE, HTML_FILE, MARKDOWN_FILE = "certificate.json", "certificate.html", "certificate.md"
RELEARNING_STEPS = (5, 10)
_NORMAL_95 = 1.96


def receipt_sha256(receipt: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a receipt's content."""
    return hashlib.sha256(files.canonical_json(dict(receipt)).encode("ascii")).hexdigest()


def certify(
    run: Run,
    *,
    ledger: Ledger | None = None,
    key_path: str | os.PathLike[str] | None = None,
    calibration_path: str | os.PathLike[str] | None = None,
    data_path: str | os.PathLike[str] | None = None,
    model: Model | None = None,
    mesh: Mesh | None = None,
) -> Path:
    """Measures an erasure and writes its certificate, whole or not at all.

    Args:
        run: made by an erasure.
        ledger: where the requests came from; the certificate gets a line in it. None is the one that the run lies
            in, if it lies in one.
        key_path: an Ed25519 private key to sign with; None signs nothing.
        calibration_path: rows that no model was trained on; None is what the ledger's batch was given.
        data_path: where the training data of the run before is now; None is where it was.
        model: the base model where it is loaded already.
        mesh: where to load the model to otherwise.

    Returns:
        The path of the HTML page.

    Raises:
        RunError: the run is no erasure, or the run before it is not the one it was made from.
        FileExistsError: there is a certificate already.
        SignatureError: the key cannot be used.
        ImportError: a key is given and `cryptography` is missing.
    """
    receipt = read_receipt(run)
    if receipt is None:
        msg = f"{run.path} is the result of {run.kind!r}; a certificate is of an erasure."
        raise RunError(msg)
    key = None if key_path is None else load_private_key(key_path)
    ledger = ledger_around(run.path) if ledger is None else ledger
    directory = run.path / CERTIFICATE_DIRECTORY
    lines = () if ledger is None else ledger.lines()
    if directory.exists() and not _is_unrecorded(directory, ledger, lines):
        msg = f"{directory} is there already; move it away to write another certificate."
        raise FileExistsError(msg)
    if not directory.exists():
        entries = _entries_of(ledger, lines, run)
        if calibration_path is None and entries:
            start = next(line for line in lines if line.number == entries[0].batch)
            calibration_path = start.content["settings"].get("calibration_path")
        content = {
            "format": FORMAT,
            "time": (utc_now if ledger is None else ledger.now)().isoformat(timespec="seconds"),
            "requests": [_request_of(entry, lines) for entry in entries],
            "run": {
                "name": run.path.name,
                "adapter_sha256": run.adapter_sha256,
                "receipt_sha256": receipt_sha256(receipt),
                "run_before_sha256": None if run.parent is None else run.parent["sha256"],
                "base_model_sha256": run.model_sha256,
                "examples_before": receipt["num_examples_before"],
                "examples_after": receipt["num_examples_after"],
            },
            "actions": receipt["counts"],
            "rows": [{"id": one["id"], "action": one["action"]} for one in receipt["named"]],
            "done": {
                "method": receipt["method"],
                "outcome": receipt["outcome"],
                "complete": receipt["complete"],
                "configuration": receipt["config"],
                "versions": receipt["versions"],
            },
            "measured": _measure(run, receipt, calibration_path, data_path, model, mesh),
            "judged": receipt["validity"],
            "cost": {"seconds": receipt["seconds"], "gradient_equivalents": receipt["gradient_equivalents"]},
            "drift": receipt.get("drift"),
            "chain": {
                "ledger": lines[0].content.get("ledger") if lines else None,
                "number": lines[-1].number if lines else None,
                "sha256": lines[-1].sha256 if lines else None,
                "receipts": [one["sha256"] for one in run.receipts],
            },
            "sealed": sealed_state(run.path) == "sealed",
            "restores": _restoring(run),
            "certified_with": {"versions": library_versions(), "devices": describe_devices()},
            "key": None if key is None else fingerprint(key),
        }
        content = {**content, "limits": _limits(content, receipt)}
        _write(directory, files.finite_json(content), receipt, key)
    if ledger is not None:
        _record(ledger, run, directory)
    return directory / HTML_FILE


def ledger_around(path: Path) -> Ledger | None:
    """The ledger that a run directory lies in."""
    for parent in path.resolve().parents[:2]:
        if (parent / LEDGER_FILE).is_file():
            return Ledger(parent)
    return None


def verify_certificate(
    out: str | os.PathLike[str],
    *,
    ledger: Ledger | None = None,
    public_key: str | os.PathLike[str] | None = None,
) -> list[Finding]:
    """Whether a run's certificate is what was written and signed, and the run is the one that it describes.

    Args:
        out: the run directory.
        ledger: see `certify`.
        public_key: the key that must have signed it, a PEM file; None takes the one that it names.

    Raises:
        ImportError: it is signed and `cryptography` is missing.
    """
    run = load_run(out)
    path = run.path / CERTIFICATE_DIRECTORY / JSON_FILE
    if not path.is_file():
        return [Finding("certificate", False, f"there is none in {run.path}: `llmeraser certify` writes it")]
    try:
        content = files.read_json(path)
        key, own, chain, pages = (content[name] for name in ("key", "run", "chain", "pages"))
    except (KeyError, TypeError, ValueError) as error:
        return [Finding("certificate", False, f"{path} is damaged: {type(error).__name__}: {error}")]
    findings = []
    for name, sha256 in pages.items():
        page = path.with_name(name)
        same = page.is_file() and file_sha256(page) == sha256
        findings.append(Finding(name, same, "as written" if same else "it is missing or was changed"))
    if key is None and public_key is None:
        findings.append(Finding(f"signature of {path.name}", True, "it was written without a key"))
    else:
        findings.append(_signed_by(check_signature(path, public_key), path, key))
    receipt = read_receipt(run) or {}
    described = {
        "adapter": (run.adapter_sha256, own["adapter_sha256"]),
        "receipt": (receipt_sha256(receipt), own["receipt_sha256"]),
        "run before": (None if run.parent is None else run.parent["sha256"], own["run_before_sha256"]),
        "receipts so far": ([one["sha256"] for one in run.receipts], chain["receipts"]),
    }
    findings += [
        Finding(f"certified {name}", now == then, "as certified" if now == then else "it is another than certified")
        for name, (now, then) in described.items()
    ]
    ledger = ledger_around(run.path) if ledger is None else ledger
    if chain["sha256"] is not None and ledger is not None:
        there = [line for line in ledger.lines() if line.sha256 == chain["sha256"]]
        told = (
            f"line {chain['number']}"
            if there
            else f"the ledger has no line with the hash that line {chain['number']} had"
        )
        findings.append(Finding("certified chain", bool(there), told))
    return findings


def _signed_by(finding: Finding, path: Path, key: str | None) -> Finding:
    """A good signature by another key than the certificate names is none."""
    beside = path.with_name(path.name + PUBLIC_KEY_SUFFIX)
    if not finding.ok or key is None or not beside.is_file():
        return finding
    found = fingerprint(load_public_key(beside))
    if found == key:
        return finding
    return Finding(finding.name, False, f"it names the key {key[:16]} and is signed with {found[:16]}")


def _is_unrecorded(directory: Path, ledger: Ledger | None, lines: Sequence[Line]) -> bool:
    """Whether a certificate was written and the process died before the ledger had its line."""
    if ledger is None or not (directory / JSON_FILE).is_file():
        return False
    sha256 = file_sha256(directory / JSON_FILE)
    return not any(line.kind == "certificate" and line.content["sha256"] == sha256 for line in lines)


def _record(ledger: Ledger, run: Run, directory: Path) -> None:
    content = files.read_json(directory / JSON_FILE)
    with ledger.writing() as writer:
        writer.append(
            "certificate",
            {
                "run": {"path": ledger.stored_path(run.path), "sha256": file_sha256(run.path / RUN_FILE)},
                "sha256": file_sha256(directory / JSON_FILE),
                "key": content["key"],
            },
        )


def _entries_of(ledger: Ledger | None, lines: Sequence[Line], run: Run) -> list[Entry]:
    """The ledger's entries whose outcome is this run."""
    if ledger is None:
        return []
    done = (entry for entry in read_state(lines).entries.values() if entry.outcome is not None)
    path = run.path.resolve()
    return [e for e in done if ledger.located((e.outcome or {})["run"]["path"]).resolve() == path]


def _request_of(entry: Entry, lines: Sequence[Line]) -> dict[str, Any]:
    answered = next(x.time for x in lines if x.kind == "outcome" and x.content["entry"] == entry.number)
    return {
        "entry": entry.number,
        "subject": entry.subject,
        "requester": entry.requester,
        "reason": entry.reason,
        "received": entry.received.isoformat(),
        "due": entry.due.isoformat(),
        "answered": answered,
        "rows": [id_ for id_, _ in entry.rows],
        "arrived": (entry.outcome or {})["arrived"],
    }


def _restoring(run: Run) -> list[str]:
    """What still gives the adapter before: in the run directory, and the run before itself."""
    found = [f"{name}/ in the run directory" for name in ADAPTERS_BEFORE if (run.path / name).exists()]
    if run.parent is not None and Path(run.parent["path"]).exists():
        found.append("the run before")
    return found


def _measure(
    run: Run,
    receipt: Mapping[str, Any],
    calibration_path: str | os.PathLike[str] | None,
    data_path: str | os.PathLike[str] | None,
    model: Model | None,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """Losses and probes before and after; of what cannot be measured the reason."""
    forget, _, parent, reason = edited_rows(run, data_path)
    if parent is None or not forget:
        return {"not_measured": [f"Nothing is measured anew: {reason or 'the run before is not known.'}"]}
    examples = parent.load_examples(data_path)
    model = parent.load_or_verify_model(model, mesh=mesh)
    calibration = None if calibration_path is None else parent.load_unseen(calibration_path)
    task = UnlearningTask(
        model=model,
        adapter=parent.load_adapter(model),
        data=parent.encode(examples, model.tokenizer),
        requests=data.load_requests(run.path / REQUESTS_FILE, examples),
        training=parent.train_config,
    )
    bench = measures.Bench(
        model=model,
        problem=task.problem,
        heldout=None if calibration is None else parent.encode(calibration, model.tokenizer),
        train=None if parent.unstated else parent.train_config,
    )
    adapters = {"before": task.adapter, "after": run.load_adapter(model)}
    scores = {
        when: measures.measure(bench, model, lora, (*measures.LOSSES, measures.rounding))
        for when, lora in adapters.items()
    }
    groups = {"forget": "named", "replacements": "wanted", "retained": "retained", "calibration": "heldout"}
    found: dict[str, Any] = {
        group: {when: _mean(scores[when].get(part, {}).get("losses", ())) for when in adapters}
        for group, part in groups.items()
    }
    missing = []
    if calibration is None:
        missing.append("Membership: no calibration rows were given.")
    else:
        found["membership_auc"] = {when: _auc(scores[when]) for when in adapters}
    before, after = (found["forget"][when]["mean"] for when in adapters)
    rounded = {when: scores[when]["forget_loss_4_bit"] for when in adapters}
    survival = None if after == before else (rounded["after"] - before) / (after - before)
    found["four_bit"] = {**rounded, "survival": survival}
    found["relearning"] = _relearning(bench, model, adapters["after"], found)
    if not found["relearning"]:
        missing.append("Relearning: how the adapter was trained is not wholly known, or no row is retained.")
    return {**found, "not_measured": missing}


def _mean(losses: Sequence[float]) -> dict[str, float | int] | None:
    """Mean with a 95 % interval from the standard error over rows; None of no row."""
    if not len(losses):
        return None
    error = float(np.std(losses, ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    mean = float(np.mean(losses))
    return {"rows": len(losses), "mean": mean, "low": mean - _NORMAL_95 * error, "high": mean + _NORMAL_95 * error}


def _auc(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """AUC of -loss for the forget rows against the calibration rows, with DeLong's 95 % interval."""
    inside, outside = (-np.asarray(scores[part]["losses"], np.float64) for part in ("named", "heldout"))
    metric = auc_metric("loss", inside, outside)
    value, error = metric.value, metric.standard_error
    if value is None or error is None:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": max(value - _NORMAL_95 * error, 0), "high": min(value + _NORMAL_95 * error, 1)}


def _relearning(
    bench: measures.Bench, model: Model, adapter: Any, found: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Losses of forget and calibration rows after a few steps of training on retained rows."""
    unseen = found["calibration"]["after"]
    curve = [{"steps": 0, "forget": found["forget"]["after"]["mean"], "calibration": unseen and unseen["mean"]}]
    for steps in RELEARNING_STEPS:
        again = measures.relearned(bench, model, adapter, steps)
        if again is None:
            return []
        lora, taken = again
        if taken == curve[-1]["steps"]:
            break  # there are no more rows to learn from
        forget = score_examples(model, lora, bench.problem.examples, bench.problem.named).losses
        outside = None if bench.heldout is None else score_examples(model, lora, bench.heldout).losses
        curve.append(
            {
                "steps": taken,
                "forget": float(forget.mean()),
                "calibration": None if outside is None else float(outside.mean()),
            }
        )
    return curve


def _limits(content: Mapping[str, Any], receipt: Mapping[str, Any]) -> list[str]:
    """What the certificate does not show, in plain words."""
    exact = receipt["method"] == "retrained"
    restores = content["restores"]
    limits = [
        "The adapter was trained anew on data without the rows. It depends on them by nothing but the choices that "
        "were made before, such as the training's settings."
        if exact
        else "The adapter was changed by an approximation of retraining. It is not the adapter that a retraining "
        "would have given, and the measurements are no proof that nothing of the rows is left in it.",
        "Membership inference is measured by one attack, on the loss. Stronger attacks were not tried.",
        "Only this adapter is covered: not other copies of it, merged models, backups, logs, the data that the run "
        "was trained from, or the base model.",
        "What was erased can still be restored from: " + "; ".join(restores) + ". Seal the run and delete the run "
        "before to end that."
        if restores
        else "Nothing in the run directory restores the adapter before, and the run before is not where it was.",
        "A signature shows that this file is what the holder of the key signed. It does not show that the "
        "measurements are right; they can be repeated as long as the texts are kept.",
    ]
    if not receipt["complete"]:
        limits.insert(0, f"The outcome is not called complete: {receipt['outcome']}.")
    return limits + list(content["measured"]["not_measured"])


def _write(directory: Path, content: Mapping[str, Any], receipt: Mapping[str, Any], key: Any) -> None:
    page = _page(content, receipt)
    pages = {HTML_FILE: render_html(page), MARKDOWN_FILE: render_markdown(page)}
    with files.atomic_directory(directory) as temporary:
        for name, text in pages.items():
            files.atomic_write_text(temporary / name, text)
        hashes = {name: file_sha256(temporary / name) for name in pages}
        files.atomic_write_json(temporary / JSON_FILE, {**content, "pages": hashes})
        if key is not None:
            sign_file(temporary / JSON_FILE, key)


def _page(content: Mapping[str, Any], receipt: Mapping[str, Any]) -> Page:
    """The certificate for people."""
    actions = ", ".join(f"{n} {ACTION_NAMES[action]}" for action, n in content["actions"].items() if n)
    own, done, chain = content["run"], content["done"], content["chain"]
    share = content["cost"]["gradient_equivalents"]["share_of_retraining"]
    cost = f"{content['cost']['seconds']:.1f} s" + ("" if share is None else f", {share:.2g} of a retraining")
    signed = "not signed" if content["key"] is None else f"signed with the Ed25519 key `{content['key'][:16]}`"
    verdict = "Complete" if done["complete"] else "Not complete"
    facts = (
        ("rows", f"{actions}, of {own['examples_before']} examples; {own['examples_after']} are left"),
        ("outcome", done["outcome"]),
        ("method", f"{done['method']} (llmeraser {done['versions'].get('llmeraser-jax') or 'from its source'})"),
        ("cost", cost),
        ("since the last training", words_of(receipt)),
        ("adapter (SHA-256)", own["adapter_sha256"]),
        ("receipt (SHA-256)", own["receipt_sha256"]),
        ("ledger", "none" if chain["sha256"] is None else f"line {chain['number']}, {chain['sha256']}"),
    )
    blocks: list[Block] = [
        Text(f"**{verdict}.** {actions} in the adapter `{own['name']}`. Written {content['time']}, {signed}."),
        Heading("Who asked for what, and when"),
        *_request_blocks(content["requests"]),
        Heading("What was done"),
        Table(("", "what"), facts),
        Heading("What was measured"),
        *_measured_blocks(content["measured"]),
        *_row_blocks(content["judged"]),
        Heading("What this does not show"),
        Bullets(tuple(content["limits"])),
        Details("Configuration and versions", (Text(f"`{files.canonical_json(done)}`"),)),
    ]
    return Page("Certificate of erasure", tuple(blocks))


def _request_blocks(requests: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not requests:
        return [Text("The erasure was made without a ledger: who asked for it, and when, is not recorded.")]
    header = ("entry", "subject", "requester", "reason", "received", "due", "answered", "rows", "arrived")
    rows = tuple(
        (
            str(one["entry"]),
            one["subject"],
            one["requester"] or MISSING,
            one["reason"] or MISSING,
            one["received"],
            one["due"],
            one["answered"][:10] + (" (late)" if one["answered"][:10] > one["due"] else ""),
            str(len(one["rows"])),
            str(list(one["arrived"].values()).count(True)),
        )
        for one in requests
    )
    told = "Subjects are pseudonyms; who they are is known to the holder of the ledger's key alone."
    return [Table(header, rows), Text(told)]


def _measured_blocks(measured: Mapping[str, Any]) -> list[Block]:
    if "forget" not in measured:
        return [Text(" ".join(measured["not_measured"]))]

    def between(cell: Mapping[str, Any] | None, name: str) -> str:
        if cell is None:
            return MISSING
        interval = "" if cell["low"] is None else f" ({show_number(cell['low'])} to {show_number(cell['high'])})"
        return f"{show_number(cell[name])}{interval}"

    titles = {
        "forget": "forget rows, as trained",
        "replacements": "their replacements",
        "retained": "retained rows",
        "calibration": "calibration rows, never trained on",
    }
    rows = [
        (f"loss of {title}", *(between(measured[group][when], "mean") for when in ("before", "after")))
        for group, title in titles.items()
        if measured[group]["after"] is not None
    ]
    if "membership_auc" in measured:
        auc = measured["membership_auc"]
        rows.append(("membership AUC of the forget rows", *(between(auc[w], "value") for w in ("before", "after"))))
    four = measured["four_bit"]
    rows.append(("loss of forget rows, weights in 4 bits", show_number(four["before"]), show_number(four["after"])))
    kept = "" if four["survival"] is None else f" {four['survival']:.0%} of the change survives rounding to 4 bits."
    blocks: list[Block] = [
        Text(
            "Losses in nats per token, and the chance that a forget row looks more like a trained one than a "
            f"calibration row does (0.5: cannot be told apart), with 95 % intervals over rows.{kept}"
        ),
        Table(("", "before", "after"), tuple(rows)),
    ]
    if measured["relearning"]:
        told = (
            "What a few steps of training on retained rows bring back. Calibration rows show what such a training "
            "does to rows that it does not know."
        )
        header = ("steps", "loss of forget rows", "loss of calibration rows")
        curve = tuple(
            (str(point["steps"]), show_number(point["forget"]), show_number(point["calibration"]))
            for point in measured["relearning"]
        )
        blocks += [Text(told), Table(header, curve)]
    return blocks


def _row_blocks(judged: Mapping[str, Any] | None) -> list[Block]:
    """Every forget row as the erasure's own check saw it."""
    if judged is None:
        return []
    words = {True: "arrived", False: "not arrived", None: "not judged"}
    rows = tuple(
        (
            row["id"],
            row["part"],
            *(show_number(row[when]) for when in ("before", "target", "after")),
            words[row["arrived"]],
        )
        for row in judged["rows"]
    )
    header = ("row", "part", "before", "target", "after", "outcome")
    return [Details("Every row, as the erasure checked it", (Table(header, rows),))]
