"""What fit exports at its end: refused before it trains, made again only where something changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_gsq.cli import main
from lightning_gsq.export.folders import MARK
from tests.support.exported import save_model
from tests.support.runs import write_config

QUICK = {"model__phases": ["init"], "data__num_sequences": 8, "model__scheme": {"bits": 4, "group_size": 32}}


def _fit(config: Path, formats: str) -> int:
    try:
        return main(["fit", "--config", str(config), "--export", formats])
    except SystemExit as exit_:
        return int(exit_.code or 0)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ("[native,gguf]", "format gguf: the tokenizer has no merges"),
        ("[gptq]", "format gptq: gptq at 3 bits needs sizes that are multiples of 32"),
        ("[gguf,gptq]", "formats that cannot be written:\n  gguf: the tokenizer has no merges"),
        ("[nativ]", "did you mean native?"),
    ],
)
def test_formats_that_cannot_hold_the_run_are_refused_before_it_trains(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], formats: str, message: str
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path, **{**QUICK, "model__scheme": {"bits": 3, "group_size": 16}})
    assert _fit(config, formats) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list((tmp_path / "run").glob("blocks/*")) and not (tmp_path / "run" / "recipe.yaml").exists()


def test_somebody_elses_folder_is_left_alone_before_and_after(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path, **QUICK)
    assert main(["fit", "--config", str(config)]) == 0
    thesis = tmp_path / "run" / "export" / "native" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("precious")
    assert _fit(config, "[native]") == 2
    assert "was not written by an export" in capsys.readouterr().err
    assert thesis.read_text() == "precious"


def test_exports_are_made_again_only_where_they_are_stale_or_damaged(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(save_model(tmp_path / "llama"), corpus, tmp_path, **QUICK)
    exports = tmp_path / "run" / "export"
    assert _fit(config, "[native,gguf]") == 0
    before, _, after = capsys.readouterr().out.partition("perplexity of the full-precision model")
    assert "What loads 4 bit, groups of 32" in before and "Q4_0" in before and "load gguf:" in after
    files = [exports / "native" / "model.safetensors", exports / "gguf" / "model.gguf"]
    first = [file.read_bytes() for file in files]
    times = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    assert _fit(config, "[native,gguf]") == 0
    assert capsys.readouterr().out.count("is there, whole and current") == 2
    assert [file.stat().st_mtime_ns for file in files] == times
    damaged = bytearray(first[0])
    damaged[-9] ^= 1
    files[0].write_bytes(damaged)
    shutil.rmtree(exports / "gguf")
    assert _fit(config, "[native,gguf]") == 0
    assert [file.read_bytes() for file in files] == first
    (exports / "native" / MARK).unlink()
    assert _fit(config, "[native]") == 2
    assert "was not written by an export" in capsys.readouterr().err
