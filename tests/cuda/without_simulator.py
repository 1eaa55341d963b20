"""A pytest plugin: tests of the simulated device's own functions are skipped on a real one."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "sim" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip("of the simulated device only"))
