"""The README's code runs as it stands, block after block."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_code(capsys):
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert sum(bool(line.strip()) for line in blocks[0].splitlines()) <= 20
    assert names["accuracy"](names["sparse"]) >= 0.9
    assert names["history"][-1].sparsity > 0.9
    shown = re.findall(r"(\S+) +(\d+) of +(\d+) kept", capsys.readouterr().out)
    assert [int(size) for _, _, size in shown] == [64, 64 * 64, 10, 64 * 10]
    kernels = [int(kept) for path, kept, _ in shown if path.endswith("kernel")]
    assert sum(kernels) == 4736 - round(0.99 * 4736)
