"""A GGUF file's codes and scales as the start: they come in, and go out, bit by bit."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import FinishedRun
from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.gguf import FILE, GGUFFormat
from lightning_gsq.quantizers import FromFile
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.exported import quantize, save_model

Made = tuple[FinishedRun, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Made]:
    """Makes runs of these bits and groups, and their GGUF files, whose embedding and head are Q8_0."""
    model = save_model(tmp_path_factory.mktemp("original"))

    @functools.cache
    def make(bits: int, group_size: int) -> Made:
        folder = tmp_path_factory.mktemp(f"{bits}-{group_size}")
        run = quantize(model, folder / "run", bits, group_size)
        GGUFFormat().write(run, folder, ExportOptions(gguf_embedding="Q8_0"))
        return run, folder / FILE

    return make


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (2, 64)])
def test_codes_and_scales_come_back(
    tmp_path: Path, made: Callable[[int, int], Made], bits: int, group_size: int
) -> None:
    """Also through a whole run: quantized tensors, key-values and everything else are the file's own bytes."""
    first, file = made(bits, group_size)
    start = FromFile(str(file))
    for name in first.weights:
        dense, tensor = first.network.get_parameter(name).float(), first.tensor(name)
        own = start.start(name, dense, None, tensor.scheme)
        assert torch.equal(own.codes_OI, tensor.codes_OI)
        assert torch.equal(own.scales_OG, tensor.scales_OG.float())
        assert float((own.position_OI - own.codes_OI).abs().max()) < 2**bits
    warm_start = {"class_path": "lightning_gsq.quantizers.FromFile", "init_args": {"file": str(file)}}
    model = Path(first.address)
    again = quantize(model, tmp_path / "again", bits, group_size, warm_start=warm_start, embedding="auto")
    (tmp_path / "out").mkdir()
    GGUFFormat().write(again, tmp_path / "out", ExportOptions())
    assert (tmp_path / "out" / FILE).read_bytes() == file.read_bytes()


def test_what_does_not_fit_is_refused_before_the_run(tmp_path: Path, made: Callable[[int, int], Made]) -> None:
    start = FromFile(str(made(4, 32)[1]))
    name = "model.layers.0.mlp.up_proj.weight"
    start.check({name: (QuantScheme(4, 32), (256, 128))})
    with pytest.raises(ConfigurationError, match=r"is stored as Q4_0, the run's is 3 bit.*; use --model\.scheme file"):
        start.check({name: (QuantScheme(3, 64), (256, 128))})
    with pytest.raises(ConfigurationError, match="a file of another model"):
        start.check({name: (QuantScheme(4, 32), (256, 64))})
    with pytest.raises(ConfigurationError, match=r"has no name for the parameter .* architecture is llama"):
        start.check({"model.layers.7.mlp.up_proj.weight": (QuantScheme(4, 32), (256, 128))})
    with pytest.raises(ConfigurationError, match=r"attn_norm.weight is stored as F32, whose weights cannot"):
        start.check({"model.layers.0.input_layernorm.weight": (QuantScheme(4, 32), (1, 128))})
    with pytest.raises(ConfigurationError, match="cannot be read"):
        FromFile(str(tmp_path / "none.gguf"))
    with pytest.raises(ConfigurationError, match=r"warm_start\.rounding: FromFile rounds nothing"):
        FromFile(str(made(4, 32)[1]), start)
