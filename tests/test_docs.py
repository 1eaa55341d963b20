"""The Python code in the docs runs and prints what stands below it; links lead somewhere."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

import rocmforge
from rocmforge import hip, ops
from rocmforge.batch import BatchGroup
from rocmforge.cache_group import CacheGroup
from rocmforge.shared_sequences import SharedSequences

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDS = {"pytorch.md": "torch", "transformers.md": "transformers"}  # extras
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_print_what_is_shown(page: Path) -> None:
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    namespace: dict[str, object] = {}
    for code, expected in blocks(page):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(page), "exec"), namespace)
        assert out.getvalue() == expected


def test_there_are_examples() -> None:
    """Else the test above would pass by finding nothing."""
    assert sum(len(blocks(page)) for page in PAGES) >= 6


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_reference_has_everything_that_is_public():
    """Members of compiled classes are listed by hand, in an order that a reader wants."""
    pages = {
        page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.rst")
    }
    for name in rocmforge.__all__:
        assert name in pages["index"], name
    compiled = {
        "cache": [rocmforge.KVCacheManager, rocmforge.Batch, BatchGroup, CacheGroup],
        "metadata": [rocmforge.PageTable, rocmforge.BlockAllocator],
        "hip": [hip.Device, hip.DeviceArray, hip.Memory, hip.Stream, hip.Event, hip.Graph],
    }
    for page, classes in compiled.items():
        for cls in classes:
            for name in dir(cls):
                told = getattr(cls, name).__doc__ or cls is rocmforge.KVCacheManager
                if told and not name.startswith("_"):
                    assert re.search(rf"\b{name}\b", pages[page]), f"{cls.__name__}.{name}"
    for module in (hip, ops):
        for name in module.__all__:
            assert re.search(rf"\b{name}\b", pages["hip" if module is hip else "operations"]), name


def arguments_in_stub(cls: type) -> str:
    stub = (ROOT / (cls.__module__.replace(".", "/") + ".pyi")).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(stub)):
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
            body = node.body
    makers = [node for node in body if getattr(node, "name", "") in ("__new__", "__init__")]
    (arguments,) = [node.args for node in makers if node.args.vararg is None]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments).partition(", ")[2]


def test_the_reference_gives_the_arguments_of_compiled_classes():
    """Which Sphinx cannot ask them for."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.rst"))
    shown = dict(re.findall(r"autoclass:: (\w+)\((.*)\)$", pages, re.M))
    assert {name: ast.unparse(ast.parse(f"lambda {shown[name]}: 0")) for name in shown} == {
        cls.__name__.replace(
            "SharedSequences", "KVCacheManager"
        ): f"lambda {arguments_in_stub(cls)}: 0"
        for cls in (rocmforge.PageTable, rocmforge.BlockAllocator, SharedSequences)
    }
