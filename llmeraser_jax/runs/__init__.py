"""Run directories: an adapter, how it was trained, and on what."""

from llmeraser_jax.runs.directory import (
    ADAPTER_DIRECTORY,
    CHECKPOINT_DIRECTORY,
    EXAMPLES_FILE,
    FEATURES_DIRECTORY,
    FORMAT_VERSION,
    INITIAL_ADAPTER_DIRECTORY,
    KINDS,
    RUN_FILE,
    TOKENIZER_DIRECTORY,
    Run,
    RunError,
    differing_settings,
    load_run,
    run_settings,
    write_run,
)
from llmeraser_jax.runs.keys import KEY_FILE, KEYED, PLAIN, RunKeys
from llmeraser_jax.runs.model_files import (
    base_dtype,
    copy_tokenizer,
    file_sha256,
    model_directory,
    model_fingerprint,
)
from llmeraser_jax.runs.train_config import TrainConfig

__all__ = [
    "ADAPTER_DIRECTORY",
    "CHECKPOINT_DIRECTORY",
    "EXAMPLES_FILE",
    "FEATURES_DIRECTORY",
    "FORMAT_VERSION",
    "INITIAL_ADAPTER_DIRECTORY",
    "KEYED",
    "KEY_FILE",
    "KINDS",
    "PLAIN",
    "RUN_FILE",
    "TOKENIZER_DIRECTORY",
    "Run",
    "RunError",
    "RunKeys",
    "TrainConfig",
    "base_dtype",
    "copy_tokenizer",
    "differing_settings",
    "file_sha256",
    "load_run",
    "model_directory",
    "model_fingerprint",
    "run_settings",
    "write_run",
]
