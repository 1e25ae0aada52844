"""Orders of rows, found by comparing."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import Q4_0, projection
from lightning_gsq.gguf.fields import text
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.layout import other_in_file
from lightning_gsq.gguf.names import Names
from lightning_gsq.gguf.rows import Place, interleaved, parts_of_experts, places_in_file, to_model
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.gguf.write import NewTensor, write_gguf

NAME = "blk.0.attn_q.weight"


def written(path: Path, tensors: dict[str, torch.Tensor], quantized: bool = False) -> GGUFFile:
    """A file of the llama architecture."""
    kind = Q4_0 if quantized else TYPES["F32"]
    content = [
        NewTensor(
            name,
            tuple(value.shape),
            kind.number,
            lambda value=value: projection(value, kind) if quantized else value.numpy(),
        )
        for name, value in tensors.items()
    ]
    write_gguf(path, {"general.architecture": text("llama")}, content)
    return GGUFFile(path)


def random_matrix(rows: int = 64, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_halves_of_heads_are_interleaved() -> None:
    """Neighbours in the file are row i and row i + d/2 of a head in the model."""
    assert interleaved(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    gates, ups = parts_of_experts(8, experts=2, count=2)
    assert gates.tolist() == [0, 1, 4, 5] and ups.tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("heads", [None, 2, 4])
def test_of_orders_that_share_half_of_their_rows_the_right_one(
    tmp_path: Path, heads: int | None, quantized: bool
) -> None:
    w_OI = random_matrix()
    order = torch.arange(64) if heads is None else interleaved(64, heads)
    file = written(tmp_path / "x.gguf", {NAME: w_OI[order]}, quantized)
    (place,) = places_in_file(file, [NAME], w_OI, {2, 4}, same=not quantized)
    assert torch.equal(to_model([place], [place.of_file(w_OI)]), w_OI)
    assert (place.rows is None) == (heads is None)
    assert torch.equal(place.of_file(w_OI), w_OI[order])


def test_any_order_is_found_where_the_values_are_the_same(tmp_path: Path) -> None:
    w_OI = random_matrix()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    file = written(tmp_path / "x.gguf", {NAME: w_OI[order]})
    (place,) = places_in_file(file, [NAME], w_OI, {4}, same=True)
    assert place.rows is not None and place.rows.tolist() == order.tolist()


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    w_OI = random_matrix()
    file = written(tmp_path / "x.gguf", {NAME: random_matrix(65)[1:]}, quantized=True)
    for same in (True, False):
        with pytest.raises(ConfigurationError, match="with other values than the model, or with its rows in an order"):
            places_in_file(file, [NAME], w_OI, {4}, same)
    with pytest.raises(ConfigurationError, match=r"in the shape \(64, 64\), where the model has .* \(64, 32\)"):
        places_in_file(file, [NAME], random_matrix(64, 32), {4}, same=False)
    with pytest.raises(ConfigurationError, match="has no tensor blk"):
        places_in_file(file, ["blk.0.attn_k.weight"], w_OI, {4}, same=False)


def test_a_norm_may_be_stored_plus_one(tmp_path: Path) -> None:
    config, norm = LlamaConfig(num_hidden_layers=1), torch.linspace(-0.5, 0.5, 8)
    parameter, name = "model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"
    for shift in (0.0, 1.0):
        file = written(tmp_path / f"{shift}.gguf", {name: norm + shift})
        stored = other_in_file(file, config, parameter, norm)
        assert stored is not None and (stored.shift, stored.places) == (shift, (Place(name),))
        torch.testing.assert_close(stored.value(file), norm)


def test_names_of_fused_experts() -> None:
    names, fused = Names("qwen3moe", 1), "model.layers.0.mlp.experts.gate_up_proj"
    assert names.of(fused) == ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"]
    with pytest.raises(ConfigurationError, match=r"no name for the parameter model\.x"):
        names.of("model.x.weight")
    with pytest.raises(ConfigurationError, match="knows no architecture 'none'"):
        Names("none", 1)
