"""Other Python processes that tests start."""

from __future__ import annotations

import os
import subprocess
import sys


def clean_environment() -> dict[str, str]:
    """This process's environment without what an earlier launch of several processes left in it."""
    left_by_others = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in os.environ.items() if key not in left_by_others}


def start_process(*arguments: str, module: str = "lightning_gsq") -> subprocess.Popen[str]:
    """``python -m module arguments``, its output in a pipe."""
    command = [sys.executable, "-m", *module.split(), *arguments]
    environment = clean_environment()
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
