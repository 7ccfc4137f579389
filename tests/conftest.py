"""Set-up shared by all tests: eight CPU devices, a persistent compilation cache, run-time shape checks."""

import os
import pathlib

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Before the first import of the package: the shapes in its signatures are checked at every call.
install_import_hook("llmeraser_jax", "beartype.beartype")
