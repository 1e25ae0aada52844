"""Coordinate descent on the outputs' error: for every layout of scales, from every start."""

import pytest
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import GPTQ, RTN, LeastSquares, LlamaCpp, Start
from lightning_gsq.quantizers.sweeps import descend
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.vector_grid import VectorGrid

COLUMNS = 256
FLAT = ["w2g64", "w3g64", "q4_0", "q4_1", "mlx3g64", "iq4_nl"]
TWO_LEVEL = ["q2_k", "q3_k", "q4_k", "q6_k", "tq2_0", "iq4_xs"]
VECTORS = ["iq1_s", "iq2_xxs", "iq3_s", pytest.param("iq2_s", marks=pytest.mark.slow)]


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
    error = _error(LeastSquares(damping=0.01)(w, hessian, scheme), w, hessian, scheme).sum()
    assert error < 0.97 * _error(GPTQ()(w, hessian, scheme), w, hessian, scheme).sum()


@pytest.mark.parametrize("name", VECTORS)
def test_code_vectors_end_below_llama_cpp(name: str) -> None:
    """And every sweep leaves vectors that the type has, and rows that are no worse."""
    scheme, (w, hessian) = scheme_of(name), _problem()
    start = LlamaCpp()(w, hessian, scheme)
    first = before = _error(start, w, hessian, scheme)
    for _ in range(2):
        start = descend(start, w, hessian, scheme, 1)
        after = _error(start, w, hessian, scheme)
        assert bool((after <= before * (1 + 1e-4)).all())
        before = after
    assert before.sum() < 0.85 * first.sum()
    assert isinstance(scheme.grid, VectorGrid)
    assert torch.equal(scheme.grid.join(*scheme.grid.split(start.codes_OI)), start.codes_OI)
    assert torch.equal(LeastSquares(sweeps=2, damping=1e-6)(w, hessian, scheme).codes_OI, start.codes_OI)


def test_code_vectors_of_inputs_without_tokens() -> None:
    scheme, (w, hessian) = scheme_of("iq2_xxs"), _problem()
    for none in (None, torch.zeros_like(hessian)):
        codes_OI = LlamaCpp()(w, none, scheme).codes_OI
        assert torch.equal(LeastSquares()(w, none, scheme).codes_OI, codes_OI)


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q6_k", "iq2_xxs"])
def test_floats_of_a_block_are_settled_again(name: str) -> None:
    """Twice the scale that the codes were found for: a sweep comes back to it, though integers alone could not."""
    scheme, (w, hessian) = scheme_of(name), _problem()
    start = LlamaCpp()(w, hessian, scheme)
    off = Start(start.codes_OI, 2 * start.scales_OG, start.position_OI, start.others)
    again = descend(off, w, hessian, scheme, 1)
    assert _error(again, w, hessian, scheme).sum() < _error(start, w, hessian, scheme).sum()


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
