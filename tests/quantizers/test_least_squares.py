"""Coordinate descent on the outputs' error: for every layout of scales, from every start."""

import pytest
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import GPTQ, RTN, LeastSquares, Start
from lightning_gsq.quantizers.least_squares import descend
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.weights.scheme import QuantScheme

COLUMNS = 256
FLAT = ["w2g64", "w3g64", "q4_0", "q4_1", "mlx3g64", "iq4_nl"]
TWO_LEVEL = ["q2_k", "q3_k", "q4_k", "q6_k", "tq2_0", "iq4_xs"]


def _problem(columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs of different sizes."""
    mixing = torch.eye(columns) + 0.2 * torch.randn(columns, columns)
    x_NI = torch.randn(1000, columns) @ mixing * torch.logspace(0, -1, columns)
    return torch.randn(16, columns), x_NI.T @ x_NI / 500


def _error(start: Start, w: Tensor, hessian: Tensor, scheme: QuantScheme) -> Tensor:
    """The squared error of the outputs of each row, ``O``, for scales as they are stored."""
    dense = quantized(start, scheme, torch.float32).dequantize()
    return (((w - dense) @ hessian) * (w - dense)).sum(1)


@pytest.mark.parametrize("name", FLAT + TWO_LEVEL)
def test_no_sweep_makes_a_row_worse(name: str) -> None:
    scheme, (w, hessian) = scheme_of(name), _problem()
    start = RTN(weighted=True)(w, hessian, scheme)
    before = _error(start, w, hessian, scheme)
    for _ in range(3):
        start = descend(start, w, hessian, scheme, 1)
        after = _error(start, w, hessian, scheme)
        assert bool((after <= before * (1 + 1e-4)).all())
        before = after
    grid = scheme.grid
    assert torch.equal(grid.code_at(start.position_OI).to(start.codes_OI.dtype), start.codes_OI)


@pytest.mark.parametrize("name", FLAT + TWO_LEVEL)
def test_ends_below_gptq(name: str) -> None:
    scheme, (w, hessian) = scheme_of(name), _problem()
    error = _error(LeastSquares()(w, hessian, scheme), w, hessian, scheme).sum()
    assert error < 0.97 * _error(GPTQ()(w, hessian, scheme), w, hessian, scheme).sum()


@pytest.mark.parametrize("group_size", [-1, 5, 8])
def test_ragged_groups(group_size: int) -> None:
    scheme, (w, hessian) = QuantScheme(2, group_size), _problem(22)
    gptq, better = (start(w, hessian, scheme) for start in (GPTQ(), LeastSquares()))
    assert better.scales_OG.shape == gptq.scales_OG.shape
    assert _error(better, w, hessian, scheme).sum() < _error(gptq, w, hessian, scheme).sum()


@pytest.mark.parametrize("name", ["w2g64", "q4_1", "q2_k"])
def test_a_group_whose_codes_are_all_the_same_stays_finite(name: str) -> None:
    scheme, (w, hessian) = scheme_of(name), _problem()
    w[:4] = 0
    w[4:8] = 0.3
    start = LeastSquares()(w, hessian, scheme)
    assert all(bool(torch.isfinite(part).all()) for part in start.scale_parts.values())
    assert torch.equal(quantized(start, scheme, torch.float32).dequantize()[:4], w[:4])


def test_best_step_of_a_scale_is_that_of_least_squares() -> None:
    """One group, codes that stay: the scale is the regression of the weights on the codes."""
    scheme, (w, hessian) = QuantScheme(8, -1), _problem(12)
    start = RTN()(w, None, scheme)
    q = start.codes_OI.float()
    wanted = ((q @ hessian) * w).sum(1) / ((q @ hessian) * q).sum(1)
    once = descend(Start(start.codes_OI, 1.001 * start.scales_OG, start.position_OI), w, hessian, scheme, 1)
    torch.testing.assert_close(once.scales_OG[:, 0], wanted, rtol=1e-4, atol=0)


def test_without_tokens_it_rounds() -> None:
    scheme, (w, hessian) = QuantScheme(3, 8), _problem(24)
    start, plain = (kind(w, torch.zeros_like(hessian), scheme) for kind in (LeastSquares(), GPTQ()))
    assert torch.equal(start.codes_OI, plain.codes_OI) and torch.equal(start.scales_OG, plain.scales_OG)


def test_no_sweeps_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="sweeps must be positive, got 0"):
        LeastSquares(sweeps=0)
