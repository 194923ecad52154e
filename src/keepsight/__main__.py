"""`python -m keepsight`, for launchers such as torchrun."""

import sys

from keepsight.cli import main

if __name__ == "__main__":
    sys.exit(main())
