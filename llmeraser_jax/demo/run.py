"""`llmeraser demo`: fine-tune, erase, retrain and compare on the embedded people, and say what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from llmeraser_jax.data import Action, Recipe, Request, load_requests
from llmeraser_jax.demo.people import make_directory, write_demo_files
from llmeraser_jax.evaluation.job import evaluate_runs
from llmeraser_jax.evaluation.render import HTML_FILE
from llmeraser_jax.files import require_empty
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import load_model
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.training.retrain import retrain
from llmeraser_jax.unlearning import erase_run

REQUIRED_CLOSURE = 0.5
NUM_RETRAINED = 2
NUM_PEOPLE = 60
TRAIN = TrainConfig(
    epochs=40, batch_size=16, learning_rate=4e-3, warmup_ratio=0.1, l2=1e-3, checkpoint_every_steps=1000
)
RECIPE = Recipe(add_bos=True)  # as the embedded base was pretrained; its tokenizer adds none by itself
LORA = LoraConfig(rank=8, alpha=16.0, target_modules="all-linear")
CHUNK_SIZE = 32

_VERBS = {
    Action.REMOVE: "removed",
    Action.MODIFY_QUERY: "query modified",
    Action.CORRECT_RESPONSE: "response corrected",
}


def _free_directory() -> Path:
    """`llmeraser-demo` here, or the first of `llmeraser-demo-2`, `-3`, ... that is not there."""
    number, path = 1, Path("llmeraser-demo")
    while path.exists():
        number += 1
        path = Path(f"llmeraser-demo-{number}")
    return path


def run_demo(workdir: Path | None = None, *, say: Callable[[str], None]) -> int:
    """Runs the demo.

    Args:
        workdir: new or empty; None is the first free name in the current directory.
        say: takes each line of the result.

    Returns:
        0 when at least half of every action's gap to retraining is closed, else 1.

    Raises:
        FileExistsError: `workdir` holds something.
    """
    workdir = _free_directory() if workdir is None else workdir
    require_empty(workdir)
    started = time.perf_counter()
    write_demo_files(workdir / "data", make_directory(NUM_PEOPLE))
    with as_file(files("llmeraser_jax.demo") / "base") as base:
        model = load_model(base)
        say("1/4  fine-tuning a small Llama on a directory of fictitious people")
        before = finetune_run(
            model,
            workdir / "data" / "train.jsonl",
            workdir / "before",
            recipe=RECIPE,
            lora=LORA,
            config=TRAIN,
        )
        say(f"     loss {before.result['loss']:.3f} after {before.result['seconds']:.0f} s")
        say("2/4  erasing what data/requests.jsonl names")
        requests_path = workdir / "data" / "requests.jsonl"
        unseen = workdir / "data" / "unseen.jsonl"
        after, result = erase_run(
            before,
            requests_path,
            workdir / "unlearned",
            chunk_size=CHUNK_SIZE,
            model=model,
            calibration_path=unseen,
        )
        assert result.receipt is not None  # of the package's own methods
        say(f"     {result.receipt.outcome}; {result.seconds:.0f} s")
        say(f"3/4  retraining on the edited data, {NUM_RETRAINED} seeds, for comparison")
        requests = load_requests(requests_path, before.load_examples())
        retrained = retrain(before, requests, workdir / "retrained", seeds=NUM_RETRAINED, model=model)
        say("     " + ", ".join(f"{run.result['seconds']:.0f} s" for run in retrained))
        say("4/4  comparing")
        report = evaluate_runs(
            before,
            after,
            workdir / "report",
            retrained=retrained,
            heldout_path=workdir / "data" / "heldout.jsonl",
            show_texts=True,
            model=model,
        )
    say("")
    for line in _answer_table(report, requests):
        say(line)
    say("")
    passed = True
    for line, holds in _closure_lines(report):
        say(line)
        passed = passed and holds
    say("")
    say(f"Report: {workdir / 'report' / HTML_FILE}   ({time.perf_counter() - started:.0f} s in all)")
    return 0 if passed else 1


def _answer_table(report: Mapping[str, Any], requests: Sequence[Request]) -> list[str]:
    """For one person of each action: what the models answer. A modified query is shown old and new."""
    lines = [f"{'':<19}{'question':<38}{'before':<14}{'unlearned':<14}{'retrained':<14}"]

    def line(title: str, question: str, answers: Mapping[str, str], note: str) -> None:
        cells = "".join(f"{answers[model]:<14}" for model in ("before", "unlearned", "retrained"))
        lines.append(f"{title:<19}{question:<38}{cells}({note})")

    for action, verb in _VERBS.items():
        chosen = next(request.id for request in requests if request.action is action)
        row = next(row for row in report["named_examples"] if row["id"] == chosen)
        texts, answers = row["texts"], row["answers"]
        wanted = f" wanted: {texts['wanted']}" if action is Action.CORRECT_RESPONSE else ""
        line(verb, texts["query"], answers["named"], f"trained on: {texts['trained']}{wanted}")
        if action is Action.MODIFY_QUERY:
            line("  its new query", texts["wanted_query"], answers["wanted"], f"wanted: {texts['wanted']}")
    return lines


def _closure_lines(report: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Per action: how much of the gap to retraining is closed, in words, and whether that is enough."""
    lines = [("Gap to retraining that erasing closed (1.00: no difference is left; needed here: 0.50)", True)]
    names = {"forget_loss": "the answer trained on", "wanted_loss": "the answer wanted"}
    by_action = report["gap_closure"]["by_action"]
    for action, verb in _VERBS.items():
        for quantity, words in names.items():
            if quantity not in by_action[action]:
                continue
            closure = by_action[action][quantity]
            losses = [
                report["models"][model][f"{quantity}_by_action"][action]
                for model in ("before", "unlearned", "retrained")
            ]
            shown = "undefined: " + by_action[action]["reason"][quantity] if closure is None else f"{closure:.2f}"
            line = f"  {verb:<19}loss on {words:<22}{losses[0]:.2f} -> {losses[1]:.2f} (retrained {losses[2]:.2f})"
            lines.append((f"{line:<86}{shown}", closure is not None and closure >= REQUIRED_CLOSURE))
    return lines
