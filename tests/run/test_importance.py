"""Importance matrices: what a run writes, what it does with one, and which it refuses."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import encode
from lightning_gsq.gguf.imatrix import ImportanceMatrix, InputSquares, read_imatrix, write_imatrix
from lightning_gsq.gguf.quantizer import quantize_with_llama_cpp
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.quantizers import GPTQ, RTN, LlamaCpp
from lightning_gsq.training import ModelQuantization
from tests.support.exported import SHAPE, quantize, save_model
from tests.support.runs import write_config

EXPERTS = Qwen3MoeConfig(
    **SHAPE, head_dim=32, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64, norm_topk_prob=True
)
LLAMA_CPP = {"class_path": "lightning_gsq.quantizers.LlamaCpp"}


@pytest.fixture(scope="module", params=[LlamaConfig(**SHAPE), EXPERTS], ids=["llama", "experts"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: PretrainedConfig = request.param
    return save_model(tmp_path_factory.mktemp("model") / "model", config)


def of_type(folder: Path, model: Path, **settings: Any) -> Any:
    return quantize(model, folder, 3, 64, scheme="q4_0", warm_start=LLAMA_CPP, **settings)


def test_what_a_run_writes_is_of_the_original_model_and_comes_back(model: Path, tmp_path: Path) -> None:
    for name, bits in (("coarse", 1), ("fine", 8)):
        quantize(model, tmp_path / name, bits, 32, save_imatrix=True, embedding={"bits": 2, "group_size": 32})
    file = tmp_path / "coarse" / "imatrix.gguf"
    matrix = read_imatrix(file)
    assert (matrix.chunk_count, matrix.chunk_size, matrix.datasets) == (2, 32, ("coarse.txt",))
    assert matrix.entries["blk.1.attn_q.weight"].count_E.tolist() == [64.0]
    fine = read_imatrix(tmp_path / "fine" / "imatrix.gguf")
    assert set(fine.entries) == set(matrix.entries)
    assert all(torch.equal(entry.sum_EI, fine.entries[name].sum_EI) for name, entry in matrix.entries.items())
    # With it, llama.cpp's quantizers give the bytes that its program would write.
    run = of_type(tmp_path / "again", model, imatrix=str(file))
    for part in ("q_proj", "down_proj"):
        name = next(name for name in run.weights if part in name)
        weight, stored = run.weights[name], {"q_proj": "attn_q", "down_proj": "ffn_down"}[part]
        mean_EI = matrix.entries[f"blk.0.{stored}{'_exps' if weight.site.experts else ''}.weight"].mean()
        matrices = weight.site.to_matrix(run.network.get_parameter(name)).float().chunk(len(mean_EI))
        expected = [quantize_with_llama_cpp(w, TYPES["Q4_0"], m) for w, m in zip(matrices, mean_EI, strict=True)]
        assert encode(run.tensor(name), TYPES["Q4_0"]).tobytes() == b"".join(rows.tobytes() for rows in expected)


def test_it_is_written_again_only_where_it_is_not_whole(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    quantize(model, folder, 3, 32)
    assert not (folder / "imatrix.gguf").exists()
    quantize(model, folder, 3, 32, save_imatrix=True)  # the same run: it decides no weight
    content, made = (folder / "imatrix.gguf").read_bytes(), (folder / "imatrix.gguf").stat().st_mtime_ns
    quantize(model, folder, 3, 32, save_imatrix=True)
    assert (folder / "imatrix.gguf").stat().st_mtime_ns == made
    (folder / "imatrix.gguf").write_bytes(content[:-1] + b"x")
    quantize(model, folder, 3, 32, save_imatrix=True)
    assert (folder / "imatrix.gguf").read_bytes() == content


def with_dat(path: Path, entries: Mapping[str, torch.Tensor], calls: int = 3) -> Path:
    """The older form: columns of experts one after another, numbers times the calls."""

    def text(value: str) -> bytes:
        return struct.pack("<i", len(value)) + value.encode()

    content = struct.pack("<i", len(entries))
    for name, mean_EI in entries.items():
        values = (mean_EI * calls).reshape(-1).tolist()
        content += text(name) + struct.pack("<ii", calls, len(values)) + struct.pack(f"<{len(values)}f", *values)
    path.write_bytes(content + struct.pack("<i", 7) + text("wiki.raw"))
    return path


def test_both_forms_of_a_file_give_the_same_run(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "first", 3, 32, save_imatrix=True)
    file = tmp_path / "first" / "imatrix.gguf"
    squares = {name: entry.mean() for name, entry in read_imatrix(file).entries.items()}
    old = with_dat(tmp_path / "old.dat", {name: 4 * mean_EI.round(decimals=3) for name, mean_EI in squares.items()})
    new = {
        name: InputSquares(12 * mean.round(decimals=3), torch.full((len(mean),), 3.0)) for name, mean in squares.items()
    }
    write_imatrix(tmp_path / "new.gguf", ImportanceMatrix(new, ("x",), 1, 3))
    read = read_imatrix(old)
    assert (read.datasets, read.chunk_count) == (("wiki.raw",), 7)
    runs = [
        of_type(tmp_path / f"run-{path.suffix[1:]}", model, imatrix=str(path)) for path in (old, tmp_path / "new.gguf")
    ]
    assert all(
        torch.equal(runs[0].dense(name, torch.float32), runs[1].dense(name, torch.float32)) for name in runs[0].weights
    )


def test_it_decides_the_run_and_may_move(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    quantize(model, tmp_path / "first", 3, 32, save_imatrix=True)
    rtn = {"class_path": "lightning_gsq.quantizers.RTN", "init_args": {"weighted": True}}
    file = tmp_path / "first" / "imatrix.gguf"
    own = quantize(model, tmp_path / "own", 3, 32, warm_start=rtn)
    run = quantize(model, tmp_path / "run", 3, 32, warm_start=rtn, imatrix=str(file))
    assert not torch.equal(*(r.dense("model.layers.1.mlp.down_proj.weight", torch.float32) for r in (own, run)))
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(file.read_bytes())
    quantize(model, tmp_path / "run", 3, 32, warm_start=rtn, imatrix=str(moved))  # goes on, with nothing to do
    matrix = read_imatrix(file)
    name = "blk.0.attn_q.weight"
    other = InputSquares(matrix.entries[name].sum_EI + 1, matrix.entries[name].count_E)
    write_imatrix(moved, ImportanceMatrix({**matrix.entries, name: other}, (), 0, 0))
    with pytest.raises(AssertionError):
        quantize(model, tmp_path / "run", 3, 32, warm_start=rtn, imatrix=str(moved))


def test_files_of_another_model_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, corpus = save_model(tmp_path / "model"), tmp_path / "text.txt"
    corpus.write_text("".join(f"In line {i} the square of the number is {i * i}.\n" for i in range(300)))

    def said(content: ImportanceMatrix | bytes, **changes: Any) -> str:
        file = tmp_path / "x.gguf"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            write_imatrix(file, content)
        start = {"class_path": "lightning_gsq.quantizers.RTN", "init_args": {"weighted": True}}
        config = write_config(
            model, corpus, tmp_path, **{"model__imatrix": str(file), "model__warm_start": start, **changes}
        )
        capsys.readouterr()
        assert main(["fit", "--config", str(config)]) == 2
        return capsys.readouterr().err

    square = InputSquares(torch.ones(1, 32), torch.ones(1))
    assert "says nothing of blk.0.attn_q.weight" in said(ImportanceMatrix({"blk.9.ffn_up.weight": square}, (), 0, 0))
    narrow = said(ImportanceMatrix({"blk.0.attn_q.weight": square}, (), 0, 0))
    assert "has 1 x 32 numbers for blk.0.attn_q.weight" in narrow and "1 x 128 inputs" in narrow
    for damaged in (b"", b"GGUF", b"abc", struct.pack("<ii", 1, 99) + b"x", struct.pack("<i", -4)):
        assert "model.imatrix: " in said(damaged), damaged
    salient = said(b"", model__scheme={"bits": 1, "group_size": 32, "budget": 1.6})
    assert "model.imatrix: the salient part of" in salient
    gptq = {"class_path": "lightning_gsq.quantizers.GPTQ"}
    assert "--model.warm_start GPTQ needs whole Hessians" in said(b"", model__warm_start=gptq)
    assert not (tmp_path / "run" / "progress.json").exists()


def test_which_starts_take_one() -> None:
    for start in (RTN(weighted=True), LlamaCpp()):
        assert not ModelQuantization("x", warm_start=start, imatrix="y").start.watches_inputs
    for start in (GPTQ(), RTN(weighted=False), LlamaCpp(weighted=False)):
        with pytest.raises(ConfigurationError, match=r"model\.imatrix: .*RTN or LlamaCpp with weighted: true"):
            ModelQuantization("x", warm_start=start, imatrix="y")
