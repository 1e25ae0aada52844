"""Exports of models for which there is no room: the same findings, with the weights of one block at a time."""

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_gsq.export import ExportOptions, FinishedRun, format_of, open_run


@pytest.mark.parametrize("name", ["native", "dequantized", "compressed-tensors"])
def test_a_folder_is_checked_a_block_at_a_time(
    name: str, llama_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_ = format_of(name)
    run = format_.view(open_run(llama_run))
    format_.write(run, tmp_path, ExportOptions())
    wanted = format_.check(run, tmp_path)
    monkeypatch.setattr(FinishedRun, "fits", lambda *_: False)
    report = format_.check(run, tmp_path)
    assert report.note == "block by block, with a text of 2 tokens" and report.weights == (14, 14)
    assert replace(report, note="") == wanted
