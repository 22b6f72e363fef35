"""Installs a checkout with what the examples need, and never replaces the machine's jax.

    python examples/install.py FOLDER

A TPU or GPU machine has the jax that fits its driver. pip is asked first what it would do; if it
would replace jax or NumPy, nothing is installed and it is said why. Needs the standard library
alone.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def replaced(plan: Mapping[str, Any], installed: Mapping[str, str]) -> list[str]:
    """What of the machine's own pip would replace: jax, its plugins, libtpu and NumPy.

    Args:
      plan: what ``pip install --dry-run --report`` writes.
      installed: from names as pip writes them, lower case, to versions.

    Returns:
      One line a package, ``"jax 0.6.0 by 0.10.2"``.
    """
    lines = []
    for item in plan["install"]:
        name = item["metadata"]["name"].lower().replace("_", "-")
        new, old = item["metadata"]["version"], installed.get(name)
        ours = name in {"libtpu", "numpy"} or name.startswith("jax")
        if ours and old is not None and old != new:
            lines.append(f"{name} {old} by {new}")
    return lines


def install(folder: str | Path, extra: str = "examples") -> None:
    """Installs the checkout in ``folder`` into this Python, or raises.

    Raises:
      RuntimeError: pip would replace the machine's jax, or fails.
    """
    what = f"{Path(folder).resolve()}[{extra}]"
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "plan.json"
        _pip("install", "--dry-run", "--report", str(report), what)
        plan = json.loads(report.read_text())
    installed = {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"]
    }
    if lines := replaced(plan, installed):
        raise RuntimeError(
            f"Nothing was installed: pip would replace {', '.join(lines)}, which this machine came"
            " with. Take a newer runtime, or a version of this library that fits the jax there is."
        )
    _pip("install", what)
    print(f"Installed; jax {importlib.metadata.version('jax')} is the machine's own.")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    install(sys.argv[1])
