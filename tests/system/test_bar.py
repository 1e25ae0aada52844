"""The project's own bar: in a terminal alone."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from lightning_gsq.system.bar import bar

PROGRAM = """
from lightning_gsq.system.bar import bar
with bar("warm start", 3) as move:
    for _ in range(3):
        move()
        print("a line")
"""


def test_nothing_in_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    with bar("warm start", 3) as move:
        move()
    assert capfd.readouterr() == ("", "")


def test_a_bar_in_a_terminal_that_lines_stand_above() -> None:
    ours, its = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", PROGRAM]
    subprocess.run(command, stdout=its, stderr=its, env=environment, timeout=120, check=True)
    os.close(its)
    drawn = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "warm start" in drawn and "3/3" in drawn and drawn.count("a line") == 3


def test_one_process_of_several_has_it(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which a terminal is, for rich
    with bar("warm start", 3, shown=False) as move:
        move()
    assert capfd.readouterr() == ("", "")
    with bar("warm start", 3) as move:
        move()
    assert "warm start" in capfd.readouterr().err
