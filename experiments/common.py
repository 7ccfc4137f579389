"""Owns what experiments share besides the comparison: settings, the demo's base, logging, drawn rows."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import as_file
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro

from llmeraser_jax import files
from llmeraser_jax.models import Model, load_model

T = TypeVar("T")


def claim_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a directory that was made with other settings, and keeps these in a new one.

    Raises:
        ValueError: names what differs.
    """
    path = directory / "settings.json"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        files.atomic_write_json(path, settings)
        return
    found, wanted = files.read_json(path), json.loads(files.to_json(settings))
    differing = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if differing:
        listed = "; ".join(f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in differing)
        msg = f"{directory} was made with other settings ({listed}). Repeat them, or name another workdir."
        raise ValueError(msg)


def load_demo_base() -> Model:
    """The base model that the demo ships."""
    with as_file(resources("llmeraser_jax.demo") / "base") as base:
        return load_model(base)


def log_progress(*names: str) -> None:
    """Sends the progress of the named loggers to standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    for name in names:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("llmeraser_jax.data").setLevel(logging.ERROR)  # every encoding would repeat its warnings


def draw(rows: Sequence[T], count: int, seed: int) -> tuple[T, ...]:
    """A seeded choice of rows, in their order.

    Raises:
        ValueError: more are asked for than there are.
    """
    if count > len(rows):
        msg = f"{count} rows were asked for, and there are {len(rows)}."
        raise ValueError(msg)
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return tuple(rows[k] for k in sorted(chosen.tolist()))


def spread(rows: Sequence[T], count: int) -> tuple[T, ...]:
    """At most `count` rows, evenly spaced over those that there are."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return tuple(rows[k] for k in places)


def require_shares(config: Any, *names: str) -> None:
    """Refuses fields that are no share between 0 and 1.

    Raises:
        ValueError: names the first one.
    """
    for name in names:
        if not 0 < getattr(config, name) < 1:
            msg = f"{name} is {getattr(config, name)}; it must lie between 0 and 1."
            raise ValueError(msg)


def command_line(presets: Mapping[str, T], args: Sequence[str] | None = None) -> T:
    """Reads `<preset> --flag value ...`: a preset by name, with what the flags change."""
    return tyro.extras.overridable_config_cli(
        {name: (f"the preset {name}", preset) for name, preset in presets.items()}, args=args
    )
