"""Deletion requests: a ledger of them, what is measured of each, sealing, and what can be shown to an auditor."""

from llmeraser_jax.deletion.audit import verify, verify_ledger
from llmeraser_jax.deletion.certificate import certify, verify_certificate
from llmeraser_jax.deletion.findings import Finding
from llmeraser_jax.deletion.ledger import Ledger, LedgerError
from llmeraser_jax.deletion.pending import Entry, add_entry, one_month_later, read_state
from llmeraser_jax.deletion.process import Processed, process_queue
from llmeraser_jax.deletion.seal import SEAL_FILE, Seal, seal, sealed_state, undo
from llmeraser_jax.deletion.verify import verify_directory

__all__ = [
    "SEAL_FILE",
    "Entry",
    "Finding",
    "Ledger",
    "LedgerError",
    "Processed",
    "Seal",
    "add_entry",
    "certify",
    "one_month_later",
    "process_queue",
    "read_state",
    "seal",
    "sealed_state",
    "undo",
    "verify",
    "verify_certificate",
    "verify_directory",
    "verify_ledger",
]
