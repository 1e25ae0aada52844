"""Signals end a command in an orderly way, at every moment, with the exit code that shells and schedulers expect.

SIGINT, SIGTERM and SIGHUP raise :class:`Stopped` in the main thread. It is no ``Exception`` and no
``KeyboardInterrupt`` (which Lightning answers with ``sys.exit(1)``), so everything that cleans up behind itself does,
and nothing else takes it for an error. What is written is there whole or not at all, so no moment is a bad one.

Python runs a handler only between two instructions: a main thread that waits in a collective operation for a process
that is gone, or multiplies large matrices, would not hear of it. A thread that sees the signal at once ends the process
where it is if the main thread has not come to its end within :data:`GRACE` seconds.

Of several processes that Lightning started, the first is the one that stops: the others pass the signal on to it, and
it ends them. Launchers such as torchrun do that by themselves.

This module imports nothing of weight: it is active before the libraries are loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

GRACE = 5.0
"""Seconds between a signal and the end at the latest."""
CLEARED = "\r\x1b[2K\x1b[?25h"
"""Takes away a terminal's present line, and gives the cursor back that a bar has hidden."""
AGAIN = 0.01
"""Seconds after which a signal that came in the middle of a finalizer comes again."""

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
LEADER = "LIGHTNING_GSQ_LEADER"
"""Environment variable with the id of the process that starts others."""


class Stopped(BaseException):
    """A signal asked the command to end.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def speaks() -> bool:
    """Whether this process is the only one, or the first of several."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def follows() -> bool:
    """Whether the parent is the first process of the same command."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and os.environ.get(LEADER) == str(os.getppid())


@contextlib.contextmanager
def stopping(farewell: str, loading: bool = False) -> Iterator[Watch]:
    """Within, signals raise :class:`Stopped`; afterwards they do what they did before.

    A signal that is ignored (``nohup``, a shell's background job) stays ignored. Outside of the main thread, where
    Python allows no handlers, this does nothing.

    Args:
        farewell: Line for the standard error, where the process has to be ended without its main thread.
        loading: Libraries are being imported, which would answer an exception with others, and there is nothing to
            clean up: until the watch's ``loading`` is set to False, a signal ends the process where it is.
    """
    global _watch
    watch = Watch(farewell, loading)
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    outer, _watch = _watch, watch
    watch.open()
    try:
        yield watch
    finally:
        watch.close()
        _watch = outer


def leave_to_us(trainer: Any) -> None:
    """Keeps a Lightning Trainer from installing handlers of its own while it runs.

    They pass a signal on by a collective operation, which waits for ever where the other process is busy with another
    one, and end a stopped training with exit code 0.
    """
    trainer._signal_connector.register_signal_handlers = _nothing


def _nothing() -> None:
    pass


class Watch:
    """Handlers in the main thread, and a thread beside it that sees every signal at once."""

    def __init__(self, farewell: str, loading: bool) -> None:
        self.farewell, self.loading = farewell, loading
        self.parent, self.follows = os.getppid(), follows()
        self.stopped, self.over = False, threading.Event()
        self.before: dict[signal.Signals, Any] = {}
        self.hook_before = sys.unraisablehook

    def open(self) -> None:
        """Takes the signals over."""
        if not self.follows:
            os.environ[LEADER] = str(os.getpid())
        self.before = {number: signal.getsignal(number) for number in STOPPING}
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.woken_before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, args=(reader,), name="signals", daemon=True).start()
        for number, handler in self.before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        self.hook_before, sys.unraisablehook = sys.unraisablehook, self._lost

    def close(self) -> None:
        """Gives the signals back."""
        self.over.set()
        self.restore()
        os.close(self.writer)

    def restore(self) -> None:
        """Gives the signals back in this process, or in a fork of it, which has neither the thread nor its own pipe."""
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self.woken_before)
        sys.unraisablehook = self.hook_before

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.stopped or self.follows:
            return
        self.stopped = True
        if self.loading:
            self._end(number)
        raise Stopped(number)

    def _lost(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Python ignores what is raised in a finalizer: the signal comes again as soon as that is over."""
        if not isinstance(unraisable.exc_value, Stopped):
            self.hook_before(unraisable)
            return
        self.stopped, number = False, unraisable.exc_value.exit_code - 128
        timer = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    def _wait(self, reader: int) -> None:
        """Sees to it that the process ends; ``reader`` gives the number of each signal, and ends with the watch."""
        with open(reader, "rb", buffering=0) as numbers:
            number = next((byte for byte in iter(lambda: numbers.read(1), b"") if byte[0] in STOPPING), b"")
            if not number:
                return
            grace = GRACE
            if self.follows and os.getppid() == self.parent:  # the first process ends this one
                os.kill(self.parent, number[0])
                grace *= 2
            if not self.over.wait(grace):
                self._end(number[0])

    def _end(self, number: int) -> None:
        """Ends this process and those it started, whatever they do."""
        import psutil

        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if speaks():
            lead = CLEARED if os.isatty(2) else ""  # a bar that nobody ends any more
            os.write(2, f"{lead}{self.farewell}\n".encode())
        os._exit(128 + number)


_watch: Watch | None = None


def _in_fork() -> None:
    """A fork shares the pipe: its signals would end its parent."""
    global _watch
    if _watch is not None:
        _watch.restore()
        _watch = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_fork)
