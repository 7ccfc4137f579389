"""Unlearning: requests to right-hand sides, moves of the adapter, receipts."""
