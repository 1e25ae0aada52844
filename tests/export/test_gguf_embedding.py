"""Whose embedding a GGUF file gets: that of the file it came from, the run's, or one of a type that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import ExportOptions, FinishedRun, format_of
from lightning_gsq.gguf.file import GGUFFile
from tests.support.exported import quantize, save_model

FORMAT = format_of("gguf")
NAME = "token_embd.weight"
F16, Q5_0, Q8_0 = 1, 6, 8


def _file(folder: Path, embedding: object) -> Path:
    """A file with such an embedding."""
    run = quantize(save_model(folder / "model"), folder / "first", 4, 32, embedding=embedding)
    (folder / "start").mkdir()
    FORMAT.write(FORMAT.view(run), folder / "start", ExportOptions())
    return folder / "start" / "model.gguf"


@pytest.fixture(scope="module")
def five_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _file(tmp_path_factory.mktemp("five"), "q5_0")


def _written(run: FinishedRun, folder: Path, options: ExportOptions = ExportOptions()) -> GGUFFile:  # noqa: B008
    folder.mkdir()
    view = FORMAT.view(run, options)
    FORMAT.write(view, folder, options)
    report = FORMAT.check(view, folder)
    assert report.weights is not None and report.weights[0] == report.weights[1] == len(view.weights)
    return GGUFFile(folder / "model.gguf")


def test_a_smaller_one_of_the_source_stays(five_bits: Path, tmp_path: Path) -> None:
    run = quantize(five_bits, tmp_path / "run", 4, 32, embedding="auto")
    assert len(run.outer) == 1 and FORMAT.view(run).outer == []
    file, source = _written(run, tmp_path / "out"), GGUFFile(five_bits)
    assert file.tensors[NAME].number == source.tensors[NAME].number == Q5_0
    assert file.raw(NAME).tobytes() == source.raw(NAME).tobytes()
    asked = _written(run, tmp_path / "f16", ExportOptions(gguf_embedding="F16"))
    assert asked.tensors[NAME].number == F16


def test_what_was_asked_for_is_the_runs(five_bits: Path, tmp_path: Path) -> None:
    run = quantize(five_bits, tmp_path / "run", 4, 32, embedding={"bits": 8, "group_size": 32})
    assert _written(run, tmp_path / "out").tensors[NAME].number == Q8_0
    with pytest.raises(ConfigurationError, match=r"gguf_embedding: the run quantized model\.embed_tokens"):
        FORMAT.write(
            FORMAT.view(run, ExportOptions(gguf_embedding="F16")), tmp_path, ExportOptions(gguf_embedding="F16")
        )


def test_one_that_is_as_large_is_the_runs(tmp_path: Path) -> None:
    start = _file(tmp_path, "auto")
    run = quantize(start, tmp_path / "run", 4, 32, embedding="auto")
    assert len(FORMAT.view(run).outer) == 1
    file = _written(run, tmp_path / "out", ExportOptions(gguf_embedding="F16"))
    assert file.tensors[NAME].number == F16
