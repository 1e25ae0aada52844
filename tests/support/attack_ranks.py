"""Signals to one of the two processes of a run: both end, and the same command on two processes goes on."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil

from tests.support.attack import Outcome, judged, results
from tests.support.attack_targets import Target
from tests.support.processes import start_process

RANKS = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--end_to_end.batch_size", "2"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LINES = 12
"""About as many lines as the run prints."""
LIMIT = 180.0
"""Seconds after which a run counts as hanging."""


def rank_kills(target: Target, first: int, count: int) -> Iterator[tuple[str, str, bool]]:
    """Cases of one signal to one of two processes."""
    if count == 0:
        return
    whole = _outcome(start_process(*target.arguments("ranks"), *RANKS))
    assert whole.code == 0, whole.text
    expected = results(target.run_of("ranks"))
    for number in range(first, first + count):
        name, chosen, victim = f"rank{number}", SIGNALS[number % 3], number // 3 % 2
        processes, outcome = _interrupted(target, name, chosen, victim, random.Random(number))
        _, alive = psutil.wait_procs(processes, timeout=30)
        for process in alive:
            process.kill()
        yield f"{number} {chosen.name} to process {victim}", *_judged(target, name, bool(alive), outcome, expected)
        shutil.rmtree(target.root / name, ignore_errors=True)


def _interrupted(
    target: Target, name: str, chosen: signal.Signals, victim: int, choose: random.Random
) -> tuple[list[psutil.Process], Outcome]:
    """Sends the signal at some moment; the processes of the run, and how its first one ended."""
    run = start_process(*target.arguments(name), *RANKS)
    assert run.stdout is not None
    head = ""
    for _ in range(choose.randrange(1, LINES)):
        head += run.stdout.readline()
    time.sleep(choose.uniform(0, 0.5))
    processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children()] if run.poll() is None else []
    if processes:
        processes[min(victim, len(processes) - 1)].send_signal(chosen)
    outcome = _outcome(run)
    return processes, Outcome(outcome.code, head + outcome.text, outcome.seconds)


def _outcome(run: subprocess.Popen[str]) -> Outcome:
    began = time.monotonic()
    try:
        text = run.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        run.kill()
        return Outcome(None, run.communicate()[0], time.monotonic() - began)
    return Outcome(run.returncode, text, time.monotonic() - began)


def _judged(target: Target, name: str, alive: bool, outcome: Outcome, expected: dict[str, str]) -> tuple[str, bool]:
    if alive:
        return "hang", False

    def resume() -> Outcome:
        return _outcome(start_process(*target.arguments(name), *RANKS))

    return judged(outcome, None, resume, target.run_of(name), expected)
