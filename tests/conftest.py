"""What all tests share: the path, hypothesis profiles, and fixtures of the operations."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# `python -m pytest` puts the source tree on the path: the tests must see the installed package.
tree = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != tree]

import rocmforge.kv_cache  # noqa: E402
from rocmforge.ops import _cpu, get_num_threads, set_num_threads  # noqa: E402

# Chosen by --hypothesis-profile; no deadlines, as a machine's load must not fail a test.
settings.register_profile(
    "normal",
    max_examples=120,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
normal = settings.get_profile("normal")
settings.register_profile("short", normal, max_examples=10, stateful_step_count=30)
settings.register_profile("long", normal, max_examples=2000, stateful_step_count=120)
settings.load_profile("normal")


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


@pytest.fixture(scope="module", autouse=True)
def pools_in_host_memory(request):
    """`device="auto"` is the CPU outside of tests/device: tests look at pools as NumPy arrays."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "device":
            patch.setattr("rocmforge.hip.default_device", lambda: (None, "the tests say so"))
        yield


@pytest.fixture
def prefixes(monkeypatch):
    """How many blocks were read once for all sequences, of each `attend` that did so.

    Also where they hold less than pays.
    """
    calls = []
    original = rocmforge.kv_cache.attend_with_prefix

    def counted(prefix, *args, **kwargs):
        calls.append(prefix.num_blocks)
        return original(prefix, *args, **kwargs)

    monkeypatch.setattr("rocmforge.prefix_attention.MIN_TOKENS", 32)
    monkeypatch.setattr("rocmforge.kv_cache.attend_with_prefix", counted)
    return calls
