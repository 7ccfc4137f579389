"""Owns what a study's command prints and keeps besides numbers: logging, tables, a plot."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from experiments.study.options import StudyOptions
from experiments.study.study import Scenario, logger, run_study
from llmeraser_jax import files
from llmeraser_jax.evaluation.study_page import render_study


def set_up_logging() -> None:
    """Progress to standard error; what each encoding would tell anew, the READMEs say once."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    logging.getLogger("llmeraser_jax.data").setLevel(logging.ERROR)


def show(scenario: Scenario, workdir: Path, options: StudyOptions) -> None:
    """Runs a study, keeps `table.md` and `plot.png` beside its results, and prints the tables.

    Args:
        scenario: what.
        workdir: of this scenario.
        options: which methods, and how often.
    """
    results = run_study(scenario, workdir, options)
    tables, plot = render_study(results, "plot.png")
    told = results.manifest
    files.atomic_write_text(workdir / "table.md", tables)
    if plot is not None:
        (workdir / "plot.png").write_bytes(plot)
    sys.stdout.write(
        f"\n{told.name}: {sum(told.named.values())} of {told.num_examples} rows named, "
        f"{told.num_truncated} prompts cut, {told.num_unseen} unseen rows\n\n{tables}"
    )
    sys.stdout.write(f"\n{told.devices}; {json.dumps(told.versions)}\n")
