"""Installs a checkout with what the examples need, and never replaces the machine's jax.

    python examples/install.py FOLDER

A TPU or GPU machine has the jax that fits its driver. pip is told to keep it, and NumPy, and asked
first what it would do; if it cannot, nothing is installed and it is said why. Needs the standard
library alone.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
        if _stays(name) and old is not None and old != new:
            lines.append(f"{name} {old} by {new}")
    return lines


def pins(installed: Mapping[str, str]) -> list[str]:
    """What pip is to keep, as lines of a constraints file.

    Without them it would take the newest Flax, and with it a newer jax, where an older one fits.
    """
    return [f"{name}=={version}" for name, version in installed.items() if _stays(name)]


def install(folder: str | Path, extra: str = "examples", also: Sequence[str] = ()) -> None:
    """Installs the checkout in ``folder`` into this Python, or raises.

    Args:
      folder: of the checkout.
      extra: what of it.
      also: other packages.

    Raises:
      RuntimeError: pip would replace the machine's jax, or fails.
    """
    what = [f"{Path(folder).resolve()}[{extra}]", *also]
    installed = {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"]
    }
    with tempfile.TemporaryDirectory() as scratch:
        report, kept = Path(scratch) / "plan.json", Path(scratch) / "kept.txt"
        kept.write_text("\n".join(pins(installed)) + "\n")
        _pip("install", "--dry-run", "--report", str(report), "-c", str(kept), *what)
        if lines := replaced(json.loads(report.read_text()), installed):
            raise RuntimeError(
                f"Nothing was installed: pip would replace {', '.join(lines)}, which this machine"
                " came with. Take a newer runtime, or a version of this library that fits the jax"
                " there is."
            )
        _pip("install", "-c", str(kept), *what)
    print(f"Installed; jax {importlib.metadata.version('jax')} is the machine's own.")


def _stays(name: str) -> bool:
    return name in {"libtpu", "numpy"} or name.startswith("jax")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed:\n{done.stderr[-3000:]}\nWith -c nothing is replaced that"
            " this machine came with: where they conflict, take a newer runtime, or a version of"
            " this library that fits the jax there is."
        )


if __name__ == "__main__":
    install(sys.argv[1])
