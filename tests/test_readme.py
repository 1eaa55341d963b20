"""The README's example runs and prints what it shows, and the commands that it names exist."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```\n+```text\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[str]:
    """Every command of the shell blocks, and those between single backticks that look like one."""
    found = []
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```$", README, re.M | re.S):
        for line in block.splitlines():
            parts = re.split(r"&&|;", line.removeprefix("$ ").split("#")[0])
            found += [part.strip() for part in parts]
    found += re.findall(r"`((?:rocmforge|pip|python|pytest|bash) [^`]+)`", README)
    return sorted({command for command in found if command})


def test_every_python_block_has_its_output() -> None:
    assert len(EXAMPLES) == README.count("```python") > 0


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_example(code: str, output: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert printed.getvalue().rstrip() == output.rstrip()


def test_commands_are_found() -> None:
    text = " ".join(commands())
    assert "rocmforge demo" in text
    assert "pytest" in text
    assert "pip install" in text


@pytest.mark.parametrize("command", commands())
def test_command_exists(command: str) -> None:
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "rocmforge"]:
        words = ["rocmforge", *words[3:]]
    match words:
        case ["pip", "install", *arguments]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for argument in arguments:
                extras = re.search(r"\[(.*)\]", argument)
                for extra in extras[1].split(",") if extras else []:
                    assert extra.strip() in project["optional-dependencies"]
        case ["rocmforge", name, *options] if not name.startswith("-"):
            help_command = [sys.executable, "-P", "-m", "rocmforge", name, "--help"]
            done = subprocess.run(help_command, capture_output=True, text=True, check=True)
            for option in options:
                assert not option.startswith("--") or option.split("=")[0] in done.stdout
        case ["python", "-m", "pytest", *_] | ["pytest", *_] | ["rocmforge", *_]:
            pass
        case ["git" | "cd", *_]:
            pass
        case ["python" | "bash", path, *_]:
            assert (ROOT / path).is_file()
        case _:
            pytest.fail(f"the README names a command that this test does not know: {command}")
