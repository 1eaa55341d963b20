"""The examples in docstrings run and show what is printed, in compiled modules too."""

import doctest
import importlib
import pkgutil

import pytest

import rocmforge

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(rocmforge.__path__, "rocmforge.")
    if not module.name.endswith("__main__") and ".lib" not in module.name  # librocmforge_*.so
)


@pytest.mark.parametrize("name", ["rocmforge", *MODULES])
def test_docstring_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith("rocmforge.integrations."):
            raise
        pytest.skip(str(error))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    report: list[str] = []
    for example in doctest.DocTestFinder().find(module):
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_examples_are_found_in_compiled_modules() -> None:
    """Else the test above would pass by finding nothing."""
    module = importlib.import_module("rocmforge.kv_cache_manager")
    assert sum(len(example.examples) for example in doctest.DocTestFinder().find(module)) > 0
