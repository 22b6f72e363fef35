"""Executes examples/colab.ipynb from a clean kernel: the digits, small settings, this checkout.

Prints what the cells print. Fails where a cell does, or where TensorFlow was needed.
"""

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = """
SOURCE = {root!r}
DATASET = "digits"
OUT = {out!r}
BATCH, DENSE_EPOCHS, INTERVAL, FRACTION, BOUND, CHECKS = 64, 20, 40, 0.3, 0.95, 20
"""
LAST = """
written = {file.name for file in out.iterdir()}
assert written >= {"lenet.safetensors", "lenet.jax", "report.html", "report.md", "curve.png"}
assert "tensorflow" not in sys.modules
assert sj.sparsity(mask) > 0.8
"""

with tempfile.TemporaryDirectory() as out:
    notebook = nbformat.read(ROOT / "examples" / "colab.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    settings = nbformat.v4.new_code_cell(SETTINGS.format(root=str(ROOT), out=out))
    notebook.cells.insert(tags.index(["parameters"]) + 1, settings)
    notebook.cells.append(nbformat.v4.new_code_cell(LAST))
    began = time.perf_counter()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": out}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout":
                sys.stdout.write(output.text)
    pictures = sum(
        "image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])
    )
    if pictures != 1:
        sys.exit(f"The notebook shows {pictures} pictures, not the curve.")
    print(f"The notebook ran in {time.perf_counter() - began:.0f} seconds.")
