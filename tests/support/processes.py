"""Other Python processes that tests start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil


def clean_environment() -> dict[str, str]:
    """This process's environment without what an earlier launch of several processes left in it."""
    left_by_others = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in os.environ.items() if key not in left_by_others}


def start_process(*arguments: str, module: str = "lightning_gsq") -> subprocess.Popen[str]:
    """``python -m module arguments``, its output in a pipe."""
    command = [sys.executable, "-m", *module.split(), *arguments]
    environment = clean_environment()
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def kill_one(run: subprocess.Popen[str], folder: Path, victim: int) -> None:
    """Kills one of a run's two processes once its first block is there, and waits until the other has ended too.

    Args:
        run: The run, of two processes.
        folder: Holds its folder ``run``.
        victim: 0 for the first process, 1 for the other.
    """
    first = folder / "run" / "blocks" / "block-000.safetensors"
    deadline = time.monotonic() + 200
    while not first.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children()]
    assert len(processes) == 2 and first.exists()
    processes[victim].send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=45)
    assert not alive, "the other process goes on alone"
    run.communicate()
