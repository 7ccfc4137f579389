"""Keyed hashes: whoever has a run's key can check content against them, and nobody else learns anything.

A plain hash of a short text tells the text to everybody who can guess it. The hashes here are HMAC-SHA-256 under a
key of 32 random bytes that is drawn for every run directory and lies in a file of its own, `hash.key`, which its
owner alone can read. Without that file the hashes of the run can be linked to nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmeraser_jax import files

KEY_FILE = "hash.key"
KEYED = "hmac-sha256"
PLAIN = "sha256"  # of run directories without a key
_NUM_BYTES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunKeys:
    """The keys of one run directory.

    Attributes:
        own: of every hash of the run but those of held-out rows; no other directory has it.
        heldout: of the hashes of rows that erasures were shown as never trained on; erasures take it over from the
            run before, so that what was shown to one is known to all that follow.
    """

    own: bytes = dataclasses.field(repr=False)
    heldout: bytes = dataclasses.field(repr=False)

    @classmethod
    def new(cls, *, heldout: bytes | None = None) -> RunKeys:
        """Random keys, but for the one given."""
        drawn = secrets.token_bytes(_NUM_BYTES)
        return cls(own=drawn, heldout=secrets.token_bytes(_NUM_BYTES) if heldout is None else heldout)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> RunKeys | None:
        """The keys in a run directory; None where the file is not there.

        Raises:
            ValueError: the file holds something else.
        """
        path = Path(directory) / KEY_FILE
        if not path.exists():
            return None
        try:
            own, heldout = (bytes.fromhex(line) for line in path.read_text(encoding="ascii").split())
            if len(own) != _NUM_BYTES or len(heldout) != _NUM_BYTES:
                raise ValueError
        except ValueError:
            msg = f"{path} does not hold two keys of {_NUM_BYTES} bytes, one hexadecimal line each; put it back."
            raise ValueError(msg) from None
        return cls(own=own, heldout=heldout)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the file, readable by its owner alone; replaces one that is there."""
        content = f"{self.own.hex()}\n{self.heldout.hex()}\n"
        files.atomic_write_bytes(Path(directory) / KEY_FILE, content.encode("ascii"), mode=0o600)

    @property
    def check(self) -> str:
        """Tells these keys from others, without telling them."""
        return _hmac(self.own, "keys", self.heldout)

    def example(self, sha256: str) -> str:
        """Of an example, from its `data.content_hash`."""
        return _hmac(self.own, "example", sha256.encode())

    def tokens(self, sha256: str) -> str:
        """Of tokens and loss mask, from `EncodedExample.sha256`."""
        return _hmac(self.own, "tokens", sha256.encode())

    def shown(self, sha256: str) -> str:
        """Of a held-out example, from its `data.content_hash`."""
        return _hmac(self.heldout, "held-out example", sha256.encode())

    def file(self, path: Path) -> str:
        """Of a file's bytes, which are streamed."""
        with open(path, "rb") as file:
            return _hmac(self.own, "file", hashlib.file_digest(file, "sha256").digest())

    def mac(self, record: Mapping[str, Any]) -> str:
        """Of a JSON object, without its key `mac`; white space and the order of keys do not count."""
        rest = {name: value for name, value in record.items() if name != "mac"}
        return _hmac(self.own, "record", files.canonical_json(rest).encode())


def _hmac(key: bytes, what: str, content: bytes) -> str:
    """HMAC-SHA-256 (hex); `what` keeps hashes of different things apart."""
    return hmac.new(key, what.encode() + b"\0" + content, hashlib.sha256).hexdigest()
