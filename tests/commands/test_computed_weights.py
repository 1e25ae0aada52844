"""Commands that only look at a model, where what is computed on loading would fill the memory: files for a while."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_gsq.cli import main
from lightning_gsq.commands.predict import predict
from lightning_gsq.commands.test import test as zero_shot_test
from lightning_gsq.models import computed_weights, loading
from tests.support.published import in_fp8, in_int4, in_mxfp4
from tests.support.runs import write_config

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gsq.models.dequantizing.DequantizedWarning")
KINDS: dict[str, Callable[[Path], Any]] = {
    "FP8": lambda folder: in_fp8("deepseek_v3", folder),
    "INT4": lambda folder: in_int4("deepseek_v3", folder, only=".mlp.experts."),
    "MXFP4": in_mxfp4,
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the commands write what they compute; temporary folders are made below ``tmp``."""
    places: list[Path] = []
    write = computed_weights._write
    monkeypatch.setattr(computed_weights, "_write", lambda place, values: (places.append(place), write(place, values)))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return places


def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed_weights, "PART_OF_MEMORY", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_predict(kind: str, tmp_path: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS[kind](tmp_path / "model")
    options: dict[str, Any] = {"max_new_tokens": 6, "dtype": "float16" if kind == "INT4" else "auto"}  # of its scales
    usual = predict(str(tmp_path / "model"), ["Line 1"], **options)
    assert not written
    _short(monkeypatch)
    assert predict(str(tmp_path / "model"), ["Line 1"], **options) == usual
    assert written and all(place.is_relative_to(tmp_path / "tmp") for place in written)
    assert not list((tmp_path / "tmp").iterdir())


def test_validate_with_another_model(
    corpus: Path, tmp_path: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Both models are in files."""
    for name in ("model", "other"):
        in_fp8("deepseek_v3", tmp_path / name)
    config = write_config(tmp_path / "model", corpus, tmp_path)
    assert main(["validate", "--config", str(config), "--against", str(tmp_path / "other")]) == 0
    usual = capsys.readouterr().out
    assert "perplexity" in usual and not written
    _short(monkeypatch)
    assert main(["validate", "--config", str(config), "--against", str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out == usual
    assert len({place.relative_to(tmp_path / "tmp").parts[0] for place in written}) == 2
    assert not list((tmp_path / "tmp").iterdir())


def test_zero_shot_tasks(tmp_path: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    in_fp8("deepseek_v3", tmp_path / "model")
    _short(monkeypatch)
    here = zero_shot_test.__globals__
    for name, stand_in in {"check_installed": lambda: None, "load_tasks": lambda *_: {}}.items():
        monkeypatch.setitem(here, name, stand_in)
    monkeypatch.setitem(here, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        zero_shot_test(str(tmp_path / "model"), ["any"], device="cpu")
    assert written and not list((tmp_path / "tmp").iterdir())


def test_plan_with_a_size(corpus: Path, tmp_path: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the disk of the run folder, where there is one."""
    in_fp8("deepseek_v3", tmp_path / "model")
    config = write_config(tmp_path / "model", corpus, tmp_path, model__size="7bpw", model__choices=["w4g16", "w8g16"])
    _short(monkeypatch)
    monkeypatch.setattr("lightning_gsq.commands.sizing_before.make_menu", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plan", "--config", str(config), "--probe", "false"])
    run = tmp_path / "run"
    assert written and all(place.is_relative_to(run) for place in written)
    assert not [path for path in run.iterdir() if computed_weights.FOLDER in path.name]


def test_without_room_for_the_files_a_line_says_what_stays_in_memory(
    tmp_path: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_fp8("deepseek_v3", tmp_path / "model")
    _short(monkeypatch)
    monkeypatch.setattr(computed_weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with caplog.at_level(logging.WARNING):
        loading.load_model(loading.resolve(str(tmp_path / "model")), quantized=True)
    assert not written and not list((tmp_path / "tmp").iterdir())
    assert "held in memory; set TMPDIR to a folder on another disk" in caplog.text
