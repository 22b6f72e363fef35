"""Where and with what a record was made."""

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import jax


def hardware() -> dict[str, Any]:
    """Device, precision of float32 products, cores this process may use, versions, date."""
    return {
        "device": jax.devices()[0].device_kind,
        "matmul_precision": jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        or "default",
        "machine": platform.machine(),
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
