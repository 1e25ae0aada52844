"""The dual-mode quantizer: optimal groups, scales that minimise the error, the published layout."""

import itertools

import pytest
import torch

from lightning_gsq.quantizers import RTN, Start
from lightning_gsq.quantizers.dual_mode import DualMode, fit_scale, group_scalars, quantize_elements
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.saliency.scores import magnitude_score, salient_mask
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme


def test_groups_of_clusters() -> None:
    values = torch.tensor([[1.0, 5.0, 1.2], [5.2, 9.0, 0.8]])
    groups = group_scalars(values, 3)
    torch.testing.assert_close(groups.scalars_n, torch.tensor([1.0, 5.1, 9.0]))
    assert groups.members.tolist() == [[0, 1, 0], [1, 2, 0]]
    assert groups.error == pytest.approx(0.04 + 0.04 + 0.01 + 0.01)


def test_groups_are_a_fixed_point_of_the_alternation() -> None:
    values, weights = torch.rand(500), torch.rand(500)
    groups = group_scalars(values, 6, weights)
    nearest = (values[:, None] - groups.scalars_n).abs().argmin(1)
    assert (nearest == groups.members).float().mean() > 0.99
    for g in range(6):
        own = groups.members == g
        mean = (values[own] * weights[own]).sum() / weights[own].sum()
        torch.testing.assert_close(groups.scalars_n[g], mean, atol=1e-2, rtol=0)


def test_fewer_values_than_groups() -> None:
    groups = group_scalars(torch.tensor([2.0, 2.0, 3.0]), 8)
    assert groups.scalars_n.tolist() == [2.0, 3.0] and groups.error == 0


def test_binary_scale_is_the_mean_magnitude() -> None:
    w_OC, moment_C = torch.randn(4, 30), torch.rand(30)
    expected = (w_OC.abs() * moment_C).sum(1) / moment_C.sum()
    torch.testing.assert_close(fit_scale(w_OC, QuantScheme(1, -1), moment_C), expected)


@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4])
def test_no_scale_close_by_is_better(bits: object) -> None:
    scheme = QuantScheme(bits, 16)  # type: ignore[arg-type]
    w_OI = torch.randn(8, 64)
    start = DualMode(feedback=False, weighted=False)(w_OI, None, scheme)

    def error(scales_OG: torch.Tensor) -> torch.Tensor:
        tensor = quantized(Start(start.codes_OI, scales_OG, start.position_OI), scheme, torch.float32)
        return (tensor.dequantize() - w_OI).square().sum()

    for factor in (0.97, 1.03):
        assert float(error(start.scales_OG)) < float(error(start.scales_OG * factor))
    plain = quantized(RTN()(w_OI, None, scheme), scheme, torch.float32).dequantize()
    assert float(error(start.scales_OG)) <= float((plain - w_OI).square().sum())


def test_feedback_lowers_the_output_error() -> None:
    mixing = torch.randn(40, 40)
    x_NI = torch.randn(500, 40) @ mixing
    w_OI, hessian_II = torch.randn(16, 40), 2 * x_NI.T @ x_NI / 500
    errors = []
    for feedback in (False, True):
        start = DualMode(feedback)(w_OI, hessian_II, QuantScheme(1, 20))
        tensor = quantized(start, QuantScheme(1, 20), torch.float32)
        errors.append(float((x_NI @ (tensor.dequantize() - w_OI).T).square().mean()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(("bits", "groups"), itertools.product([2, 4], [1, 4]))
def test_published_quantizer(bits: int, groups: int) -> None:
    w_OI = torch.randn(20, 60)
    mask_OI = salient_mask(magnitude_score(w_OI), 0.05)
    scheme = QuantScheme(1, 64, SalientPart("element", bits, int(mask_OI.sum()) / 1200, scale_groups=groups))
    tensor = quantize_elements(w_OI, mask_OI, scheme, torch.float32)
    dense_OI = tensor.dequantize()
    assert torch.equal(dense_OI[~mask_OI].sign(), w_OI[~mask_OI].sign())
    assert len(dense_OI[~mask_OI].abs().unique()) == groups
    for o in range(20):
        assert len(dense_OI[o][mask_OI[o]].unique()) <= 2**bits
    assert tensor.nominal_bits() == pytest.approx(1 + (bits - 1) * 0.05)
