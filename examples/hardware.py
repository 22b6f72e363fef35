"""Where and with what a record was made."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax


def hardware() -> dict[str, Any]:
    """Device, precision of float32 products, processor, cores it may use, versions, date."""
    return {
        "device": jax.devices()[0].device_kind,
        "matmul_precision": jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        or "default",
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("jax", "jaxlib", "optax", "flax", "numpy")
        },
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    """As the system calls it; "" where it does not say."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2] for line in told.splitlines() if line.startswith("model name"))
    return next(names, "").strip()
