"""What an installation holds, and what importing it costs and touches."""

import json
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import rocmforge

ROOT = Path(__file__).parent.parent


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.anchor)


@pytest.mark.uninstrumented
def test_import_time_beyond_numpy() -> None:
    code = (
        "import numpy, time; start = time.perf_counter(); import rocmforge;"
        "print(time.perf_counter() - start)"
    )
    assert min(float(run(code).stdout) for _ in range(5)) < 0.15


def test_importing_touches_no_device_and_no_optional_package() -> None:
    code = "import sys, rocmforge; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run(code).stdout.split())
    assert "rocmforge" in loaded
    assert not loaded & {"hip", "rocm", "torch", "cupy", "jax", "gguf", "tokenizers"}


def test_the_source_tree_says_how_to_build_it() -> None:
    # -S: neither an installed nor an editable package is seen
    done = run(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rocmforge", "-S")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: rocmforge.")
    assert "is not built" in last
    assert "pip install ." in last


def test_public_names_exist_and_have_docstrings() -> None:
    for name in rocmforge.__all__:
        assert getattr(rocmforge, name).__doc__, name


def test_installed_files() -> None:
    installed = distribution("rocmforge")
    assert installed.version == rocmforge.__version__
    url = json.loads(installed.read_text("direct_url.json") or "{}")
    if url.get("dir_info", {}).get("editable"):
        pytest.skip("an editable installation holds links to the source tree")
    files = {str(file) for file in installed.files or []}
    modules = {path.stem for path in (ROOT / "rocmforge").rglob("*.pyx")}
    assert modules
    for module in modules:
        assert any(Path(f).name.startswith(f"{module}.") and f.endswith(".so") for f in files)
        assert any(f.endswith(f"/{module}.pyi") for f in files), f"{module} has no stub"
    assert "rocmforge/py.typed" in files
    assert any(f.endswith("LICENSE") for f in files)
    unwanted = (".pyx", ".pxd", ".c", ".h", ".dep", "CMakeLists.txt")
    assert not [f for f in files if f.startswith("rocmforge/") and f.endswith(unwanted)]
    assert {f.split("/")[0].split("-")[0] for f in files} <= {"rocmforge", "..", f"{ROOT}"}
