"""Deletion requests: a ledger of them, what is measured of each, and what can be shown to an auditor."""

from llmeraser_jax.deletion.audit import verify_ledger
from llmeraser_jax.deletion.certificate import certify, verify_certificate
from llmeraser_jax.deletion.findings import Finding
from llmeraser_jax.deletion.ledger import Ledger, LedgerError
from llmeraser_jax.deletion.pending import Entry, add_entry, one_month_later, read_state
from llmeraser_jax.deletion.process import Processed, process_queue

__all__ = [
    "Entry",
    "Finding",
    "Ledger",
    "LedgerError",
    "Processed",
    "add_entry",
    "certify",
    "one_month_later",
    "process_queue",
    "read_state",
    "verify_certificate",
    "verify_ledger",
]
