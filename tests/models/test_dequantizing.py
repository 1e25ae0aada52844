"""Files whose weights are quantized, read as plain numbers: the numbers they stand for, and ordinary files again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_gsq.models import loading
from lightning_gsq.models.dequantizing import DequantizedWarning
from lightning_gsq.models.saving import write_dense
from tests.support.published import in_fp8, in_int4, in_mxfp4
from tests.support.scripts import script
from tests.support.tiny import byte_tokenizer

KINDS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "FP8": lambda folder: in_fp8("llama", folder),
    "FP8, experts": lambda folder: in_fp8("deepseek_v3", folder),
    # 40 rows in blocks of 32, as DeepSeek-V3 has 576 in blocks of 128; 48 rows, which two scales would share evenly
    "FP8, ragged": lambda folder: in_fp8("deepseek_v3", folder, block=20),
    "FP8, ragged but even": lambda folder: in_fp8("deepseek_v3", folder, block=24),
    "INT4": lambda folder: in_int4("llama", folder),
    "INT4, experts": lambda folder: in_int4("deepseek_v3", folder),
    "INT4, experts alone": lambda folder: in_int4("deepseek_v3", folder, only=".mlp.experts."),
    "MXFP4": in_mxfp4,
}


def test_what_only_the_configuration_of_the_text_decoder_says(tmp_path: Path) -> None:
    """As in Kimi-K2.5, a model for more than text."""
    folder = tmp_path / "model"
    script("sweep_decoders").build("llava").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    stored, meant = load_file(folder / "model.safetensors"), {}
    for name, value in list(stored.items()):
        if "language_model" in name and name.endswith("down_proj.weight"):
            codes = (value / (scale := value.abs().max() / 448)).to(torch.float8_e4m3fn)
            stored |= {name: codes, f"{name}_scale_inv": scale.view(1, 1)}
            meant[name] = codes.float() * scale
    assert meant
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config["text_config"]["quantization_config"] = method
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(DequantizedWarning, match="is published in FP8"):
        model = loading.load_model(loading.resolve(str(folder)))
    own = {n.split("layers.")[-1]: p for n, p in model.named_parameters() if "vision" not in n}
    for name, value in meant.items():
        found = own[name.split("layers.")[-1]]
        assert torch.equal(found, value.to(found.dtype))
    (tmp_path / "again").mkdir()
    write_dense(model, byte_tokenizer(), tmp_path / "again", torch.float32)
    assert "quant_method" not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_that_they_stand_for(kind: str, tmp_path: Path) -> None:
    meant = KINDS[kind](tmp_path / "model")
    source = loading.resolve(str(tmp_path / "model"))
    loading.check_headers(source, loading.load_config(source))
    with pytest.warns(DequantizedWarning, match="are read as plain numbers"):
        model = loading.load_model(source)
    assert {p.dtype for p in model.parameters()} == {model.dtype}
    (tmp_path / "again").mkdir()
    write_dense(model, byte_tokenizer(), tmp_path / "again", torch.float32)
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(meant)
    assert all(torch.equal(written[name], value.float()) for name, value in meant.items())
    again = loading.load_model(loading.resolve(str(tmp_path / "again")))
    assert getattr(again.config, "quantization_config", None) is None
