"""A command that is asked to stop: exit code, last line, and that it ends, wherever it is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lightning_gsq.system import signals
from tests.support.processes import clean_environment

WORK = {
    "python": "while True: pass",
    # Python ignores what a finalizer raises, and says so.
    "a finalizer": """
class Slow:
    def __del__(self):
        for _ in range(60): time.sleep(0.005)
while True:
    slow = Slow()
    del slow
    time.sleep(0.2)
""",
    "sleeping": "time.sleep(60)",
    "swallowed": """
while True:
    try: time.sleep(60)
    except BaseException: pass
""",
    # Waits for a lock that it holds itself, without returning to Python.
    "in C": "import ctypes; c, lock = ctypes.CDLL(None), bytes(64); [c.pthread_mutex_lock(lock) for _ in range(2)]",
}
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite that runs under nohup hands on that it is ignored
from lightning_gsq.system import signals
signals.GRACE = 0.5
try:
    with signals.stopping("farewell"):
        print("ready", flush=True)
        {work}
except signals.Stopped as stopped:
    print("unwound", flush=True)
    sys.exit(stopped.exit_code)
"""


@contextmanager
def _run(work: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The program, which is ready; it does not outlive the context, whatever a test finds."""
    indented = work.replace("\n", "\n        ")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(work=indented)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment() | environment,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", list(WORK))
def test_ends_with_the_code_of_the_signal(place: str, number: signal.Signals) -> None:
    with _run(WORK[place]) as process:
        process.send_signal(number)
        output, _ = process.communicate(timeout=10)
        assert process.returncode == 128 + number
        assert output == ("farewell\n" if place in ("swallowed", "in C") else "unwound\n")


def test_in_a_terminal_the_last_line_takes_the_place_of_a_bar() -> None:
    ours, theirs = os.openpty()
    work = "sys.stderr.write('bar ... left 0:00:02'); sys.stderr.flush()\n        " + WORK["in C"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(work=work)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=clean_environment(),
    )
    os.close(theirs)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT
    assert os.read(ours, 1000).decode() == f"bar ... left 0:00:02{signals.CLEARED}farewell\r\n"
    os.close(ours)
    process.stdout.close()


def test_a_second_signal_does_not_disturb_the_first() -> None:
    with _run("try: time.sleep(60)\nfinally: time.sleep(0.3); print('cleaned', flush=True)") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=10)
        assert process.returncode == 128 + signal.SIGTERM
        assert output == "cleaned\nunwound\n"


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stopping("farewell"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with pytest.raises(signals.Stopped, match="SIGTERM"), signals.stopping("farewell"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert [signal.getsignal(number) for number in signals.STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_fork_ends_alone() -> None:
    """As workers of a data loader do, which are ended by this signal."""
    with signals.stopping("farewell"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.2)


def test_roles_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", signals.LEADER):
        monkeypatch.delenv(name, raising=False)
    assert signals.speaks() and not signals.follows()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not signals.speaks() and not signals.follows()  # whoever started it ends it
    monkeypatch.setenv(signals.LEADER, str(os.getppid()))
    assert signals.follows()
    monkeypatch.setenv("RANK", "0")
    assert signals.speaks()
