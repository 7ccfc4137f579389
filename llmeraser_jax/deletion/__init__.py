"""Deletion that can be shown: sealing an erasure, undoing it before that, checking a directory and its record."""

from llmeraser_jax.deletion.seal import SEAL_FILE, Seal, seal, sealed_state, undo
from llmeraser_jax.deletion.verify import Finding, verify_directory

__all__ = [
    "SEAL_FILE",
    "Finding",
    "Seal",
    "seal",
    "sealed_state",
    "undo",
    "verify_directory",
]
