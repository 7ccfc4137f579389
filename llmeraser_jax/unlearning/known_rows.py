"""Losses of rows under the adapter as trained, kept for the next request on the same adapter.

They depend on the adapter alone, not on the request: targets and the validity check ask for those of calibration
rows and of samples of trained rows. The file lies in the run that is erased from. It holds losses by the row's
place in the data, and no text; what belongs to another adapter is not used.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmeraser_jax import files
from llmeraser_jax.data import TokenDataset
from llmeraser_jax.runs import Run
from llmeraser_jax.types import ExampleSet

KNOWN_ROWS_FILE = "known_rows.json"
FORMAT = 1

_log = logging.getLogger(__name__)


class KnownRows:
    """Loss and log-odds of rows under one adapter, by set and place.

    Attributes:
        sets: the data sets whose rows are kept, by name.
        found: how many values were taken from here instead of computed.
    """

    def __init__(self, sets: Mapping[str, tuple[ExampleSet, int]]):
        """Nothing known yet.

        Args:
            sets: `trained` and `calibration`, each with how many of its first rows may be kept.
        """
        self.sets = dict(sets)
        self.found = 0
        self._values: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in sets}

    def name_of(self, examples: ExampleSet) -> str | None:
        """Which of the sets it is; None where it is none of them."""
        return next((name for name, (own, _) in self.sets.items() if own is examples), None)

    def split(self, examples: ExampleSet, rows: np.ndarray) -> np.ndarray:
        """[rows] whether each is known."""
        values = self._values.get(self.name_of(examples) or "", {})
        return np.array([int(row) in values for row in rows], bool)

    def take(self, examples: ExampleSet, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses and log-odds of rows that are all known."""
        values = self._values.get(self.name_of(examples) or "", {})
        self.found += len(rows)
        pairs = np.array([values[int(row)] for row in rows], np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def keep(self, examples: ExampleSet, rows: np.ndarray, losses: np.ndarray, log_odds: np.ndarray) -> None:
        """Remembers rows that were computed; those that are not finite are computed again."""
        name = self.name_of(examples)
        if name is None:
            return
        _, limit = self.sets[name]
        for row, loss, odds in zip(rows.tolist(), losses.tolist(), log_odds.tolist(), strict=True):
            if row < limit and np.isfinite(loss) and np.isfinite(odds):
                self._values[name][row] = (loss, odds)

    def load(self, run: Run) -> None:
        """Takes what an earlier request left in the run."""
        path = run.path / KNOWN_ROWS_FILE
        if not path.is_file():
            return
        try:
            kept = files.read_json(path)
            if kept["format"] != FORMAT or kept["belongs_to"] != _belongs_to(run):
                return
            for name, (examples, _) in self.sets.items():
                held = kept["sets"].get(name)
                if held is not None and held["check"] == _check(name, examples, held["key"]):
                    self._values[name] = {int(row): (loss, odds) for row, (loss, odds) in held["values"].items()}
        except (KeyError, TypeError, ValueError, OSError) as error:
            _log.warning("%s is not used: %s.", path, error)

    def save(self, run: Run) -> None:
        """Leaves what is known in the run, for the next request; a directory that is not ours to write is left."""
        path = run.path / KNOWN_ROWS_FILE
        key = secrets.token_hex(32)
        sets = {
            name: {
                "key": key,
                "check": _check(name, examples, key),
                "values": {str(row): pair for row, pair in sorted(self._values[name].items())},
            }
            for name, (examples, _) in self.sets.items()
        }
        try:
            files.atomic_write_json(path, {"format": FORMAT, "belongs_to": _belongs_to(run), "sets": sets})
        except OSError as error:
            _log.warning("%s is not written: %s.", path, error)


def _belongs_to(run: Run) -> dict[str, Any]:
    """What the values depend on besides the rows."""
    return {
        "adapter": run.adapter_sha256,
        "model": run.model_sha256,
        "dtype": run.model_dtype,
        "quantization": run.model_quantization,
        "matmul_precision": run.matmul_precision,
    }


def _check(name: str, examples: ExampleSet, key: str) -> str:
    """HMAC of the calibration rows' tokens and loss masks; that trained rows are the run's, the run checks."""
    mac = hmac.new(bytes.fromhex(key), name.encode(), hashlib.sha256)
    if name == "calibration" and isinstance(examples, TokenDataset):
        for sha256 in examples.token_sha256.values():
            mac.update(sha256.encode())
    return mac.hexdigest()
