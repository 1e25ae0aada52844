"""Loading a finished run: what its native export gives, whether that is there, gone, or of an earlier result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightning_gsq
from lightning_gsq.commands.export import export
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import open_run
from lightning_gsq.packed.layers import PackedWeight
from lightning_gsq.system.console import make_console
from tests.support.finished import MakeRun

IDS = torch.arange(12)[None]


def logits(folder: Path) -> Tensor:
    model = lightning_gsq.load(folder, dtype=torch.float32)
    assert any(isinstance(module, PackedWeight) for module in model.modules())
    result: Tensor = model(IDS).logits
    return result


def export_native(run: Path) -> Path:
    return export(str(run), ["native"], console=make_console(quiet=True))["native"]


@torch.no_grad()
def test_a_run_loads_as_its_native_export_does(new_run: MakeRun) -> None:
    run = new_run()
    straight = logits(run)
    assert not (run / "export").exists()  # nothing is left behind
    native = export_native(run)
    assert torch.equal(straight, logits(native))
    shutil.rmtree(run.parent / "original")  # which an export that is there and current does without
    assert torch.equal(straight, logits(run))
    (native / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="original"):
        lightning_gsq.load(run)


@torch.no_grad()
def test_an_export_of_an_earlier_result_is_not_what_gets_loaded(new_run: MakeRun) -> None:
    run = new_run()
    native = export_native(run)
    opened = open_run(run)
    first = opened.folder.read_block("block", 0, opened.plans[0].expected)
    opened.folder.write_block("block", 1, first)
    assert not torch.equal(logits(run), logits(native))


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ConfigurationError, match=r"the run in .* is not finished; resume it") as error:
        lightning_gsq.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_that_no_packed_form_holds_names_the_way_out(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_gsq.export.formats.native import NativeFormat

    run = new_run()
    monkeypatch.setattr(NativeFormat, "refuse_weights", lambda self, run: "native has no such part")
    with pytest.raises(ConfigurationError, match=r"with its weights packed: native has no such part.*Quantized\("):
        lightning_gsq.load(run)
