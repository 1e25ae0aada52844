"""Hidden states in a dtype that is too small, on a disk that is too small, and what killed runs left of them."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.forward_passes import put
from lightning_gsq.run.hidden_states import LOCK, PREFIX, ActivationOptions, ActivationStore
from lightning_gsq.training import NonFiniteLossError

SHAPE = (2, 3, 4)


def test_numbers_that_the_dtype_does_not_hold() -> None:
    hidden = torch.ones(SHAPE)
    hidden[1, 2, 3] = -70_000.0
    with pytest.raises(ConfigurationError, match=r"states that leave block 7 reach 7e\+04, more than float16 holds"):
        put(hidden, torch.empty(SHAPE, dtype=torch.float16), "leave block 7")
    kept = torch.empty(SHAPE, dtype=torch.bfloat16)
    put(hidden, kept, "leave block 7")
    assert torch.equal(kept, hidden.bfloat16())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none(value: float) -> None:
    with pytest.raises(NonFiniteLossError, match="states that enter the first block"):
        put(torch.full(SHAPE, value), torch.empty(SHAPE), "enter the first block")


def test_files_go_with_their_store(tmp_path: Path) -> None:
    store = ActivationStore(SHAPE, ActivationOptions(memory_limit_gb=0, folder=str(tmp_path)), streams=2)
    store.new().fill_(1.0)
    assert [path.name.startswith(PREFIX) for path in tmp_path.iterdir()] == [True]
    store.close()
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_them_to_the_next_start(tmp_path: Path) -> None:
    """And nothing else: no folder that another process works in, none without a lock, no link."""
    options = ActivationOptions(memory_limit_gb=0, folder=str(tmp_path))
    pid = os.fork()
    if pid == 0:
        ActivationStore(SHAPE, options, streams=1).new()
        os._exit(0)  # as if killed: nothing is closed
    os.waitpid(pid, 0)
    (left,) = tmp_path.iterdir()
    at_work = ActivationStore(SHAPE, ActivationOptions(memory_limit_gb=0, folder=str(tmp_path)), streams=1)
    assert not left.exists() and at_work.folder is not None
    foreign = tmp_path / f"{PREFIX}notes"
    foreign.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).write_text("hidden states")
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    other = ActivationStore(SHAPE, options, streams=1)
    assert at_work.folder.is_dir() and foreign.is_dir() and (elsewhere / LOCK).is_file()
    other.close()
    at_work.close()


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ConfigurationError, match=r"activations.folder: .* has 0.0 GB free"):
        ActivationStore(SHAPE, ActivationOptions(memory_limit_gb=0, folder=str(tmp_path)), streams=2)
    assert not list(tmp_path.iterdir())
