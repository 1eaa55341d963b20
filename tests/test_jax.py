"""Arrays of JAX on the CPU: read like NumPy's, and never written to."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("jax_arrays.py")
CHECKS = [line[4:].split("(")[0] for line in SCRIPT.read_text().splitlines()
          if line.startswith("def check_")]  # fmt: skip


@pytest.mark.uninstrumented  # JAX under a sanitizer would be what is tested
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_arrays_of_jax():
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == CHECKS
