"""Fine-tunes the tiny model once; a test runs this in a process of its own and kills it."""

import sys

from llmeraser_jax.models import load_model
from llmeraser_jax.training.job import finetune_run
from tests.training import tiny

if __name__ == "__main__":
    model_path, data_path, workdir, cache = sys.argv[1:]
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    finetune_run(load_model(model_path), data_path, workdir, recipe=tiny.RECIPE, lora=tiny.LORA, config=tiny.CONFIG)
