"""From the tensors of a file back to the weight, whatever its layout."""

from __future__ import annotations

from torch import Tensor

from lightning_gsq.weights.element import ElementTensor
from lightning_gsq.weights.mixed import MixedTensor
from lightning_gsq.weights.packing import expect_parts
from lightning_gsq.weights.quantized import QuantizedTensor, QuantizedWeight
from lightning_gsq.weights.scheme import QuantScheme


def unpack_weight(tensors: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedWeight:
    """Inverse of ``pack`` for any settled scheme.

    Raises:
        ValueError: the tensors do not fit the scheme.
    """
    if scheme.salient is None:
        expect_parts(tensors, {*scheme.grid.fields(shape[1]), *scheme.parts(shape[1])})
        return QuantizedTensor.unpack(tensors, scheme, shape)
    if scheme.salient.layout == "element":
        return ElementTensor.unpack(tensors, scheme, shape)
    return MixedTensor.unpack(tensors, scheme, shape)
