"""What a result was computed on: library versions, devices, peak memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "llmeraser-jax")


def library_versions() -> dict[str, str | None]:
    """Versions of Python and the libraries a result depends on; None for one used without installation."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None  # the package itself, used from its source tree

    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def describe_devices() -> str:
    """The devices in words, e.g. `1 x cpu` or `8 x NVIDIA H200`."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def peak_memory_bytes() -> int:
    """Largest memory in use so far: the first device's where it keeps count, else this process's resident set."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def compile_quickly() -> None:
    """Halves what XLA takes to compile for a CPU; its programs take as long to run as by default.

    XLA reads this when JAX looks at its devices, which is later. What `XLA_FLAGS` says already stays.
    """
    if any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu")):
        return  # the level counts on accelerators too
    given = os.environ.get("XLA_FLAGS", "")
    flags = ["--xla_backend_optimization_level=1"]
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
        # From jaxlib 0.12 on there are no other emitters, and an unknown flag ends the process.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    wanted = [flag for flag in flags if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *wanted]).strip()


def keep_compiled_programs() -> None:
    """Keeps all that XLA compiles in the user's cache directory, for the next command.

    `JAX_COMPILATION_CACHE_DIR` names another directory, and `JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing.
    """
    settings: Any = jax.config  # whose attributes are made at run time
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default only what takes a second is kept; on a small model that is a tenth of the programs.
        settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if settings.jax_enable_compilation_cache and settings.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        settings.update("jax_compilation_cache_dir", str(home / "llmeraser" / "xla"))
