"""GPTQ folders hold a run exactly: by the layout's definition, and by gptqmodel's own account where it is installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.gptq import GPTQFormat, quantization_config
from lightning_gsq.export.formats.linear import linear_bits
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.exported import quantize, save_model
from tests.support.weights import random_tensor

FORMAT = GPTQFormat()
# It builds from source and declares more dependencies than a test environment should have; see CONTRIBUTING.md.
needs_gptqmodel = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")


def unpack_column(words: list[int], bits: int, count: int) -> list[int]:
    """By Python's integers, which know no words."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [stream >> (bits * i) & (2**bits - 1) for i in range(count)]


@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 40, -1])
def test_layout(bits: object, group_size: int) -> None:
    """weight = scales[g_idx] * (q - (stored zero + 1)), everything packed along the longer axis of its matrix."""
    tensor = random_tensor(bits, group_size, 96, rows=32)
    parts, stored = FORMAT.encode(tensor), linear_bits(tensor.scheme)
    q_IO = torch.tensor([unpack_column(column, stored, 96) for column in parts["qweight"].T.tolist()]).T
    zeros_GO = torch.tensor([unpack_column(row, stored, 32) for row in parts["qzeros"].tolist()]) + 1
    groups_I = parts["g_idx"].long()
    w_IO = parts["scales"].float()[groups_I] * (q_IO - zeros_GO[groups_I])
    assert torch.equal(w_IO.T, tensor.dequantize())
    assert parts["qweight"].shape == (96 * stored // 32, 32)


def test_layers_that_differ_from_most_are_named() -> None:
    layers = {"m.a": QuantScheme(3, 64), "m.b": QuantScheme(3, 64), "m.c": QuantScheme("ternary", 32)}
    config = quantization_config(layers, ["m.d"], "writer:1")
    assert (config["bits"], config["group_size"]) == (3, 64)
    assert config["dynamic"] == {r"-:^m\.d$": {}, r"^m\.c$": {"bits": 2, "group_size": 32}}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("gptq")
    overrides = {"*.o_proj": {"bits": "ternary", "group_size": 32}, "*.k_proj": {"bits": 4}}
    run = quantize(save_model(root / "model"), root / "run", 3, 64, overrides=overrides, exclude=["*.0.mlp.up_proj"])
    (root / "out").mkdir()
    ledger = FORMAT.write(run, root / "out", ExportOptions())
    return run, root / "out", ledger


def test_ledger_counts_the_files(mixed) -> None:  # type: ignore[no-untyped-def]
    run, folder, ledger = mixed
    assert FORMAT.refuse(run) is None
    assert ledger.num_bytes == (folder / "model.safetensors").stat().st_size
    assert ledger.total("padding") == 0 and ledger.total("redundant") > 0


@needs_gptqmodel
def test_gptqmodel_computes_with_the_same_weights(mixed) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    report = FORMAT.check(run, folder)
    assert report.weights == (13, 13)
    assert report.logits is not None and report.logits[0] <= 1e-5 * report.logits[1]


@pytest.mark.parametrize(("bits", "message"), [(5, "another, planar layout"), (3, "multiples of 32")])
def test_what_gptq_cannot_hold(tiny_llama: Path, tmp_path: Path, bits: int, message: str) -> None:
    run = quantize(tiny_llama, tmp_path / "run", bits, 16)
    refusal = FORMAT.refuse(run) or ""
    assert message in refusal and "compressed-tensors holds" in refusal
