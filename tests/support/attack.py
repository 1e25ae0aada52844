"""Runs that are interrupted, disks that fail, arguments that make no sense: each in a forked process, with its outcome.

Everything is imported once; a case is a fork that runs the command line and ends. What happens to it is decided by an
audit hook (PEP 578) that counts what the process does to files inside one folder: a case is the same every time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from lightning_gsq.cli import main
from tests.support.forks import renew_thread_pool

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FILE_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Args:
        code: Its exit code; minus the signal's number if a signal ended it; None if it did not end in time.
        text: What it printed.
        seconds: How long it took.
    """

    code: int | None
    text: str
    seconds: float

    @property
    def traceback(self) -> bool:
        """Whether a Python traceback was shown."""
        return "Traceback (most recent call last)" in self.text

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.text.splitlines() if line.startswith("error")]


def run_forked(
    arguments: list[str], log: Path, before: Callable[[], None] = lambda: None, limit: float = 90
) -> Outcome:
    """Runs the command line in a fork.

    Args:
        arguments: Those of the command line.
        log: File for what it prints.
        before: Called in the fork first.
        limit: Seconds after which it counts as hanging, and is killed.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            renew_thread_pool()
            before()
            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return Outcome(code, log.read_text(errors="replace"), time.monotonic() - began)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Outcome(None, log.read_text(errors="replace"), time.monotonic() - began)


def at_operation(folder: Path, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """What makes a fork do something right before its ``number``-th change of a file inside ``folder``."""

    def install() -> None:
        count, inside = 0, str(folder)

        def hook(event: str, values: tuple[object, ...]) -> None:
            nonlocal count
            changes = event in FILE_EVENTS or (
                event == "open" and isinstance(values[2], int) and bool(values[2] & WRITING)
            )
            if changes and isinstance(values[0], str | Path) and str(values[0]).startswith(inside):
                count += 1
                if count == number:
                    act()

        sys.addaudithook(hook)

    return install


def after(seconds: float, act: Callable[[], None]) -> Callable[[], None]:
    """What makes a fork do something after some time, wherever it is then."""

    def install() -> None:
        timer = threading.Timer(seconds, act)
        timer.daemon = True
        timer.start()

    return install


def send(number: signal.Signals) -> Callable[[], None]:
    """Sends the process itself a signal."""
    return lambda: os.kill(os.getpid(), number)


def no_space() -> None:
    """The disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> None:
    """The disk has become read-only."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def largest_file(size: int) -> Callable[[], None]:
    """No file of the process may grow beyond ``size`` bytes: also what native code writes fails then."""

    def install() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return install


def results(run: Path) -> dict[str, str]:
    """Digests of what a finished run is: its weights, whatever the files' headers say of seconds."""
    found = {}
    for file in sorted(
        [*run.glob("blocks/*.safetensors"), *run.glob("*.safetensors"), *run.glob("model/*.safetensors")]
    ):
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[str(file.relative_to(run))] = digest.hexdigest()
    return found


def finish(arguments: list[str], log: Path, attempts: int = 3) -> Iterator[Outcome]:
    """Starts the same command again until it ends with 0."""
    for _ in range(attempts):
        outcome = run_forked(arguments, log)
        yield outcome
        if outcome.code == 0:
            return


def leftovers(run: Path) -> list[str]:
    """Temporary files that nobody will look at again."""
    return sorted(
        str(file.relative_to(run)) for file in run.rglob(".*") if "partial" in file.name or ".old" in file.name
    )


def judged(
    outcome: Outcome, codes: set[int] | None, resume: Callable[[], Outcome], run: Path, expected: dict[str, str]
) -> tuple[str, bool]:
    """What an interrupted run, and its resumption, came to, in a few words, and whether that is right.

    Args:
        outcome: How the interrupted run ended.
        codes: The exit codes that it may have; None for any.
        resume: Starts the same command again, until it ends with 0 or gives up.
        run: The run folder.
        expected: What an undisturbed run stored.
    """
    if outcome.code is None:
        return "hang", False
    if outcome.traceback:
        return "traceback", False
    if codes is not None and outcome.code not in codes:
        return f"exit code {outcome.code}", False
    last = resume()
    if last.code != 0 or last.traceback:
        return "not resumed", False
    if results(run) != expected:
        return "resumed to another result", False
    if leftovers(run):
        return "resumed, temporary files left", False
    return "resumed to the same bits", True
