"""``python -m dualpath``."""

import sys

from dualpath.cli import main

if __name__ == "__main__":
    sys.exit(main())
