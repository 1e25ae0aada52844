"""Runs with a quantized embedding and head in every format."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import ExportOptions, FinishedRun, format_of, open_run
from lightning_gsq.export.report import unpacked
from lightning_gsq.gguf.file import GGUFFile
from tests.support.outer import EMBEDDING, HEAD, outer_run


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return outer_run(tmp_path_factory.mktemp("tied"), "tied", embedding={"bits": 8, "group_size": 32})


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    schemes = {"embedding": {"bits": 6, "group_size": 32}, "head": {"bits": 8, "group_size": 32}}
    return outer_run(tmp_path_factory.mktemp("untied"), "untied", **schemes)


def _written(run: FinishedRun, name: str, folder: Path) -> int:
    format_, view = format_of(name), format_of(name).view(run)
    folder.mkdir()
    assert format_.refuse(view) is None
    format_.write(view, folder, ExportOptions()).verify(format_.weight_files(folder))
    report = format_.check(view, folder)
    assert report.weights is not None and report.weights[0] == report.weights[1]
    return report.weights[0]


def test_opened_again_the_run_lists_them(tied: FinishedRun, untied: FinishedRun) -> None:
    assert (tied.outer, untied.outer) == ([EMBEDDING], [EMBEDDING, HEAD])
    assert open_run(untied.folder.root).outer == [EMBEDDING, HEAD]
    assert HEAD not in tied.other_names() and EMBEDDING not in tied.other_names()
    assert "blocks/rounded-outer.safetensors" in tied.digests
    assert [EMBEDDING] in list(tied.units())


@pytest.mark.parametrize("name", ["native", "gguf"])
def test_formats_that_hold_them(tied: FinishedRun, untied: FinishedRun, name: str, tmp_path: Path) -> None:
    assert _written(tied, name, tmp_path / "tied") == 15
    assert _written(untied, name, tmp_path / "untied") == 16


def test_the_block_type_of_the_embedding_is_exact(tied: FinishedRun, tmp_path: Path) -> None:
    format_ = format_of("gguf")
    format_.write(tied, tmp_path, ExportOptions())
    assert GGUFFile(tmp_path / "model.gguf").tensors["token_embd.weight"].number == 8  # Q8_0
    with pytest.raises(ConfigurationError, match=r"gguf_embedding: the run quantized model\.embed_tokens"):
        format_.write(tied, tmp_path, ExportOptions(gguf_embedding="F16"))


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_formats_that_do_not_get_the_rounded_numbers(tied: FinishedRun, name: str, tmp_path: Path) -> None:
    format_ = format_of(name)
    view = format_.view(tied)
    assert view.outer == [] and len(view.weights) == 14 and view.digests == tied.digests
    assert "rounded to bfloat16" in unpacked(tied)
    format_.write(view, tmp_path, ExportOptions())
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored[EMBEDDING], tied.quantized(EMBEDDING).dequantize(torch.bfloat16))
    assert HEAD not in stored


def test_compressed_tensors_loads_what_it_is_given(untied: FinishedRun, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    assert _written(untied, "compressed-tensors", tmp_path / "folder") == 14


def test_native_scales_what_it_looks_up_as_the_model_does(tmp_path: Path) -> None:
    run = outer_run(tmp_path, "scaled", embedding={"bits": 4, "group_size": 16})
    assert _written(run, "native", tmp_path / "native") == 15


def test_native_rounds_an_embedding_that_does_more(tied: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Embedding):
        pass

    monkeypatch.setattr(tied.network.get_input_embeddings(), "__class__", Other)
    view = format_of("native").view(tied)
    assert view.outer == [] and format_of("native").refuse(view) is None
