"""What all tests share."""

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# `python -m pytest` puts this folder on the path: the tests must see the installed package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

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
