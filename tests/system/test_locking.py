"""One process at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.locking import is_free, locked

HOLD = """
import sys
from pathlib import Path
from lightning_gsq.system.locking import locked
with locked(Path(sys.argv[1]), "text", "option", print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_named_and_its_end_frees_the_lock(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    assert not is_free(file)
    with (
        pytest.raises(ConfigurationError, match=rf"option: process {other.pid} on .* is working in"),
        locked(file, "text", "option", print),
    ):
        pass
    other.kill()
    other.wait()
    with locked(file, "text", "option", print):
        assert file.read_text().splitlines()[0] == "text"
        assert f"process {os.getpid()} on" in file.read_text()
        assert not is_free(file)
    assert is_free(file) and not is_free(tmp_path / "none")


def test_within_one_process_it_is_held_once(tmp_path: Path) -> None:
    again = pytest.raises(ConfigurationError, match="is working in")
    with locked(tmp_path / ".lock", "text", "option", print), again, locked(tmp_path / ".lock", "a", "option", print):
        pass
    with locked(tmp_path / ".lock", "text", "option", print):
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("lightning_gsq.system.locking._lock", none)
    said: list[str] = []
    with locked(tmp_path / ".lock", "text", "option", said.append):
        assert "cannot be locked" in said[0]
    with (
        pytest.raises(ConfigurationError, match="option: cannot write"),
        locked(tmp_path / "no" / ".lock", "text", "option", print),
    ):
        pass
