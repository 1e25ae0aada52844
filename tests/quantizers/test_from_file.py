"""A GGUF file's codes and scales as the start: they come in, and go out, bit by bit."""

import json
from pathlib import Path

import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.gguf import FILE, GGUFFormat
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.quantizers import FromFile
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.exported import quantize, save_model


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 32), (2, 64)])
def test_codes_and_scales_come_back(tmp_path: Path, bits: int, group_size: int) -> None:
    """Also through a whole run: quantized tensors, key-values and everything else are the file's own bytes."""
    model = save_model(tmp_path / "model")
    first = quantize(model, tmp_path / "first", bits, group_size)
    (tmp_path / "file").mkdir()
    GGUFFormat().write(first, tmp_path / "file", ExportOptions(gguf_embedding="Q8_0"))
    file = tmp_path / "file" / FILE
    start = FromFile(str(file))
    for name in first.weights:
        dense, tensor = first.network.get_parameter(name).float(), first.tensor(name)
        own = start.start(name, dense, None, tensor.scheme)
        assert torch.equal(own.codes_OI, tensor.codes_OI)
        assert torch.equal(own.scales_OG, tensor.scales_OG.float())
        assert float((own.position_OI - own.codes_OI).abs().max()) < 2**bits
    warm_start = {"class_path": "lightning_gsq.quantizers.FromFile", "init_args": {"file": str(file)}}
    again = quantize(model, tmp_path / "again", bits, group_size, warm_start=warm_start, embedding="auto")
    (tmp_path / "out").mkdir()
    GGUFFormat().write(again, tmp_path / "out", ExportOptions())
    assert (tmp_path / "out" / FILE).read_bytes() == file.read_bytes()


def test_what_does_not_fit_is_refused_before_the_run(tmp_path: Path) -> None:
    run = quantize(save_model(tmp_path / "model"), tmp_path / "run", 4, 32)
    GGUFFormat().write(run, tmp_path, ExportOptions())
    start = FromFile(str(tmp_path / FILE))
    name = "model.layers.0.mlp.up_proj.weight"
    start.check({name: (QuantScheme(4, 32), (256, 128))})
    with pytest.raises(ConfigurationError, match=r"--model\.scheme\.bits 4 --model\.scheme\.group_size 32"):
        start.check({name: (QuantScheme(3, 64), (256, 128))})
    with pytest.raises(ConfigurationError, match="a file of another model"):
        start.check({name: (QuantScheme(4, 32), (256, 64))})
    with pytest.raises(ConfigurationError, match="has no name for the parameter"):
        start.check({"model.layers.7.mlp.up_proj.weight": (QuantScheme(4, 32), (256, 128))})
    with pytest.raises(ConfigurationError, match="ggml's type 1, whose grid"):
        start.check(
            {"lm_head.weight": (QuantScheme(4, 32), tuple(GGUFFile(tmp_path / FILE).tensors["output.weight"].shape))}
        )  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="cannot be read"):
        FromFile(str(tmp_path / "none.gguf"))


def test_the_types_of_a_file_of_several_are_named_as_options(tmp_path: Path) -> None:
    overrides = {"*.down_proj": "q4_k", "model.layers.1.self_attn.v_proj": "q8_0"}
    model = save_model(tmp_path / "model")
    run = quantize(model, tmp_path / "run", 3, 64, scheme="q4_0", overrides=overrides)
    GGUFFormat().write(run, tmp_path, ExportOptions())
    start = FromFile(str(tmp_path / FILE))
    with pytest.raises(ConfigurationError, match=r"All types of the file are") as caught:
        start.check({name: (QuantScheme(preset="q4_0"), weight.shape) for name, weight in run.weights.items()})
    options = str(caught.value).partition("All types of the file are ")[2]
    assert options.startswith("--model.scheme q4_0 --model.overrides '")
    said = json.loads(options.partition("--model.overrides ")[2].strip("'"))
    assert said == overrides
    start.check({name: (weight.scheme, weight.shape) for name, weight in run.weights.items()})
