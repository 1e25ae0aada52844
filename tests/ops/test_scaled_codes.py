"""``codes * scales`` and its gradient against autograd."""

import pytest
import torch

from lightning_gsq.ops.scaled_codes import scaled_codes
from lightning_gsq.weights.quantized import expand_groups


@pytest.mark.parametrize("columns", [24, 21, 5])
def test_weight_and_gradient(columns: int) -> None:
    length = min(8, columns)
    codes = torch.randint(-4, 4, (6, columns), dtype=torch.int8)
    scales = torch.randn(6, -(-columns // length), dtype=torch.float64, requires_grad=True)
    expected = codes * expand_groups(scales, columns, length)
    found = scaled_codes(codes, scales, length, torch.float64)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, scales, upstream), torch.autograd.grad(expected, scales, upstream)
    )


def test_rounded_once() -> None:
    codes = torch.randint(-4, 4, (64, 64), dtype=torch.int8)
    scales = torch.randn(64, 4)
    expected = (codes * expand_groups(scales, 64, 16)).bfloat16()
    assert torch.equal(scaled_codes(codes, scales, 16, torch.bfloat16), expected)
