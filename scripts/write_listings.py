"""Writes what VERB --help prints into lightning_gsq/cli/listings, from the parser; to be run when options change.

python scripts/write_listings.py [FOLDER]
"""

import sys
from pathlib import Path

from lightning_gsq.cli.listings import FOLDER, listings

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(exist_ok=True)
    for name, content in listings():
        (folder / name).write_text(content, encoding="utf-8")
