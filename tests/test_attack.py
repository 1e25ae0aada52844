"""The short form of scripts/attack.py: a few cases of each kind, always the same ones.

In a process of its own: the attacks fork, which is sound only while nothing else has started threads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COUNTS = {"kills": 4, "ranks": 0, "failures": 3, "mutations": 150, "inputs": 12}
"""Of a run on several processes, tests/run/test_distributed.py and tests/commands/test_stopping.py kill some."""


def test_nothing_is_lost_and_nothing_is_shown_but_a_line() -> None:
    options = [part for kind, count in COUNTS.items() for part in (f"--{kind}", str(count))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "attack.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    counted = {kind: int(count) for kind, count in re.findall(r"^\| (\w+) \| (\d+) \|", done.stdout, re.MULTILINE)}
    assert counted == COUNTS
