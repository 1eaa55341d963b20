"""The example of docs/operations.md runs and gives what it should."""

import pathlib
import re

import numpy as np


def test_example():
    path = pathlib.Path(__file__).parents[1] / "docs" / "operations.md"
    (code,) = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    names: dict[str, object] = {}
    exec(compile(code, str(path), "exec"), names)
    np.testing.assert_allclose(names["out"], 1.0, rtol=1e-6)
