"""Fixtures of the tests of the operations."""

import pytest

from rocmforge.ops import _cpu, get_num_threads, set_num_threads


@pytest.fixture(params=_cpu.available_isas())
def isa(request):
    """Run a test with each instruction set that this machine has."""
    before = _cpu.isa()
    _cpu._set_isa(request.param)
    yield request.param
    _cpu._set_isa(before)


@pytest.fixture
def threads():
    """Set the number of threads for one test."""
    before = get_num_threads()
    yield set_num_threads
    set_num_threads(before)
