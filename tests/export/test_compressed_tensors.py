"""compressed-tensors folders hold a run exactly, by the package's own account."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import CheckFailedError, ExportOptions
from lightning_gsq.export.formats.compressed_tensors import CompressedTensorsFormat, _dense, quantization_config
from lightning_gsq.export.formats.linear import linear_bits
from lightning_gsq.export.readers import packages
from tests.support.exported import edit_config, quantize, save_model
from tests.support.weights import random_tensor

FORMAT = CompressedTensorsFormat()


@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("columns", [96, 100])
def test_packing_is_the_packages_own(bits: object, columns: int) -> None:
    tensor = random_tensor(bits, -1, columns)
    parts, stored = FORMAT.encode(tensor), linear_bits(tensor.scheme)
    assert torch.equal(parts["weight_packed"], pack_to_int32(tensor.codes_OI, stored))
    shape = torch.Size(parts["weight_shape"].tolist())
    assert torch.equal(unpack_from_int32(parts["weight_packed"], stored, shape), tensor.codes_OI)
    assert parts["weight_scale"].dtype == torch.float16


def test_one_config_group_for_each_pair_of_bits_and_group_size() -> None:
    config = quantization_config({"a": (3, 64), "b": (4, None), "c": (2, 64), "d": (3, 64)}, ["lm_head"])
    groups = {tuple(group["targets"]): group["weights"] for group in config["config_groups"].values()}
    assert {names: (g["num_bits"], g["strategy"], g["group_size"]) for names, g in groups.items()} == {
        ("a", "d"): (3, "group", 64),
        ("b",): (4, "channel", None),
        ("c",): (2, "group", 64),
    }
    assert config["ignore"] == ["lm_head"]
    assert quantization_config({"a": (3, 64)}, [])["config_groups"]["group_0"]["targets"] == ["Linear"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A run with 3 bits, 1 bit, ternary, one scale a row, and a layer left alone; and its folder."""
    root = tmp_path_factory.mktemp("mixed")
    overrides = {
        "*.down_proj": {"bits": 1},
        "*.o_proj": {"bits": "ternary", "group_size": 32},
        "*.k_proj": {"bits": 4, "group_size": -1},
    }
    run = quantize(save_model(root / "model"), root / "run", 3, 64, overrides=overrides, exclude=["*.0.mlp.up_proj"])
    (root / "out").mkdir()
    ledger = FORMAT.write(run, root / "out", ExportOptions())
    return run, root / "out", ledger


def test_the_package_computes_with_the_same_weights(mixed) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    report = FORMAT.check(run, folder)
    assert report.weights == (13, 13)
    assert report.logits is not None and report.logits[0] <= 1e-5 * report.logits[1]
    assert report.same_text


def test_a_plain_load_computes_in_the_scales_dtype(mixed) -> None:  # type: ignore[no-untyped-def]
    """With bfloat16, the original model's dtype, the scales would be rounded."""
    run, folder, _ = mixed
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16
    for name in run.weights:
        assert torch.equal(_dense(model, name), run.dense(name, torch.float16))


def test_ledger_counts_the_files_and_what_follows_from_the_rest(mixed) -> None:  # type: ignore[no-untyped-def]
    _, folder, ledger = mixed
    assert ledger.num_bytes == (folder / "model.safetensors").stat().st_size
    assert ledger.total("redundant") == 13 * 2 * 64  # weight_shape
    assert "model.layers.0.mlp.up_proj.weight" in load_file(folder / "model.safetensors")


def test_a_wrong_file_fails_the_check(mixed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = __import__("json").loads((folder / "config.json").read_text())["quantization_config"]
    for group in config["config_groups"].values():
        if group["weights"]["num_bits"] == 2:
            group["weights"]["num_bits"] = 1
    edit_config(tmp_path, quantization_config=config)
    with pytest.raises(CheckFailedError):
        FORMAT.check(run, tmp_path)


def test_rows_that_end_inside_a_group_are_refused(tmp_path: Path) -> None:
    run = quantize(save_model(tmp_path / "model"), tmp_path / "run", 3, 48)
    assert "native holds it" in (FORMAT.refuse(run) or "")


def test_values_that_overflow_in_the_scales_dtype_are_refused(mixed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, _, _ = mixed
    run.network.model.norm.weight.data[0] = 1e6
    try:
        with pytest.raises(ConfigurationError, match=r"model\.norm\.weight reaches 9.99e\+05"):
            FORMAT.write(run, tmp_path, ExportOptions())
    finally:
        run.network.model.norm.weight.data[0] = 1


def test_without_the_package_nothing_is_checked_and_that_is_said(mixed, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    report = FORMAT.check(run, folder)
    assert report.weights is None
    assert report.describe().startswith("NOT CHECKED with compressed-tensors, which is not installed (pip install")
