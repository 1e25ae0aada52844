"""Packed layers against the dense layers that they stand for."""

import copy

import pytest
import torch
from torch import nn

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.packed.layers import PackedExperts, QuantLinear
from lightning_gsq.weights.grid import Bits
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme


def _tensor(scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    levels = torch.tensor(scheme.grid.levels, dtype=torch.int8)
    codes = levels[torch.randint(len(levels), (rows, columns))]
    return QuantizedTensor(codes, torch.randn(rows, scheme.num_groups(columns)).to(dtype), scheme)


def _layer(scheme: QuantScheme, rows: int = 24, columns: int = 40, bias: bool = True) -> tuple[QuantLinear, nn.Linear]:
    tensor = _tensor(scheme, rows, columns)
    layer = QuantLinear(scheme, LinearSite("weight", 0, rows, columns, False), bias).fill(tensor)
    dense = nn.Linear(columns, rows, bias)
    dense.weight.data = tensor.dequantize()
    if bias:
        assert layer.bias is not None
        layer.bias.data = dense.bias.data
    return layer, dense


@pytest.mark.parametrize("group_size", [-1, 7, 16, 64])
@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4, 5, 8])
def test_a_packed_layer_is_its_dense_layer(bits: Bits, group_size: int) -> None:
    layer, dense = _layer(QuantScheme(bits, group_size))
    assert torch.equal(layer.dequantize(), dense.weight)
    x = torch.randn(2, 3, 40)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)  # kernels sum in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_leaves_the_scales_alone(dtype: torch.dtype) -> None:
    layer, _ = _layer(QuantScheme(3, 16))
    before = layer.dequantize()
    layer.to(dtype)
    assert layer.scales.dtype == torch.float16 and layer.codes.dtype == torch.int32
    assert layer.bias is not None and layer.bias.dtype == dtype
    assert torch.equal(layer.dequantize(), before)
    assert layer(torch.randn(5, 40, dtype=dtype)).dtype == dtype
    layer.float()
    assert torch.equal(layer.dequantize(), before)


def test_autocast_computes_in_its_dtype() -> None:
    layer, dense = _layer(QuantScheme(4, 16))
    x = torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        packed, usual = layer(x), dense(x)
    assert packed.dtype == usual.dtype == torch.bfloat16
    torch.testing.assert_close(packed, usual, rtol=2e-2, atol=2e-2)


def test_state_dict_and_copy() -> None:
    layer, _ = _layer(QuantScheme(2, 16))
    other = QuantLinear(QuantScheme(2, 16), layer.site, bias=True)
    other.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"codes", "scales", "bias"}
    x = torch.randn(3, 40)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "in_features=40, out_features=24, scheme=2 bit, groups of 16" in repr(layer)


def test_compiles_as_one_graph() -> None:
    layer, dense = _layer(QuantScheme(3, 16))
    x = torch.randn(3, 40)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), dense(x))


def test_gradients_reach_the_input() -> None:
    layer, dense = _layer(QuantScheme(3, 16), bias=False)
    x = torch.randn(3, 40, requires_grad=True)
    (own,) = torch.autograd.grad(layer(x).square().sum(), x)
    (usual,) = torch.autograd.grad(dense(x).square().sum(), x)
    torch.testing.assert_close(own, usual)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_come_one_by_one(transposed: bool) -> None:
    scheme, site = QuantScheme(3, 16), LinearSite("experts", 4, 6, 20, transposed)
    tensor = _tensor(scheme, site.rows, 20)
    experts = PackedExperts(scheme, site, dtype=torch.float32).fill(tensor)
    dense = site.from_matrix(tensor.dequantize())
    assert torch.equal(experts.dequantize(), dense)
    for index in range(4):
        assert torch.equal(experts[index], dense[index])
        assert torch.equal(experts[torch.tensor(index)], dense[index])
    assert experts.to(torch.bfloat16)[2].dtype == torch.bfloat16
    assert experts.scales.dtype == torch.float16
    with pytest.raises(IndexError):
        experts[4]
    assert set(experts.state_dict()) == {"codes", "scales"}
