"""What all tests share."""

import sys
from pathlib import Path

from hypothesis import settings

# `python -m pytest` puts this folder on the path: the tests must see the installed package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

# Chosen by --hypothesis-profile; a machine's load must not fail a test, so there is no deadline.
settings.register_profile("normal", deadline=None, print_blob=True)
settings.register_profile("short", settings.get_profile("normal"), max_examples=10)
settings.register_profile("long", settings.get_profile("normal"), max_examples=2000)
settings.load_profile("normal")
