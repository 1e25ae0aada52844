"""The sampling op against its specification, values and gradients, in float64."""

import pytest
import torch

from lightning_gsq.compiling import compiler_available
from lightning_gsq.ops.gumbel_softmax import fused, gumbel_softmax_weight
from lightning_gsq.ops.gumbel_softmax.noise import counters, seed_words, uniform
from lightning_gsq.ops.gumbel_softmax.reference import gumbel_softmax_weight_reference

CASES = {
    "binary": (1, None, [0.0]),
    "ternary": (3, None, [-1.0, 0.0, 1.0]),
    "two bit": (4, None, [-2.0, -1.0, 0.0, 1.0]),
    "shifts": (5, "codes", [-2.0, -1.0, 0.0, 1.0, 2.0]),
}
ROWS, COLUMNS, GROUP = 6, 10, 4


def _inputs(case: str) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...], torch.Tensor | None]:
    count, base, levels = CASES[case]
    logits = 0.02 * torch.randn(count, ROWS, COLUMNS, dtype=torch.double)
    if base:
        logits[0, :, 0] = -torch.inf
    codes = torch.randint(-2, 2, (ROWS, COLUMNS), dtype=torch.int8) if base else None
    scales = torch.randn(ROWS, -(-COLUMNS // GROUP), dtype=torch.double)
    return logits.requires_grad_(), scales.requires_grad_(), tuple(levels), codes


def _check(case: str, noise: float, group_length: int, backend: str) -> None:
    logits, scales, levels, codes = _inputs(case)
    scales = scales[:, : -(-COLUMNS // group_length)]
    settings = {"kappa": 80.0, "tau": 0.7, "noise": noise, "seed": 2**40 + 3, "group_length": group_length}
    w = gumbel_softmax_weight(logits, scales, levels, codes, backend=backend, **settings)  # type: ignore[arg-type]
    expected = gumbel_softmax_weight_reference(logits, scales, levels, codes, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(w, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(w)
    for got, wanted in zip(
        torch.autograd.grad(w, (logits, scales), upstream),
        torch.autograd.grad(expected, (logits, scales), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted.nan_to_num(0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("slice_elements", [1, 90, 1 << 17])
@pytest.mark.parametrize("group_length", [GROUP, 5], ids=["ragged", "even"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_eager(
    case: str, noise: float, group_length: int, slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SLICE_ELEMENTS", slice_elements)
    _check(case, noise, group_length, "eager")


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")
@pytest.mark.parametrize(("case", "group_length"), [("binary", 5), ("shifts", GROUP)])
def test_compiled(case: str, group_length: int) -> None:
    _check(case, 1.0, group_length, "compile")


def test_gradcheck() -> None:
    logits, scales, levels, codes = _inputs("two bit")

    def sample(logits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return gumbel_softmax_weight(
            logits, scales, levels, codes, kappa=50.0, tau=1.5, seed=1, group_length=GROUP, backend="eager"
        )

    assert torch.autograd.gradcheck(sample, (logits, scales))


def test_same_seed_same_sample() -> None:
    logits, scales, levels, codes = _inputs("shifts")
    draws = [
        gumbel_softmax_weight(
            logits, scales, levels, codes, kappa=1.0, tau=1.0, seed=seed, group_length=GROUP, backend="eager"
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_uniform_is_strictly_inside_the_unit_interval() -> None:
    u = uniform(counters(1 << 10, 1 << 10, 1 << 10, 0, torch.device("cpu")), seed_words(7))
    assert 0 < float(u.min()) < 1e-5
    assert 1 - 1e-5 < float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 2e-3
    assert abs(float(u.var()) - 1 / 12) < 1e-3


def test_neighbouring_counters_and_seeds_are_uncorrelated() -> None:
    position = counters(1, 1 << 18, 0, 0, torch.device("cpu"))[0]
    first = uniform(position, seed_words(1))
    for other in (
        uniform(position + 1, seed_words(1)),
        uniform(position, seed_words(2)),
        uniform(position, seed_words(1 + 2**32)),
    ):
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.01


def test_frequencies_follow_the_softmax() -> None:
    """At a low temperature a sample is nearly one-hot, and level l comes up with probability softmax(kappa l)."""
    logits = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1).expand(3, 100, 500).contiguous()
    levels = (-1.0, 0.0, 1.0)
    w = gumbel_softmax_weight(
        logits, torch.ones(100, 1), levels, kappa=1.0, tau=1e-3, group_length=500, backend="eager"
    )
    shares = torch.stack([(w.round() == level).double().mean() for level in levels])
    torch.testing.assert_close(shares, torch.softmax(torch.tensor([0.0, 1.0, 2.0]).double(), 0), atol=5e-3, rtol=0)
