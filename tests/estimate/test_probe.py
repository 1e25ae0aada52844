"""``plan`` tries a block with every start, and what it says of the time comes from that."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from lightning_gsq import quantizers
from lightning_gsq.cli import main
from lightning_gsq.cli.classes import WARM_STARTS
from tests.support.runs import write_config
from tests.support.tiny import COMMON, byte_tokenizer, random_model

SCHEMES = {"RTN": "w3g64", "GPTQ": "mlx3g64", "LeastSquares": "q4_k", "LlamaCpp": "iq3_s", "DualMode": "w1g64"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows hold blocks of 256 weights."""
    folder = tmp_path_factory.mktemp("wide")
    random_model(LlamaConfig(**{**COMMON, "hidden_size": 256, "intermediate_size": 256})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_every_start_is_here() -> None:
    """But that from a file, which ``tests/commands/test_file_types.py`` has."""
    assert set(SCHEMES) == set(WARM_STARTS) - {"FromFile"}


@pytest.mark.parametrize(("start", "scheme"), SCHEMES.items())
def test_a_block_is_tried(
    wide: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], start: str, scheme: str
) -> None:
    settings = {"class_path": f"{quantizers.__name__}.{start}"}
    config = write_config(wide, corpus, tmp_path, model__scheme=scheme, model__warm_start=settings)
    assert main(["plan", "--config", str(config)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "ms a step" in said
