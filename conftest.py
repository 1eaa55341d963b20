"""`python -m pytest` puts this folder on the path: the tests must see the installed package."""

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]
