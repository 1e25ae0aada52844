"""Runs of ggml's I-types: started by llama.cpp or from a file, trained, exported, and stored as they were computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import lightning_gsq
from lightning_gsq.cli import main
from lightning_gsq.cli.classes import class_path
from lightning_gsq.export import FinishedRun, open_run
from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.gguf import FILE, GGUFFormat
from lightning_gsq.gguf.blocks import encode
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.types.codec import dequantize
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.run.block_files import read_header
from tests.support.exported import SHAPE, quantize, save_model
from tests.support.runs import write_config

LLAMA_CPP = {"class_path": class_path("model.warm_start", "llamacpp")}
DOWN = "model.layers.0.mlp.down_proj.weight"
INCLUDE = ["*.down_proj"]
CONFIG = LlamaConfig(**SHAPE)


def refine(tmp_path: Path, scheme: str, **settings: Any) -> FinishedRun:
    """A trained run of down_proj in a type of code vectors."""
    model = tmp_path / "model"
    if not model.exists():
        save_model(model, CONFIG)
    own = {"warm_start": LLAMA_CPP, "phases": ["blocks"], "include": INCLUDE, "blocks": "0:1", **settings}
    return quantize(model, tmp_path / "run", 3, 64, scheme=scheme, **own)


@pytest.mark.parametrize("scheme", ["iq3_xxs", "iq2_xxs", "iq3_s", pytest.param("iq1_m", marks=pytest.mark.slow)])
def test_a_run_is_exported_bit_for_bit(tmp_path: Path, scheme: str) -> None:
    """In GGUF, whose values llama.cpp and the gguf package read alike, and in the native format, which stays packed."""
    run = refine(tmp_path, scheme, export=["native"])
    tensor = run.tensor(DOWN)
    assert tensor.scheme.preset == scheme
    (tmp_path / "gguf").mkdir()
    ledger = GGUFFormat().write(run, tmp_path / "gguf", ExportOptions())
    file = GGUFFile(tmp_path / "gguf" / FILE)
    stored, kind = file.tensors["blk.0.ffn_down.weight"], TYPES[scheme.upper()]
    assert stored.number == kind.number
    # Packed scales of a row begin with a word of their own: three bits for each of 16 leave half a word empty.
    assert 0 <= tensor.ledger().per_weight()["total"] - kind.bits < 32 / 256
    assert torch.equal(dequantize(file.raw("blk.0.ffn_down.weight"), stored.number), tensor.dequantize())
    assert next(own for own in ledger.entries if own.name == DOWN).codes > 0
    loaded = lightning_gsq.load(run.folder.root / "export" / "native", dtype=torch.float32)
    layer = loaded.get_submodule(DOWN.removesuffix(".weight"))
    assert torch.equal(layer.dequantize(), tensor.dequantize())  # type: ignore[operator]
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), x @ tensor.dequantize().T, atol=1e-5)


def test_a_file_is_the_start_of_its_own_refinement(tmp_path: Path) -> None:
    """Not trained it comes out as it was, byte by byte; trained it has the same size."""
    first = refine(tmp_path, "iq2_xxs", phases=["init"])
    (tmp_path / "file").mkdir()
    GGUFFormat().write(first, tmp_path / "file", ExportOptions())
    file = tmp_path / "file" / FILE
    warm_start = {"class_path": class_path("model.warm_start", "fromfile"), "init_args": {"file": str(file)}}
    for phases in (["init"], ["blocks"]):
        (tmp_path / phases[0]).mkdir()
        again = refine(tmp_path / phases[0], "iq2_xxs", phases=phases, warm_start=warm_start)
        out = tmp_path / phases[0] / "out"
        out.mkdir()
        GGUFFormat().write(again, out, ExportOptions())
        assert len((out / FILE).read_bytes()) == len(file.read_bytes())
        if phases == ["init"]:
            assert (out / FILE).read_bytes() == file.read_bytes()


def test_training_lowers_the_error_of_a_block(tmp_path: Path) -> None:
    """By the check on held-out sequences, which decides whether a block keeps its start; scales go on end to end."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"Line {i}: the square of {i} is {i * i}.\n" for i in range(700)), encoding="utf-8")
    settings = {
        "model__scheme": "iq2_xxs",
        "model__warm_start": LLAMA_CPP,
        "model__include": INCLUDE,
        "model__blocks": "0:1",
        "model__phases": ["init", "blocks", "end_to_end"],
        "data__batch_size": 2,
    }
    config = write_config(save_model(tmp_path / "model", CONFIG), corpus, tmp_path, **settings)
    assert main(["fit", "--config", str(config)]) == 0
    header = read_header(tmp_path / "run" / "blocks" / "block-000.safetensors")
    assert header is not None and header.measures["final"] < 0.95 * header.measures["start"]
    assert header.measures["flip_rate"] > 0
    run = open_run(tmp_path / "run")
    if run.kind == "end_to_end":
        encode(run.tensor(DOWN), TYPES["IQ2_XXS"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_start": {"class_path": class_path("model.warm_start", "rtn")}}, "whose weights are code vectors"),
        (
            {"warm_start": {"class_path": class_path("model.warm_start", "gptq")}},
            "warm_start LeastSquares, LlamaCpp",
        ),
        ({"embedding": "iq3_s"}, "model.embedding is rounded weight by weight"),
        ({"include": ["*.up_proj"]}, "llama.cpp takes iq4_nl for those"),
    ],
    ids=["RTN", "GPTQ", "embedding", "rows"],
)
def test_what_cannot_be_is_refused_before_the_run(
    tmp_path: Path, settings: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        refine(tmp_path, "iq3_xxs", **settings)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "run").rglob("*.safetensors"))
