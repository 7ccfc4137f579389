"""Owns what a study's command prints and keeps besides records: logging, its report and its page."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from experiments.study.options import StudyOptions
from experiments.study.study import Scenario, logger, run_study
from llmeraser_jax import files
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.evaluation.job import page_of
from llmeraser_jax.evaluation.page import terminal_blocks
from llmeraser_jax.evaluation.render import render_text, write_page
from llmeraser_jax.evaluation.summary import REPORT_FILE, summarise


def set_up_logging() -> None:
    """Progress to standard error; what each encoding would tell anew, the READMEs say once."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    logging.getLogger("llmeraser_jax.data").setLevel(logging.ERROR)


def show(scenario: Scenario, workdir: Path, options: StudyOptions) -> None:
    """Runs a study, keeps `report.json`, `report.html` and `report.md` beside its records, and prints the first
    table.

    Args:
        scenario: what.
        workdir: of this scenario.
        options: which methods, and how often.
    """
    report = summarise(run_study(scenario, workdir, options))
    files.atomic_write_json(workdir / REPORT_FILE, report)
    page = write_page(page_of(report), workdir)
    named, of = report["named"]["total"], report["num_examples"]
    sys.stdout.write(
        f"\n{report['name']}: {named} of {of} examples named\n\n{render_text(terminal_blocks(report))}"
    )
    sys.stdout.write(f"\nReport: {page}\n{describe_devices()}; {json.dumps(library_versions())}\n")
