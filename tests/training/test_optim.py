"""The fused optimizers against PyTorch's Adam and lion-pytorch, and their stochastic rounding."""

import pytest
import torch
from lion_pytorch import Lion as PlainLion

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.compiling import compiler_available
from lightning_gsq.training.optim import Adam, Lion, round_stochastically

PAIRS = {
    "lion": (Lion, PlainLion, {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.5}),
    "adam": (Adam, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}),
}
BACKENDS = [
    "eager",
    pytest.param("compile", marks=pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAIRS)
def test_full_precision_agrees(name: str, backend: str) -> None:
    own, other, settings = PAIRS[name]
    start = torch.randn(3, 5, 7)
    start[0, 0, 0] = -torch.inf
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizers = own([ours], backend=backend, **settings), other([theirs], **settings)
    for _ in range(5):
        gradient = torch.randn_like(start)
        gradient[0, 0, 0] = 0
        ours.grad, theirs.grad = gradient, gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_follows_full_precision_on_average(backend: str) -> None:
    """Steps of a tenth of what bfloat16 resolves: rounded to nearest, nothing would move."""
    start = torch.full((64, 256), 0.1015625)
    low, full = start.bfloat16().requires_grad_(), start.clone().requires_grad_()
    optimizers = Lion([low], lr=5e-5, backend=backend), Lion([full], lr=5e-5, backend="eager")
    for _ in range(20):
        low.grad, full.grad = torch.ones_like(low), torch.ones_like(full)
        for optimizer in optimizers:
            optimizer.step()
    assert low.dtype == optimizers[0].state[low]["exp_avg"].dtype == torch.bfloat16
    assert abs(float(low.detach().float().mean() - full.detach().mean())) < 2e-5
    assert float(full.detach().mean()) == pytest.approx(0.1005625, abs=1e-6)


def test_state_and_seed_make_a_run_repeat() -> None:
    def run(steps: int, saved: dict | None = None, start: torch.Tensor | None = None) -> tuple[torch.Tensor, dict]:
        parameter = (torch.full((8, 8), 0.1).bfloat16() if start is None else start.clone()).requires_grad_()
        optimizer = Adam([parameter], lr=1e-4, backend="eager")
        if saved is not None:
            optimizer.load_state_dict(saved)
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return parameter.detach(), optimizer.state_dict()

    whole, _ = run(4)
    half, saved = run(2)
    assert torch.equal(run(2, saved, half)[0], whole)


def test_rounding_is_unbiased_and_keeps_infinities() -> None:
    bits = torch.randint(0, 2**31 - 1, (1 << 16,), dtype=torch.int32)
    for value in (0.1, -3.3e-5, 1.0):
        x = torch.full((1 << 16,), value)
        rounded = round_stochastically(x, bits).float()
        assert float(rounded.mean()) == pytest.approx(value, rel=2e-5)
        assert len(rounded.unique()) == (1 if value == 1.0 else 2)
    infinite = torch.tensor([-torch.inf, torch.inf, 0.0])
    assert torch.equal(round_stochastically(infinite, bits[:3]).float(), infinite)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": -1.0}, "lr must"), ({"betas": (0.9, 1.0)}, "betas must"), ({"weight_decay": -1.0}, "weight_decay must")],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Lion([torch.zeros(2, requires_grad=True)], **settings)
    with pytest.raises(ConfigurationError, match="float32 or bfloat16"):
        Adam([torch.zeros(2, dtype=torch.double, requires_grad=True)])
