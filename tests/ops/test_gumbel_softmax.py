"""The sampling op against its specification, values and gradients, in float64."""

import pytest
import torch
import triton
import triton.language as tl

from lightning_gsq.ops.gumbel_softmax import fused, gumbel_softmax_weight, kernels, op
from lightning_gsq.ops.gumbel_softmax.noise import counters, seed_words, uniform
from lightning_gsq.ops.gumbel_softmax.reference import gumbel_softmax_weight_reference
from lightning_gsq.system.compiling import compiler_available

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


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_length", [GROUP, 5, COLUMNS], ids=["ragged", "even", "one"])
@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str, group_length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton against the specification in float64; in the interpreter where there is no GPU."""
    monkeypatch.setattr(kernels, "COLUMNS", 4 if DEVICE == "cpu" else 16)  # long groups take several chunks
    monkeypatch.setattr(kernels, "ELEMENTS", 32)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    logits, scales, levels, codes = _inputs(case)
    logits = logits.detach().to(DEVICE, dtype).requires_grad_()
    scales = scales[:, : -(-COLUMNS // group_length)].detach().to(DEVICE, torch.float32).requires_grad_()
    codes = None if codes is None else codes.to(DEVICE)
    settings = {"kappa": 80.0, "tau": 0.7, "seed": 2**40 + 3, "group_length": group_length}
    w = gumbel_softmax_weight(logits, scales, levels, codes, backend="triton", **settings)  # type: ignore[arg-type]
    exact = logits.detach().double().requires_grad_(), scales.detach().double().requires_grad_()
    expected = gumbel_softmax_weight_reference(*exact, levels, codes, **settings)  # type: ignore[arg-type]
    rough = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 2e-5}
    assert w.dtype == dtype
    torch.testing.assert_close(w.double(), expected, **rough)
    upstream = torch.randn_like(w)
    d_logits, d_scales = torch.autograd.grad(w, (logits, scales), upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    rough["atol"] *= 100  # kappa / tau multiplies the gradient of a logit
    torch.testing.assert_close(d_logits.double(), wanted[0].nan_to_num(0), **rough)
    torch.testing.assert_close(d_scales.double(), wanted[1], rtol=1e-4, atol=1e-4)
    torch.use_deterministic_algorithms(False)


@triton.jit
def _tail_kernel(u, out, FAST: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(out + i, kernels._minus_log2(tl.load(u + i), FAST))


def test_kernels_keep_the_upper_tail() -> None:
    """Draws near 1, where a logarithm of limited absolute error would give infinite noise."""
    v = torch.tensor([2.0**-24, 3 * 2.0**-24, 2.0**-12, 2.0**-6, 0.031, 0.04, 0.5, 1 - 2.0**-24], device=DEVICE)
    u, out = 1 - v, torch.empty_like(v)
    _tail_kernel[(1,)](u, out, FAST=DEVICE == "cuda")
    torch.testing.assert_close(out.double(), -torch.log2(u.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_operator_is_well_registered(backend: str) -> None:
    logits, scales, levels, codes = _inputs("shifts")
    logits, scales = (t.detach().float().to(DEVICE).requires_grad_() for t in (logits, scales))
    numbers, seed = fused.numbers_of((1.0, 1.0, 1.0), 3, logits)
    arguments = (logits, scales, codes.to(DEVICE), levels, numbers, seed, GROUP, backend)  # type: ignore[union-attr]
    torch.library.opcheck(op.gumbel_softmax_weight, arguments)


def test_low_precision_logits_and_autocast() -> None:
    logits, scales, levels, codes = _inputs("shifts")
    settings = {"kappa": 80.0, "tau": 0.7, "seed": 1, "group_length": GROUP, "backend": "eager"}
    low = logits.detach().bfloat16().requires_grad_()
    scales = scales.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        w = gumbel_softmax_weight(low, scales, levels, codes, **settings)  # type: ignore[arg-type]
        full = gumbel_softmax_weight(low.detach().float(), scales, levels, codes, **settings)  # type: ignore[arg-type]
    assert full.dtype == torch.float32
    assert torch.equal(w, full.bfloat16())
    d_logits, d_scales = torch.autograd.grad(w.sum(), (low, scales))
    assert (d_logits.dtype, d_scales.dtype) == (torch.bfloat16, torch.float32)


def test_gradcheck() -> None:
    logits, scales, levels, codes = _inputs("two bit")

    def sample(logits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return gumbel_softmax_weight(
            logits, scales, levels, codes, kappa=50.0, tau=1.5, seed=1, group_length=GROUP, backend="eager"
        )

    assert torch.autograd.gradcheck(sample, (logits, scales))


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_some_rows_get_the_noise_that_they_have_in_the_whole(case: str, backend: str) -> None:
    logits, scales, levels, codes = _inputs(case)
    logits, scales = (tensor.detach().float().to(DEVICE) for tensor in (logits, scales))
    codes = None if codes is None else codes.to(DEVICE)
    settings = {"kappa": 80.0, "tau": 0.7, "seed": 2**40 + 3, "group_length": GROUP, "backend": backend}
    whole = gumbel_softmax_weight(logits, scales, levels, codes, **settings)  # type: ignore[arg-type]
    base = None if codes is None else codes[2:5]
    some = gumbel_softmax_weight(logits[:, 2:5], scales[2:5], levels, base, first_row=2, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(some, whole[2:5])
    exact = {key: value for key, value in settings.items() if key != "backend"}
    far = gumbel_softmax_weight_reference(logits, scales, levels, codes, first_row=2**40, **exact)  # type: ignore[arg-type]
    assert torch.isfinite(far).all()


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
