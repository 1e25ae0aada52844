"""``python -m lightning_gsq``."""

import sys

from lightning_gsq.cli import main

if __name__ == "__main__":
    sys.exit(main())
