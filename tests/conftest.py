"""Set-up shared by all tests: eight CPU devices, run-time shape checks, compiled programs kept on disk alone."""

import gc
import logging
import os
from importlib.metadata import version
from pathlib import Path

# Read when jax is imported, here and in the processes that tests start. Most of the suite's time is compilation,
# and XLA's expensive passes do not pay for programs that run a few times: 40 % less time on the curvature tests.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The newer emitters of fused loops take more than half of what compiling then still takes; from jaxlib 0.12 on they
# are the only ones, and an unknown flag ends the process. A file of Hessian products: 137 s of CPU, now 68.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Programs are kept on disk for the other workers, the files that come after (see `_drop_compiled_programs`) and the
# next run; `pytest --cache-clear` removes them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)

# Before the first import of the package: the shapes in its signatures are checked at every call.
install_import_hook("llmeraser_jax", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs():
    """Every program that XLA compiled for the CPU keeps a few memory maps, and a process may have 65,530 of them.

    One worker goes through several files; without this a long run ends in LLVM's abort or a segmentation fault.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _levels_of_loggers():
    """Commands and experiments set levels for their whole process."""
    yield
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "llmeraser_jax"]:
        logging.getLogger(name).setLevel(logging.NOTSET)
