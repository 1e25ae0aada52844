"""Every preset through the warm starts and the Gumbel quantizer: what is computed is what is stored."""

from __future__ import annotations

import pytest
import torch

from lightning_gsq.ops.gumbel_softmax import gumbel_softmax_values, gumbel_softmax_weight
from lightning_gsq.quantizers import GPTQ, RTN, DualMode, GumbelOptions, GumbelQuantizer, WarmStart
from lightning_gsq.quantizers.trained_scales import SCALE_PARAMETERS
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.training.student_weights import trainable_weight
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.weights.presets import LEVEL_TYPES

NAMES = [*LEVEL_TYPES, "mlx1g32", "mlx3g64", "mlx8g128"]


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = 0.05 * torch.randn(6, 256, generator=generator)
    x = torch.randn(300, 256, generator=generator) @ (0.1 * torch.randn(256, 256, generator=generator))
    return w, 2 * x.T @ x / len(x)


def relative_error(start: WarmStart, name: str) -> float:
    w, hessian = problem()
    scheme = scheme_of(name)
    error = quantized(start(w, hessian, scheme), scheme, torch.float16).dequantize() - w
    return float(((error @ hessian) * error).sum() / ((w @ hessian) * w).sum())


@pytest.mark.parametrize("name", NAMES)
def test_feedback_beats_rounding_in_every_layout(name: str) -> None:
    assert relative_error(GPTQ(), name) < 0.75 * relative_error(RTN(weighted=True), name)


@pytest.mark.parametrize("name", ["iq4_nl", "q4_k", "q3_k"])
def test_dual_mode_in_a_layout(name: str) -> None:
    assert relative_error(DualMode(), name) < 0.75 * relative_error(RTN(weighted=True), name)


def test_what_a_layout_adds_pays() -> None:
    error = {name: relative_error(RTN(), name) for name in ("w4g32", "q4_1", "iq4_nl", "q4_k", "q2_k", "q3_k", "q6_k")}
    assert error["q4_1"] < error["w4g32"] and error["iq4_nl"] < error["w4g32"] and error["q4_k"] < error["w4g32"]
    assert error["q2_k"] > 2 * error["q3_k"] > 8 * error["q4_k"] > 32 * error["q6_k"]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_zeros_and_one_of_equal_weights(name: str) -> None:
    scheme, w = scheme_of(name), torch.zeros(3, 256)
    w[1], w[2] = 0.3, -0.3
    dense = quantized(RTN()(w, None, scheme), scheme, torch.float16).dequantize()
    assert bool(torch.isfinite(dense).all())
    torch.testing.assert_close(dense[1:], w[1:], rtol=0.01, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_trains_is_what_is_stored(name: str) -> None:
    """The last forward pass with rounded codes, the hardened weight, and the weight read back are bit-identical."""
    w, _ = problem()
    scheme, generator = scheme_of(name), torch.Generator().manual_seed(0)
    options = GumbelOptions(backend="eager")  # the compiled op is tested where it is made
    quantizer = GumbelQuantizer(RTN()(w, None, scheme), scheme, options, generator)
    assert {key for key, _ in quantizer.named_parameters()} <= {"logits", *SCALE_PARAMETERS}
    quantizer.logit_scale, quantizer.temperature = 100.0, 0.5
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for step in range(3):
        optimizer.zero_grad()
        (quantizer(step) - 1.1 * w).square().sum().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in quantizer.parameters())
        optimizer.step()
    hard = quantizer.harden()
    stored = quantizer.harden(torch.float16)
    assert torch.equal(hard.dequantize(), stored.dequantize())
    quantizer.hard = True
    assert torch.equal(quantizer(0), stored.dequantize())
    assert type(stored).unpack(stored.pack(), scheme, stored.shape).dequantize().equal(stored.dequantize())


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "mlx3g64"])
def test_every_stored_number_trains(name: str) -> None:
    w, _ = problem()
    scheme = scheme_of(name)
    tensor = quantized(RTN()(w, None, scheme), scheme, torch.float16)
    weight = trainable_weight(tensor, None)
    assert torch.equal(weight(torch.float32), tensor.dequantize())
    optimizer = torch.optim.Adam([p for p in weight.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        (weight(torch.float32) - 1.2 * w).square().sum().backward()
        optimizer.step()
    trained = weight.tensor()  # type: ignore[operator]
    assert all(not torch.equal(trained.scale_parts[part], value) for part, value in tensor.scale_parts.items())
    assert torch.equal(weight.eval()(torch.float32), trained.dequantize())
    error = float((trained.dequantize() - 1.2 * w).square().sum())
    assert error < 0.9 * float((tensor.dequantize() - 1.2 * w).square().sum())


@pytest.mark.parametrize("name", ["w1g64", "wtg64", "w2g64", "w3g64", "q4_k", "iq4_nl", "mlx2g32", "tq2_0"])
def test_codes_that_train_end_to_end_start_as_they_are_and_move(name: str) -> None:
    w, _ = problem()
    scheme = scheme_of(name)
    tensor = quantized(RTN(weighted=False)(w, None, scheme), scheme, torch.float16)
    weight = trainable_weight(tensor, w)
    assert torch.equal(weight.tensor().codes_OI, tensor.codes_OI)  # type: ignore[operator]
    assert torch.equal(weight.eval()(torch.float32), tensor.dequantize())
    weight.train()
    for parameter in weight.parameters():
        parameter.requires_grad_(parameter is weight.positions)
    target = w.roll(1, 0)
    optimizer = torch.optim.Adam([weight.positions], lr=0.2)
    for _ in range(20):
        optimizer.zero_grad()
        (weight(torch.float32) - target).square().sum().backward()
        optimizer.step()
    moved = weight.tensor()  # type: ignore[operator]
    assert scheme.grid.low <= int(moved.codes_OI.min()) and int(moved.codes_OI.max()) <= scheme.grid.high
    assert torch.equal(weight.eval()(torch.float32), moved.dequantize())
    best = quantized(RTN(weighted=False)(target, None, scheme), scheme, torch.float16).dequantize()
    reached, start = (float((part.dequantize() - target).square().sum()) for part in (moved, tensor))
    assert reached - float((best - target).square().sum()) < 0.5 * start


def test_values_of_candidates_are_levels_where_they_are_evenly_spaced() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 8, requires_grad=True)
    scales = torch.rand(4, 2, requires_grad=True)
    codes = torch.randint(-3, 3, (4, 8), dtype=torch.int8)
    common = {"kappa": 3.0, "tau": 0.7, "seed": 5, "group_length": 4, "backend": "eager"}
    plain = gumbel_softmax_weight(logits, scales, (-1.0, 0.0, 1.0), codes, **common)  # type: ignore[arg-type]
    values = [codes.float() + shift for shift in (-1, 0, 1)]
    tabled = gumbel_softmax_values(logits, scales, values, **common)
    torch.testing.assert_close(tabled, plain)
    r = torch.randn(4, 8)
    for ours, theirs in zip(
        torch.autograd.grad(tabled, (logits, scales), r, retain_graph=True),
        torch.autograd.grad(plain, (logits, scales), r, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
