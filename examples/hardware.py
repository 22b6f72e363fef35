"""Where and with what a record was made."""

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import jax


def hardware() -> dict[str, Any]:
    """Device, cores this process may use, versions, date."""
    return {
        "device": jax.devices()[0].device_kind,
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
