"""Runs whose weights have presets: every phase, resumed, exported, loaded, planned."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import lightning_gsq
from lightning_gsq.cli import main
from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.gguf import FILE, GGUFFormat
from lightning_gsq.export.formats.native import NativeFormat
from lightning_gsq.export.opening import open_run
from lightning_gsq.export.registry import format_of
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.types.codec import dequantize
from tests.support.exported import save_model
from tests.support.runs import write_config

OVERRIDES = {"*.down_proj": "q4_k", "*.up_proj": "iq4_nl", "*.gate_proj": "mlx3g32", "*.o_proj": {"bits": 3}}


def test_a_run_of_mixed_presets(tmp_path: Path) -> None:
    """down_proj has rows of 256; the others of 128, where q3_k falls back to q4_0."""
    model = save_model(tmp_path / "model")
    corpus = tmp_path / "text.txt"
    corpus.write_text("".join(f"In line {i} the square of the number is {i * i}.\n" for i in range(300)))
    config = write_config(
        model,
        corpus,
        tmp_path,
        model__scheme="q3_k",
        model__fallback=True,
        model__overrides=OVERRIDES,
        model__phases=["init", "blocks", "end_to_end"],
        trainer__max_steps=2,
        data__num_sequences=8,
        data__num_validation_sequences=2,
        evaluation__num_windows=1,
    )
    assert main(["fit", "--config", str(config)]) == 0
    assert main(["fit", "--config", str(config)]) == 0  # reads every block back
    run = open_run(tmp_path / "run")
    kinds = {name.split(".")[-2]: str(weight.scheme) for name, weight in run.weights.items()}
    assert kinds["q_proj"] == "q4_0" and kinds["down_proj"] == "q4_k" and kinds["up_proj"] == "iq4_nl"
    assert kinds["gate_proj"] == "mlx3g32" and kinds["o_proj"] == "3 bit, groups of 16"
    native, gguf_folder = tmp_path / "native", tmp_path / "gguf"
    native.mkdir()
    gguf_folder.mkdir()
    NativeFormat().write(run, native, ExportOptions())
    packed = lightning_gsq.load(native)
    for name in run.weights:
        module = packed.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.dequantize(), run.dense(name, torch.float32))  # type: ignore[operator]
    logits = packed(torch.tensor([[1, 2, 3]])).logits
    assert bool(torch.isfinite(logits).all())
    GGUFFormat().write(run, gguf_folder, ExportOptions())
    file, stored = GGUFFile(gguf_folder / FILE), "blk.0.ffn_down.weight"
    dense = dequantize(file.raw(stored), file.tensors[stored].number)
    assert torch.equal(dense, run.dense("model.layers.0.mlp.down_proj.weight", torch.float32))
    assert "mlx3g32" in (format_of("gptq").refuse(run) or "") or "iq4_nl" in (format_of("gptq").refuse(run) or "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["scheme"]["name"] == "q3_k"
