"""The README's code runs as it stands."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_loop_of_ones_own(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    pruned, accuracy = map(float, re.findall(r"([\d.]+)%", capsys.readouterr().out))
    assert pruned > 90
    assert accuracy >= 90
