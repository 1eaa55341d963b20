"""``python -m rocmforge`` is the same as ``rocmforge``."""

import sys

from rocmforge.cli import main

if __name__ == "__main__":
    sys.exit(main())
