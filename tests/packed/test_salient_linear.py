"""The runtime over packed weights gives what the dequantized weights give."""

import itertools

import pytest
import torch

from lightning_gsq.packed.salient_linear import SageLinear, sage_linear_reference
from lightning_gsq.quantizers.dual_mode import quantize_elements
from lightning_gsq.saliency.scores import magnitude_score, salient_mask
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.weights import mixed_case

CASES = list(itertools.product([1, "ternary", 2], [0, 9], [None, 6]))


@pytest.mark.parametrize(("bits", "count", "table"), CASES)
def test_structured(bits: object, count: int, table: int | None) -> None:
    tensor = mixed_case(bits, 3, 70, count, table)
    x, bias = torch.randn(2, 3, 70), torch.randn(5)
    layer = SageLinear.of(tensor, bias)
    expected = torch.nn.functional.linear(x, tensor.dequantize(), bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    reference = sage_linear_reference(x, tensor.pack(), tensor.scheme, tensor.shape, bias)
    torch.testing.assert_close(reference, expected)
    assert sum(part.nbytes for part in layer.parts.values()) == tensor.ledger().num_bytes


def test_element() -> None:
    w_OI = torch.randn(12, 45)
    mask_OI = salient_mask(magnitude_score(w_OI), 0.1)
    part = SalientPart("element", 4, int(mask_OI.sum()) / mask_OI.numel(), scale_groups=4)
    tensor = quantize_elements(w_OI, mask_OI, QuantScheme(1, 64, part), torch.float16)
    x = torch.randn(3, 45)
    torch.testing.assert_close(SageLinear.of(tensor)(x), x @ tensor.dequantize().T)


def test_state_dict_of_another_weight() -> None:
    """Loading replaces the salient columns and the scales' numbers too."""
    first, second = (mixed_case(1, 3, 70, 9, 6) for _ in range(2))
    layer = SageLinear.of(first)
    layer.load_state_dict(SageLinear.of(second).state_dict())
    x = torch.randn(4, 70)
    torch.testing.assert_close(layer(x), x @ second.dequantize().T, atol=1e-4, rtol=1e-4)
    assert set(layer.state_dict()) == set(second.pack())


def test_casting_keeps_the_scales() -> None:
    tensor = mixed_case(1, 3, 70, 9, None)
    layer = SageLinear.of(tensor).to(torch.bfloat16)
    assert layer.scales.dtype == torch.float16 and torch.equal(layer.scales, tensor.rest.scales_OG)
    assert layer(torch.randn(2, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
