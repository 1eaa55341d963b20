"""Every way to install: wheel, sdist to wheel, offline, editable. Each in a new environment.

Run from the root of a tree without build products:  python .ci/packaging.py
"""

import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path

ROOT = Path.cwd()
USE = (
    "from rocmforge import KVCacheManager; m = KVCacheManager(4); m.add_sequence(1);"
    "assert m.append([1], 20).slot_mapping[-1] == 19"
)


# Two exact architectures of two wave sizes; the default is those of the machine's GPUs, if any.
ARCHITECTURES = ("gfx942", "gfx1100")
FAMILIES = ("attention", "copy", "matrix", "merge", "write")
ANSWER = (
    "from rocmforge.hip import built_architectures as built;"
    f"assert built() == {sorted(ARCHITECTURES)}, built()"
)


def run(*command: object, cwd: Path = ROOT, **variables: str) -> None:
    words = [str(word) for word in command]
    environ = {**os.environ, **variables}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=environ)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def environment(folder: Path) -> Path:
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


def report(name: str, start: float, note: str = "") -> None:
    print(f"{name:<44} {time.monotonic() - start:6.1f} s  {note}".rstrip(), flush=True)


def cpu_seconds() -> float:
    """Processor time of the commands so far, which depends less on what else runs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def check_wheel(wheel: Path, architectures: tuple[str, ...] = ()) -> str:
    names = zipfile.ZipFile(wheel).namelist()
    suffixes = (".pyx", ".pxd", ".c", ".h", ".hip", ".cmake", ".log", "CMakeLists.txt")
    sources = [n for n in names if n.endswith(suffixes)]
    assert not sources, sources
    objects = {n.removeprefix("rocmforge/code_objects/") for n in names if n.endswith(".hsaco")}
    assert objects == {f"{f}.{arch}.hsaco" for f in FAMILIES for arch in architectures}, objects
    folders = {n.split("/")[0].split("-")[0] for n in names}
    assert folders == {"rocmforge"}, folders
    assert "rocmforge/py.typed" in names
    compiled = {path.stem for path in (ROOT / "rocmforge").rglob("*.pyx")}
    for module in compiled:
        found = [n for n in names if Path(n).name.split(".")[0] == module]
        assert {n.rsplit(".", 1)[1] for n in found} == {"so", "pyi"}, found
    return f"{wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files, {len(compiled)} modules"


def check_sdist(sdist: Path) -> str:
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    needed = ["CMakeLists.txt", "LICENSE", "README.md", "CHANGELOG.md", "tests/conftest.py"]
    for folder in ("src_c", "rocmforge", "tests"):
        needed += [
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.suffix
            in {".c", ".h", ".hip", ".cmake", ".pyx", ".pxd", ".pyi", ".py", ".txt", ".typed"}
        ]
    missing = [name for name in needed if (ROOT / name).exists() and name not in names]
    assert not missing, missing
    assert not [n for n in names if n.endswith((".so", ".o", ".dep", ".gguf", ".hsaco"))]
    with tarfile.open(sdist) as archive:
        (shim,) = [m for m in archive.getmembers() if m.name.endswith("src_c/hip/zig/lld")]
    assert shim.mode & 0o111, "the linker's shim must be a program"
    return f"{sdist.stat().st_size / 1e6:.1f} MB, {len(names)} files"


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)

        python = environment(tmp / "plain")
        start, used = time.monotonic(), cpu_seconds()
        run(python, "-m", "pip", "install", ROOT)
        used = cpu_seconds() - used
        report("pip install . in a new environment", start, f"{used:.1f} s of processor time")
        assert used < 2 * 60, "an installation takes at most 60 s on 2 cores"
        run(python, "-c", USE, cwd=tmp)

        start = time.monotonic()
        run(sys.executable, "-m", "build", "--outdir", tmp / "dist", ROOT)
        (wheel,) = (tmp / "dist").glob("*.whl")
        (sdist,) = (tmp / "dist").glob("*.tar.gz")
        report("sdist, and a wheel from it", start)
        print(f"    {sdist.name}: {check_sdist(sdist)}\n    {wheel.name}: {check_wheel(wheel)}")
        python = environment(tmp / "wheel")
        run(python, "-m", "pip", "install", wheel)
        run(python, "-c", USE, cwd=tmp)

        start = time.monotonic()
        python = environment(tmp / "objects")
        extras = project["project"]["optional-dependencies"]["hip-compiler"]
        run(python, "-m", "pip", "install", *extras)
        folder = tmp / "with objects"
        build = ("-m", "pip", "wheel", "--no-deps", "-w", folder, sdist)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        chosen = {"ROCMFORGE_HIP_ARCHS": ",".join(ARCHITECTURES),
                  "ROCMFORGE_HIP_COMPILER": str(python.with_name("python-zig"))}  # fmt: skip
        run(python, *build, PATH=path, **chosen)
        (wheel,) = folder.glob("*.whl")
        run(python, "-m", "pip", "install", wheel)
        run(python, "-c", ANSWER, cwd=tmp)
        report(f"a wheel with code objects for {' and '.join(ARCHITECTURES)}", start)
        print(f"    {wheel.name}: {check_wheel(wheel, ARCHITECTURES)}")

        start = time.monotonic()
        wheels = tmp / "wheels"
        requirements = project["build-system"]["requires"] + project["project"]["dependencies"]
        python = environment(tmp / "offline")
        download = ("-m", "pip", "download", "--only-binary", ":all:", "-d", wheels)
        run(python, *download, *requirements, "cmake", "ninja")
        report("pip download of the requirements", start)
        start = time.monotonic()
        offline = ("-m", "pip", "install", "--no-index", "--find-links", wheels)
        run(python, *offline, sdist)
        run(python, "-c", USE, cwd=tmp)
        report(
            "offline installation from the sdist", start, f"{len(list(wheels.iterdir()))} wheels"
        )

        start = time.monotonic()
        python = environment(tmp / "editable")
        run(python, *offline, "-e", ROOT)
        run(python, "-c", USE, cwd=ROOT)
        report("editable installation, used from the root", start)


if __name__ == "__main__":
    main()
