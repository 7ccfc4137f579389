"""Finding what a directory holds: the result of `llmeraser erase`, `retrain`, `evaluate`, a training, or a study.

A directory is told by its files. One that is none of these but holds some is read as those; anything else is
refused by name, so that a page never leaves out silently what it was asked to show.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeraser_jax import files
from llmeraser_jax.evaluation.report import FORMAT, REPORT_FILE
from llmeraser_jax.evaluation.study import STUDY_FILE, Study, is_study, read_study
from llmeraser_jax.runs import RUN_FILE, Run, RunError, load_run
from llmeraser_jax.unlearning.job import RECEIPT_FILE
from llmeraser_jax.unlearning.receipt import RECEIPT_FORMAT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A directory of `llmeraser evaluate`.

    Attributes:
        path: the directory.
        report: its `report.json`.
    """

    path: Path
    report: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erasure:
    """A directory of `llmeraser erase`.

    Attributes:
        run: the run directory that it is.
        receipt: its `receipt.json`.
    """

    run: Run
    receipt: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathered:
    """What was found, each in the order it was named.

    Attributes:
        evaluations: of `evaluate`.
        erasures: of `erase`.
        retrainings: finished seeds of `retrain`.
        trainings: of `finetune` and `adopt`.
        studies: several ways to forget on one request.
    """

    evaluations: tuple[Evaluation, ...]
    erasures: tuple[Erasure, ...]
    retrainings: tuple[Run, ...]
    trainings: tuple[Run, ...]
    studies: tuple[Study, ...]


def gather(directories: Sequence[str | os.PathLike[str]]) -> Gathered:
    """Reads any number of directories; one named twice, or by itself and with its parent, counts once.

    Args:
        directories: each made by `evaluate`, `erase`, `retrain`, `finetune`, `adopt` or a study, or holding such
            directories.

    Raises:
        RunError: there is none, or some are nothing of the kind; all of them are named with what they hold.
    """
    found: dict[Path, Evaluation | Erasure | Run | Study] = {}
    problems = []
    for name in directories:
        path = Path(name)
        try:
            for part in _parts(path):
                found.setdefault(part.resolve(), _read(part))
        except (RunError, FileNotFoundError) as error:
            problems.append(str(error))
    if not directories:
        problems.append("No directory was named.")
    if problems:
        raise RunError("\n".join(problems))
    runs = [entry for entry in found.values() if isinstance(entry, Run)]
    return Gathered(
        evaluations=tuple(entry for entry in found.values() if isinstance(entry, Evaluation)),
        erasures=tuple(entry for entry in found.values() if isinstance(entry, Erasure)),
        retrainings=tuple(run for run in runs if run.kind == "retrain"),
        trainings=tuple(run for run in runs if run.kind != "retrain"),
        studies=tuple(entry for entry in found.values() if isinstance(entry, Study)),
    )


def _is_result(path: Path) -> bool:
    return is_study(path) or any((path / name).is_file() for name in (RUN_FILE, REPORT_FILE))


def _parts(path: Path) -> list[Path]:
    """The directory itself, or the results right below it."""
    if not path.is_dir():
        msg = f"{path} is {'a file' if path.exists() else 'not there'}; name a directory."
        raise FileNotFoundError(msg)
    if _is_result(path):
        return [path]
    below = sorted(entry for entry in path.iterdir() if entry.is_dir() and _is_result(entry))
    if not below:
        held = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(held[:6]) + (" and more" if len(held) > 6 else "") if held else "nothing"
        msg = (
            f"{path} was not made by evaluate, erase, retrain, finetune, adopt or a study: neither it nor a "
            f"directory in it has {REPORT_FILE}, {RUN_FILE} or {STUDY_FILE} (it holds {shown})."
        )
        raise RunError(msg)
    return below


def _read(path: Path) -> Evaluation | Erasure | Run | Study:
    if is_study(path):
        return read_study(path)
    if (path / RUN_FILE).is_file():
        run = load_run(path)
        if run.kind != "erase":
            return run
        receipt = files.read_json(path / RECEIPT_FILE)
        # Later formats add fields; what an earlier one lacks is shown as not recorded.
        if not isinstance(receipt, dict) or receipt.get("format") not in range(1, RECEIPT_FORMAT + 1):
            msg = f"{path / RECEIPT_FILE} is no receipt of a format up to {RECEIPT_FORMAT}."
            raise RunError(msg)
        return Erasure(run=run, receipt=receipt)
    report = files.read_json(path / REPORT_FILE)
    if not isinstance(report, dict) or report.get("format") != FORMAT or "models" not in report:
        msg = f"{path / REPORT_FILE} is no report of `llmeraser evaluate` in format {FORMAT}."
        raise RunError(msg)
    return Evaluation(path=path, report=report)
