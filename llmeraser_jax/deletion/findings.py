"""What a check found: one line for the auditor, and whether it is as it should be."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        ok: whether it is as it should be.
        detail: what was found, in words.
    """

    name: str
    ok: bool
    detail: str
