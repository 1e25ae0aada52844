"""Scale search, RTN and GPTQ on small matrices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import GPTQ, RTN, DualMode, LeastSquares, Matrix, WarmStart
from lightning_gsq.quantizers.gptq import damped, inverse_cholesky
from lightning_gsq.quantizers.scale_search import search_scale
from lightning_gsq.quantizers.warm_start import Start, quantized, start_of
from lightning_gsq.weights.scheme import QuantScheme

SCHEMES = [QuantScheme(bits, 8) for bits in (1, "ternary", 2, 3, 4, 8)]  # type: ignore[arg-type]


def _problem(columns: int = 24, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, correlated inputs, and their Hessian."""
    x_NI = torch.randn(tokens, columns) @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns))
    return torch.randn(16, columns), x_NI, 2 / tokens * x_NI.T @ x_NI


@pytest.mark.parametrize(
    "start", [RTN(weighted=False), RTN(), GPTQ(), GPTQ(weighted=False), GPTQ(activation_order=False)]
)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_levels(scheme: QuantScheme, start: WarmStart) -> None:
    w, _, hessian = _problem(columns=20)  # ragged: 8, 8, 4
    result = start(w, hessian, scheme)
    assert result.codes_OI.dtype == torch.int8
    assert set(result.codes_OI.unique().tolist()) <= set(scheme.grid.levels)
    assert result.scales_OG.shape == (16, 3)
    assert torch.equal(scheme.grid.nearest(result.position_OI).to(torch.int8), result.codes_OI)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rtn_on_the_outputs(bits: int) -> None:
    scheme = QuantScheme(bits, 8)
    w, x, hessian = _problem()

    def error(start: WarmStart) -> float:
        s = start(w, hessian, scheme)
        dense = s.codes_OI * s.scales_OG.repeat_interleave(8, 1)
        return float((x @ (w - dense).T).square().sum())

    assert error(GPTQ(activation_order=False)) < 0.8 * error(RTN(weighted=False))
    assert error(GPTQ()) < 0.9 * error(RTN(weighted=False))


def test_gptq_does_not_depend_on_the_block_size() -> None:
    """Blocking is a matter of speed, also where a group reaches over the end of a block."""
    w, _, hessian = _problem(columns=22)
    for scheme in (QuantScheme(3, 8), QuantScheme(3, -1), QuantScheme(3, 5)):
        results = [GPTQ(block_columns=size)(w.double(), hessian, scheme) for size in (1, 6, 8, 22)]
        for other in results[1:]:
            assert (other.codes_OI != results[0].codes_OI).float().mean() < 0.01
            torch.testing.assert_close(other.scales_OG, results[0].scales_OG, rtol=0.05, atol=1e-3)


def test_activation_order_rounds_what_matters_first() -> None:
    """With inputs of very different sizes the outputs are nearer; what is stored lies in the order of the columns."""
    w, x, _ = _problem(columns=32)
    x = x * torch.logspace(-1.5, 0, 32)  # the largest come last
    hessian, scheme = x.T @ x, QuantScheme(2, 8)

    def error(start: WarmStart) -> float:
        dense = quantized(start(w, hessian, scheme), scheme, torch.float32).dequantize()
        return float((x @ (w - dense).T).square().sum())

    assert error(GPTQ()) < 0.8 * error(GPTQ(activation_order=False))


@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_with_identity_hessian_is_rounding(activation_order: bool) -> None:
    w = torch.randn(4, 16)
    for scheme, hessian in ((QuantScheme(3, 8), torch.eye(16)), (QuantScheme(3, 5), torch.diag(torch.rand(16)))):
        start = GPTQ(weighted=False, activation_order=activation_order)(w, hessian, scheme)
        plain = RTN()(w, None, scheme)
        assert torch.equal(start.codes_OI, plain.codes_OI) and torch.equal(start.scales_OG, plain.scales_OG)


def test_gptq_survives_dead_and_degenerate_inputs() -> None:
    w = torch.randn(4, 16)
    hessian = torch.zeros(16, 16)
    hessian[:8, :8] = 1.0  # rank one, and eight inputs that are always zero
    result = GPTQ()(w, hessian, QuantScheme(2, 8))
    assert bool(torch.isfinite(result.scales_OG).all())


def test_gptq_keeps_the_weights_of_dead_inputs() -> None:
    """An input that this text never used may matter on another: its weights are rounded, not lost."""
    w = torch.randn(4, 16)
    x = torch.randn(64, 16)
    x[:, 5:9] = 0
    scheme = QuantScheme(8, 16)
    start = GPTQ()(w, 2 * x.T @ x / 64, scheme)
    dense = quantized(start, scheme, torch.float32).dequantize()
    assert float((dense - w)[:, 5:9].abs().max()) < 0.6 * float(start.scales_OG.abs().max())


@pytest.mark.parametrize("warm_start", [GPTQ(weighted=False), GPTQ(), RTN(weighted=True)], ids=["gptq", "both", "rtn"])
def test_without_tokens_weights_are_rounded_unweighted(warm_start: WarmStart) -> None:
    w, scheme = torch.randn(4, 16), QuantScheme(3, 8)
    start, plain = warm_start(w, torch.zeros(16, 16), scheme), RTN()(w, None, scheme)
    assert torch.equal(start.codes_OI, plain.codes_OI) and torch.equal(start.scales_OG, plain.scales_OG)


def test_dual_mode_without_tokens_is_least_squares_rounding() -> None:
    w, scheme = torch.randn(4, 16), QuantScheme(3, 8)
    start, plain = DualMode()(w, torch.zeros(16, 16), scheme), DualMode(False, False)(w, None, scheme)
    assert torch.equal(start.codes_OI, plain.codes_OI) and torch.equal(start.scales_OG, plain.scales_OG)


def test_a_weight_that_is_not_finite_is_named() -> None:
    w = torch.randn(4, 16)
    w[1, 2], w[3, 4] = torch.nan, torch.inf
    with pytest.raises(ConfigurationError, match=r"2 of the 64 values of model\.layers\.0\.up\.weight are not finite"):
        Matrix(w, None, QuantScheme(2), "model.layers.0.up.weight")


def test_inputs_that_are_not_finite_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"inputs of up\.weight are not finite"):
        Matrix(torch.randn(4, 2), [torch.full((2, 2), torch.inf)], QuantScheme(2), "up.weight")


@pytest.mark.parametrize(
    ("w_OI", "hessians", "message"),
    [
        (torch.zeros(4), None, r"up.weight: expected a matrix \(O, I\), got shape \(4,\)"),
        (torch.zeros(4, 2), [torch.zeros(3, 3)], r"expected Hessians of shape \(2, 2\), got \(3, 3\)"),
        (torch.zeros(4, 2), [torch.zeros(2, 2)] * 3, "4 rows are not 3 matrices of one size"),
        (torch.zeros(4, 2), [], "4 rows are not 0 matrices of one size"),
    ],
)
def test_shapes_that_do_not_go_together(w_OI: torch.Tensor, hessians: list[torch.Tensor] | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Matrix(w_OI, hessians, QuantScheme(2), "up.weight")


@pytest.mark.parametrize(("options", "said"), [({"damping": 1.5}, "damping"), ({"block_columns": 0}, "block_columns")])
def test_options_out_of_range_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"warm_start\.{said} must"):
        GPTQ(**options)


def test_gptq_without_hessian() -> None:
    with pytest.raises(ValueError, match="needs the Hessian"):
        GPTQ()(torch.randn(2, 4), None, QuantScheme(2))


def test_hessian_with_nan() -> None:
    with pytest.raises(ValueError, match="not finite"):
        inverse_cholesky(torch.full((2, 2), torch.nan), 0.01)


def test_inverse_cholesky_is_the_factor_of_the_inverse() -> None:
    _, _, hessian = _problem()
    hessian = (hessian + hessian.T).double()
    upper = inverse_cholesky(hessian, 1e-13)
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(hessian), rtol=1e-6, atol=1e-6)


def test_damping_is_a_share_of_the_mean_diagonal_also_of_dead_inputs() -> None:
    x_TI = torch.randn(64, 8)
    x_TI[:, 3] = 0  # an input that was always zero
    hessian = (x_TI.T @ x_TI).double()
    more = damped(hessian, 0.01) - hessian
    torch.testing.assert_close(more, 0.01 * hessian.diagonal().mean() * torch.eye(8, dtype=torch.float64))
    upper = inverse_cholesky(hessian, 0.01)
    alive = hessian.clone()
    alive[3, 3] = 1
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped(alive, 0.01)))


def test_scale_search_finds_an_exact_grid_with_either_sign() -> None:
    scheme = QuantScheme(2, 4)
    for sign in (0.3, -0.3):
        w = sign * torch.tensor([[-2.0, -1.0, 0.0, 1.0]])
        assert search_scale(w, scheme).tolist() == pytest.approx([sign])


def test_scale_of_a_zero_group_is_finite_and_not_zero() -> None:
    scale = search_scale(torch.zeros(1, 4), QuantScheme(2, 4))
    assert float(scale.abs()) > 0
    assert bool(torch.isfinite(torch.zeros(1, 4) / scale).all())


def test_weighted_search_serves_the_inputs_that_matter() -> None:
    w = torch.tensor([[6.0, 1.1, 0.9, -1.05]])
    importance = torch.tensor([0.0, 1.0, 1.0, 1.0])
    scheme = QuantScheme(3, 4)
    plain, weighted = search_scale(w, scheme), search_scale(w, scheme, importance)
    assert float(weighted.abs()) < float(plain.abs())


W_OI = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("warm_start", [GPTQ(), RTN(weighted=True)])
@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        (W_OI, torch.eye(4), r"hessian_II: expected fp32 of shape \(8, 8\), got torch.float32 \(4, 4\)"),
        (W_OI, torch.ones(8), "hessian_II: expected fp32 of shape"),
        (W_OI, torch.eye(8).half(), r"hessian_II: .* got torch.float16 \(8, 8\)"),
        (W_OI, [1.0], "hessian_II: expected fp32 of shape .* got list"),
        (W_OI[0], torch.eye(8), r"w_OI: expected an fp32 matrix \(O, I\), got torch.float32 \(8,\)"),
        (W_OI.numpy(), torch.eye(8), "w_OI: expected an fp32 matrix .* got ndarray"),
    ],
)
def test_called_with_something_else(warm_start: WarmStart, weight: Any, hessian: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{type(warm_start).__name__}: {message}"):
        warm_start(weight, hessian, QuantScheme(2, 4))


class Wrong(RTN):
    """A warm start of somebody's own with a mistake."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes = changes

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        start = super().__call__(w_OI, hessian_II, scheme)
        return dataclasses.replace(start, **self.changes) if self.changes else (start.codes_OI, start.scales_OG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "expected a Start, got tuple"),
        ({"codes_OI": torch.zeros(8, 4)}, r"codes_OI: expected shape \(4, 8\), got torch.float32 \(8, 4\)"),
        ({"codes_OI": torch.zeros(4, 8)}, "codes_OI: expected int8, got torch.float32"),
        ({"position_OI": None}, r"position_OI: expected shape \(4, 8\), got NoneType"),
        ({"scales_OG": torch.ones(4)}, r"scales_OG: expected a row for each of the 4 rows, got torch.float32 \(4,\)"),
    ],
)
def test_what_a_warm_start_of_ones_own_gives_is_checked(changes: dict[str, Any], message: str) -> None:
    matrix = Matrix(W_OI, None, QuantScheme(2, 4))
    with pytest.raises(ConfigurationError, match=f"model.warm_start: Wrong: {message}"):
        start_of(matrix, Wrong(**changes))


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPTQ(damping=0),
        lambda: GPTQ(damping=1),
        lambda: GPTQ(block_columns=0),
        lambda: GPTQ(follow_damping=0),
        lambda: LeastSquares(follow_damping=float("nan")),
        lambda: DualMode(follow_damping=float("inf")),
        lambda: LeastSquares(sweeps=0),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], WarmStart]) -> None:
    with pytest.raises(ConfigurationError, match=r"warm_start\.\w+ must .*, got (0|1|nan|inf)"):
        make()


def test_a_start_that_follows_needs_whole_hessians() -> None:
    assert (GPTQ().following, LeastSquares(follow=False).following) == (None, None)
    assert (GPTQ(follow=True).following, LeastSquares(follow_damping=0.3).following) == (0.1, 0.3)
    rounding = DualMode(feedback=False, weighted=False)
    following = DualMode(feedback=False, weighted=False, follow=True)
    assert (rounding.needs_hessian, rounding.diagonal_only) == (False, True)
    assert (following.needs_hessian, following.diagonal_only) == (True, False)
