"""What a plan says of a size: memory of the predictions, and a model that is a configuration alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_gsq.cli import main
from tests.support.runs import write_config

CHOICES = {"model__size": "32kB", "model__choices": ["w2g16", "w4g16", "w8g16"]}


def _plan(model: Path, corpus: Path, folder: Path, *arguments: str, **changes: object) -> int:
    config = write_config(model, corpus, folder, **{**CHOICES, **changes})
    return main(["plan", "--config", str(config), "--probe", "false", *arguments])


def test_the_memory_of_the_predictions_is_counted(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _plan(tiny_llama, corpus, tmp_path) == 0
    told = capsys.readouterr().out
    assert "widths: what embedding and head are worth" in told
    assert "changes for 3 choices (fp32)" in told
    assert "widths:" not in _without_size(tiny_llama, corpus, tmp_path / "other", capsys)


def _without_size(model: Path, corpus: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert _plan(model, corpus, folder, model__size=None, model__choices=None) == 0
    return capsys.readouterr().out


def test_a_configuration_alone_is_planned_with_one_width_for_all(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert _plan(bare, corpus, tmp_path) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "has no weights" in told and "What follows is for w4g16, the widest choice that fits for all" in told
    assert "changes for 3 choices (fp32)" in told
    assert not (tmp_path / "run").exists()
    assert _plan(bare, corpus, tmp_path, model__size="12kB") == 2
    assert "give at least" in capsys.readouterr().err
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert _plan(bare, corpus, tmp_path, "--export", "gguf", model__choices=["q4_0", "q8_0"]) == 2
    assert "a GGUF file holds the tokenizer" in capsys.readouterr().err
