"""Set-up shared by all tests: eight CPU devices and run-time shape checks.

No persistent compilation cache: on CPU, reading some programs back aborted the process (jaxlib 0.10.2). Whoever
wants one all the same sets JAX_COMPILATION_CACHE_DIR.
"""

import os

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Before the first import of the package: the shapes in its signatures are checked at every call.
install_import_hook("llmeraser_jax", "beartype.beartype")
