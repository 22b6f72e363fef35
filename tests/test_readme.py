"""The README's code runs as it stands, block after block; all tables are those of the records."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from examples import readme

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the code writes a file
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert sum(bool(line.strip()) for line in blocks[0].splitlines()) <= 20
    assert names["accuracy"](names["sparse"]) >= 0.9
    assert names["history"][-1].sparsity > 0.9
    for one, other in zip(*map(jax.tree.leaves, (names["restored"], names["sparse"])), strict=True):
        np.testing.assert_array_equal(one, other)
    small, model, x = names["small"], names["model"], names["x"]
    np.testing.assert_allclose(
        names["fast"](small.params, x), model.apply(names["sparse"], x), rtol=0, atol=1e-4
    )
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (small.params, names["sparse"])
    ]
    assert sizes[0] < sizes[1]
    shown = re.findall(r"(\S+) +(\d+) of +(\d+) kept", capsys.readouterr().out)
    assert [int(size) for _, _, size in shown] == [64, 64 * 64, 10, 64 * 10]
    kernels = [int(kept) for path, kept, _ in shown if path.endswith("kernel")]
    assert sum(kernels) == 4736 - round(0.99 * 4736)


def test_tables():
    made = readme.made(ROOT / "results")
    texts = [page.read_text(encoding="utf-8") for page in readme.pages(ROOT)]
    for text in texts:
        assert readme.filled(text, made) == text
    left_out = {name for name in made if not any(f"<!-- {name} -->" in text for text in texts)}
    assert left_out == {"lenet300-mnist on the way"}


def test_links_and_pictures_are_there():
    for page in readme.pages(ROOT):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), (page, target)


def test_only_what_is_between_markers_changes():
    text = "a\n<!-- x y -->\nold\n<!-- end of x y -->\nb <!-- z -->1<!-- end of z -->"
    new = readme.filled(text, {"x y": r"| \1 |", "absent": "?", "z": "1"})
    assert new == text.replace("old", r"| \1 |").replace("1<", "\n1\n<")
    with pytest.raises(ValueError, match="<!-- w -->: there is no such table"):
        readme.filled("<!-- w -->", {"x": ""})
    for wrong in ("{0}", "{1}", "{1}{0}", "{0}{0}{1}", "{0}{1}{0}{1}"):
        with pytest.raises(ValueError, match="must be there once each"):
            readme.filled(wrong.format("<!-- x -->", "<!-- end of x -->"), {"x": ""})
