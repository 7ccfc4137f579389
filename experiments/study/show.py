"""Owns what a study's command prints and keeps besides numbers: logging, tables, a plot."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from experiments.study.study import Scenario, logger, run_study
from experiments.study.table import render_plot, render_tables
from llmeraser_jax import files


def set_up_logging() -> None:
    """Progress to standard error; what each encoding would tell anew, the READMEs say once."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    logging.getLogger("llmeraser_jax.data").setLevel(logging.ERROR)


def show(scenario: Scenario, workdir: Path, **options: Any) -> None:
    """Runs a study, keeps `table.md` and `plot.png` beside its results, and prints the tables.

    Args:
        scenario: what.
        workdir: of this scenario.
        options: of `run_study`.
    """
    results = run_study(scenario, workdir, **options)
    tables = render_tables(results)
    files.atomic_write_text(workdir / "table.md", tables)
    (workdir / "plot.png").write_bytes(render_plot(results))
    counts = results["scenario"]
    sys.stdout.write(
        f"\n{counts['name']}: {counts['num_named']} of {counts['num_rows']} rows named, "
        f"{counts['num_truncated']} prompts cut, {counts['num_unseen']} unseen rows\n\n{tables}"
    )
    sys.stdout.write(f"\n{results['devices']}; {json.dumps(results['versions'])}\n")
