"""The Gumbel quantizer: initial logits, hard codes, training towards an easy target."""

import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import RTN, GumbelOptions, GumbelQuantizer, Start
from lightning_gsq.quantizers.gumbel import NEVER
from lightning_gsq.weights.scheme import QuantScheme

ALL_BITS = [1, "ternary", 2, 3, 4, 8]


def _quantizer(bits: object, columns: int = 20, **options: object) -> GumbelQuantizer:
    scheme = QuantScheme(bits, 8)  # type: ignore[arg-type]
    start = RTN()(torch.randn(6, columns), None, scheme)
    settings = GumbelOptions(backend="eager", **options)  # type: ignore[arg-type]
    return GumbelQuantizer(start, scheme, settings, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_starts_at_the_warm_start(bits: object) -> None:
    """With confidence well above the noise, the first hard codes are the warm start's."""
    quantizer = _quantizer(bits, alpha=100.0)
    assert torch.equal(quantizer.codes_OI(), quantizer.start_codes)
    assert torch.equal(quantizer.harden().dequantize(), quantizer.start_tensor().dequantize())


def test_golden_initial_logits() -> None:
    """2 bits, code 0: c = -(v - 0)^2 / 2 = (-2, -1/2, 0, -1/2), centred: (-1.25, 0.25, 0.75, 0.25), times 0.06."""
    start = Start(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1, 1), torch.zeros(1, 1))
    quantizer = GumbelQuantizer(start, QuantScheme(2, 1), GumbelOptions(), torch.Generator().manual_seed(0))
    noise = torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(0))
    expected = 0.01 * (noise.flatten() + 6 * torch.tensor([-1.25, 0.25, 0.75, 0.25]))
    torch.testing.assert_close(quantizer.logits.detach().flatten(), expected)


def test_ternary_uses_half_the_confidence() -> None:
    start = Start(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1, 1), torch.zeros(1, 1))
    by_default = GumbelQuantizer(start, QuantScheme("ternary", 1), GumbelOptions(), torch.Generator().manual_seed(0))
    explicit = GumbelQuantizer(
        start, QuantScheme("ternary", 1), GumbelOptions(alpha=3.0), torch.Generator().manual_seed(0)
    )
    assert torch.equal(by_default.logits, explicit.logits)


@pytest.mark.parametrize("shifts", [1, 2, 3])
def test_local_shifts_never_leave_the_grid(shifts: int) -> None:
    scheme = QuantScheme(3, 8)
    codes = torch.tensor([[-4, -3, 0, 2, 3]], dtype=torch.int8)
    start = Start(codes, torch.ones(1, 1), codes.float())
    options = GumbelOptions(shifts=shifts, backend="eager")
    quantizer = GumbelQuantizer(start, scheme, options, torch.Generator().manual_seed(0))
    assert quantizer.logits.shape[0] == 2 * shifts + 1
    with torch.no_grad():
        quantizer.logits.copy_(
            torch.where(quantizer.logits == NEVER, quantizer.logits, torch.rand(quantizer.logits.shape))
        )
    for seed in range(20):
        levels = quantizer(seed).detach().round()
        assert float(levels.min()) >= -4 and float(levels.max()) <= 3
    assert scheme.low <= int(quantizer.codes_OI().min()) and int(quantizer.codes_OI().max()) <= scheme.high


def test_position_lets_boundary_weights_change_sides_easily() -> None:
    start = Start(torch.zeros(1, 2, dtype=torch.int8), torch.ones(1, 1), torch.tensor([[0.0, 0.45]]))
    quantizer = GumbelQuantizer(
        start, QuantScheme(2, 2), GumbelOptions(center="position", sigma=1e-9, alpha=6e9), torch.Generator()
    )
    gap = quantizer.logits[2] - quantizer.logits[3]  # level 0 over level 1
    assert float(gap[0, 1]) < 0.15 * float(gap[0, 0])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_training_finds_a_weight_on_the_grid(bits: object) -> None:
    """Started from a perturbed code, the quantizer returns to the weight that its samples are compared with."""
    torch.manual_seed(1)
    scheme = QuantScheme(bits, 8)  # type: ignore[arg-type]
    target = torch.tensor(scheme.grid.levels, dtype=torch.int8)[torch.randint(len(scheme.grid.levels), (8, 16))]
    wrong = torch.where(torch.rand(8, 16) < 0.3, -target if bits == 1 else target.sub(1).clamp(scheme.low), target)
    start = Start(wrong.to(torch.int8), torch.full((8, 2), 1.0 if bits == 8 else 0.9), wrong.float())
    quantizer = GumbelQuantizer(start, scheme, GumbelOptions(backend="eager"), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=3e-3)
    for step in range(150):
        quantizer.temperature, quantizer.logit_scale = 2 - 1.95 * step / 150, 100 + 400 * step / 150
        loss = (quantizer(step) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (quantizer.codes_OI() == target).float().mean() > 0.95
    torch.testing.assert_close(quantizer.scales_OG.detach(), torch.ones(8, 2), atol=0.1, rtol=0)


def test_hard_returns_the_rounded_weight() -> None:
    quantizer = _quantizer(2)
    quantizer.hard = True
    assert torch.equal(quantizer(0), quantizer.harden().dequantize())


def test_trainable_parameters_are_logits_and_scales() -> None:
    assert {name for name, _ in _quantizer(2).named_parameters()} == {"logits", "log_scale"}


def test_entropy_is_between_zero_and_the_number_of_bits() -> None:
    for bits, most in ((1, 1.0), (2, 2.0), (3, torch.log2(torch.tensor(5.0)))):
        quantizer = _quantizer(bits, shifts=2)
        quantizer.logit_scale = 1e-9
        entropy = quantizer.entropy_OI()
        assert float(entropy.min()) >= 0 and float(entropy.max()) <= float(most) + 1e-5
        quantizer.logit_scale = 1e6
        assert float(quantizer.entropy_OI().max()) < 1e-3 or bits != 2


@pytest.mark.parametrize(("name", "value"), [("sigma", 0.0), ("shifts", 0), ("noise", -1.0)])
def test_bad_options(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=name):
        GumbelOptions(**{name: value})  # type: ignore[arg-type]


def test_low_precision_logits() -> None:
    start = RTN()(torch.randn(4, 8), None, QuantScheme(3, 4))
    options = {"backend": "eager"}
    made = [
        GumbelQuantizer(start, QuantScheme(3, 4), GumbelOptions(**options, logits_dtype=name), torch.Generator())  # type: ignore[arg-type]
        for name in ("float32", "bfloat16")
    ]
    assert made[1].logits.dtype == torch.bfloat16
    assert torch.equal(made[1].codes_OI(), made[0].codes_OI())
    assert made[1](3).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert made[1](3).dtype == torch.bfloat16
    torch.testing.assert_close(made[1].entropy_OI(), made[0].entropy_OI(), rtol=1e-2, atol=1e-2)
    with pytest.raises(ConfigurationError, match="logits_dtype"):
        GumbelOptions(logits_dtype="float16")  # type: ignore[arg-type]


def test_decay_in_the_gradient_leaves_candidates_outside_of_the_grid_out() -> None:
    scheme = QuantScheme(3, 8)
    start = RTN()(torch.randn(8, 16), None, scheme)
    options = GumbelOptions(backend="eager")
    quantizer = GumbelQuantizer(start, scheme, options, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([quantizer.logits], lr=1e-2, weight_decay=0.1)
    for step in range(20):
        optimizer.zero_grad()
        quantizer(step).square().mean().backward()
        optimizer.step()
    codes_OI = quantizer.codes_OI()
    assert bool(torch.isfinite(quantizer.logits).all())
    assert scheme.low <= int(codes_OI.min()) and int(codes_OI.max()) <= scheme.high
