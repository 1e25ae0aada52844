"""A size in place of a width: choices within it to the byte, kept, given back, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from lightning_gsq.cli import main
from lightning_gsq.export import open_run
from tests.support.exported import SHAPE, quantize, save_model
from tests.support.runs import block_files, write_config
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks whose rows are multiples of 128, an embedding and a head."""
    return save_model(tmp_path_factory.mktemp("model"), LlamaConfig(**SHAPE))


def _bytes(folder: Path, format_: str) -> int:
    files = (folder / "export" / format_).glob("*.gguf" if format_ == "gguf" else "*.safetensors")
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("format_", "choices", "size"),
    [
        ("native", ["w2g64", "w3g64", "w4g64", "w6g64"], "200kB"),
        ("gguf", ["q2_0", "q4_0", "q5_0", "q8_0"], "230kB"),
        ("native", ["q4_0", "w3g32", "mlx6g64"], "4.9bpw"),
    ],
)
def test_the_file_is_as_large_as_was_asked_for(
    model: Path, tmp_path: Path, format_: str, choices: list[str], size: str
) -> None:
    run = quantize(model, tmp_path / "run", 3, 64, size=size, choices=choices, export=[format_])
    choice = run.recipe["choice"]
    written = _bytes(tmp_path / "run", format_)
    assert written == choice["num_bytes"]
    assert 0.995 * choice["limit"] <= written <= choice["limit"]
    assert len(set(choice["widths"].values())) > 1
    assert set(choice["widths"]) == set(run.weights)
    assert {name: str(run.weights[name].scheme) for name in run.outer}.keys() >= {"model.embed_tokens.weight"}
