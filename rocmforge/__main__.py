"""``python -m rocmforge`` is the same as ``rocmforge``."""

import sys

from rocmforge.cli import main

sys.exit(main())
