"""What packed weights with salient columns look like, before there are any."""

from __future__ import annotations

import pytest
import torch

from lightning_gsq.quantizers import RTN, Matrix
from lightning_gsq.saliency import SettleOptions, settle
from lightning_gsq.saliency.choose import settled_tensor
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.weights.mixed import mixed_like


@pytest.mark.parametrize("name", ["w1g64s10", "w1g32s1", "w1g64s25b3", "wtg64s5", "w2g32s30b8"])
@pytest.mark.parametrize(("rows", "columns"), [(24, 576), (48, 64), (8, 300)])
def test_shapes_are_those_of_the_packed_tensors(name: str, rows: int, columns: int) -> None:
    scheme = scheme_of(name)
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    matrix = Matrix(w_OI, None, scheme, "x")
    tensor = settled_tensor(matrix, settle({"x": matrix}, SettleOptions())["x"], RTN(), torch.float16)
    packed, like = tensor.pack(), mixed_like(scheme, rows, columns, torch.float16)
    shapes = [{part: (value.shape, value.dtype) for part, value in parts.items()} for parts in (packed, like)]
    assert shapes[0] == shapes[1]
