"""What a table says of files before they exist, against the files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lightning_gsq.cli import main
from lightning_gsq.export import ExportOptions, FinishedRun, all_formats, format_of
from lightning_gsq.export.bits_table import print_bits
from tests.support.outer import outer_run
from tests.support.runs import write_config

FORMATS = ["native", "gguf", "compressed-tensors", "dequantized", "mlx"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return outer_run(
        tmp_path_factory.mktemp("run"),
        "tied",
        4,
        embedding={"bits": 8, "group_size": 32},
        overrides={"*.down_proj": "q4_1"},
    )


def rows(console: Console) -> dict[str, list[str]]:
    """Cells of a table's rows by the first one."""
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def table(run: FinishedRun, formats: list[str]) -> tuple[dict[str, list[str]], str]:
    console = Console(record=True, width=300, file=io.StringIO())
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    print_bits(console, [format_of(name) for name in formats], run, parameters)
    text = console.export_text(clear=False)
    return rows(console), text


def test_bits_of_the_files(run: FinishedRun, tmp_path: Path) -> None:
    said, text = table(run, FORMATS)
    assert "embed_tokens: 8 bit, groups of 32" in text
    assert said["native"][:3] == ["4.5", "5", "8.5"]
    assert said["gguf"][:3] == ["4.5 (Q4_0)", "5 (Q4_1)", "8.5 (Q8_0)"]
    assert said["mlx"][:3] == ["5", "5", "9"] and said["dequantized"][:3] == ["16", "16", "16"]
    assert said["compressed-tensors"] == ["refused"] * 3 + [""]
    assert "compressed-tensors holds symmetric levels" in text
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    for name in ("native", "mlx", "dequantized"):
        folder, format_ = tmp_path / name, format_of(name)
        folder.mkdir()
        ledger = format_.write(format_.view(run), folder, ExportOptions())
        bits = 8 * (ledger.num_bytes - ledger.summary()["bytes"]["headers"]) / parameters
        found = re.search(r"([\d.]+) bits a parameter", said[name][3])
        assert found is not None and float(found[1]) == pytest.approx(bits, rel=0.01)


def test_plan_prints_every_format(run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the configuration alone."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(run.network.config.to_dict()))
    corpus = tmp_path / "text.txt"
    corpus.write_text("x")
    config = write_config(
        model,
        corpus,
        tmp_path,
        model__scheme={"bits": 4, "group_size": 32},
        model__embedding="auto",
    )
    assert main(["plan", "--config", str(config), "--probe", "false"]) == 0
    text = capsys.readouterr().out
    assert "Bits a weight in each file" in text
    assert all(f"│ {name}" in text for name in all_formats()) and "8.5 (Q8_0)" in text.replace("\n", " ")
    assert torch.device("meta") not in {parameter.device for parameter in run.network.parameters()}
