"""Owns what the experiments' working directories share: settings that must not change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmeraser_jax import files


def claim_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a task directory that was made with other settings.

    Raises:
        ValueError: names what differs.
    """
    path = directory / "settings.json"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        files.atomic_write_json(path, settings)
        return
    found = files.read_json(path)
    wanted = _as_json(settings)
    differing = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if differing:
        listed = "; ".join(f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in differing)
        msg = f"{directory} was made with other settings ({listed}). Repeat them, or name another workdir."
        raise ValueError(msg)


def _as_json(value: Any) -> Any:
    return json.loads(files.to_json(value))
