"""A model whose files lack a weight ends every command that reads it with one line, before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_gsq.cli import main
from tests.support.tiny import save_tiny_model

LINE = ["--data.sequence_length", "32", "--evaluation.sequence_length", "32"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


@pytest.mark.parametrize(
    ("verb", "options"),
    [("fit", LINE), ("plan", LINE), ("validate", LINE[2:]), ("predict", ["--prompt", "x"])],
)
def test_every_verb(
    verb: str, options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["lm_head.weight"]
    save_file(state, file, {"format": "pt"})
    assert main([verb, str(folder), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [
        f"error: model.pretrained: weights of the model are not in the files of {folder}, 1 in all: lm_head.weight"
    ]
    assert not [path for path in (folder.parent / "runs").rglob("*") if path.is_file() and path.name != ".lock"]


def test_weights_without_a_place_are_one_line(folder: Path) -> None:
    """In a process of its own: a test's warnings are not shown."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.ones(4, 4)}, file, {"format": "pt"})
    command = [sys.executable, "-m", "lightning_gsq", "predict", str(folder), "--prompt", "x", "--max_new_tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines() == [
        f"warning: {folder} holds weights of modules that the model does not have, 1 in all, which are left out: "
        "mtp.fc.weight"
    ]
