"""The weights whose outputs come nearest to the full-precision model's, for what enters them in the quantized one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.models.recording import Recording
from lightning_gsq.quantizers.following import PairedStatistics

NAME, WIDTH, ROWS, TOKENS = "o_proj.weight", 12, 8, 200
SITE, CPU = LinearSite(NAME, 0, ROWS, WIDTH, False), torch.device("cpu")


def _pair(sums: bool, w_OI: Tensor) -> tuple[Recording, Recording]:
    """One run over the same tokens in either model."""
    full = torch.randn(4, TOKENS // 4, WIDTH)
    own = full + 0.3 * torch.randn_like(full)
    past = torch.randn(4, TOKENS // 4, ROWS)
    off = past + 0.5 * own[..., :ROWS] + 0.1 * torch.randn_like(past)
    return (
        Recording({NAME: [full]}, {NAME: past + full @ w_OI.T} if sums else {}),
        Recording({NAME: [own]}, {NAME: off + own @ w_OI.T} if sums else {}),
    )


def _wanted_outputs(w_OI: Tensor, full: Recording, own: Recording) -> Tensor:
    if not full.sums:
        return (full.inputs[NAME][0] @ w_OI.T).flatten(0, 1)
    beside = own.sums[NAME] - own.inputs[NAME][0] @ w_OI.T
    return (full.sums[NAME] - beside).flatten(0, 1)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_is_the_regression_of_the_wanted_outputs_on_the_inputs(sums: bool, weighed: bool) -> None:
    w_OI = torch.randn(ROWS, WIDTH)
    full, own = _pair(sums, w_OI)
    weight_N = torch.rand(TOKENS) if weighed else torch.ones(TOKENS)
    statistics = PairedStatistics([SITE], CPU, full.sums)
    statistics.add(full, own, {NAME: weight_N} if weighed else None)
    root_N1 = weight_N.sqrt()[:, None]
    x_NI = own.inputs[NAME][0].flatten(0, 1) * root_N1
    regression = torch.linalg.lstsq(x_NI, _wanted_outputs(w_OI, full, own) * root_N1).solution.T
    torch.testing.assert_close(statistics.wanted(SITE, w_OI, 1e-6), regression, rtol=1e-3, atol=1e-3)
    assert (regression - w_OI).abs().max() > 0.1
    torch.testing.assert_close(statistics.inputs.hessians(SITE)[0], 2 / TOKENS * x_NI.T @ x_NI)


def test_damping_stays_near_the_weight() -> None:
    w_OI = torch.randn(ROWS, WIDTH)
    pair = _pair(True, w_OI)
    statistics = PairedStatistics([SITE], CPU, pair[0].sums)
    statistics.add(*pair)
    moves = [float((statistics.wanted(SITE, w_OI, damping) - w_OI).norm()) for damping in (1e-3, 0.1, 10.0)]
    assert moves[0] > moves[1] > 3 * moves[2] > 0


def test_equal_streams_leave_the_weight_as_it_is() -> None:
    w_OI = torch.randn(ROWS, WIDTH)
    full, _ = _pair(True, w_OI)
    statistics = PairedStatistics([SITE], CPU, full.sums)
    assert torch.equal(statistics.wanted(SITE, w_OI, 0.01), w_OI), "no token came"
    statistics.add(full, full)
    assert torch.equal(statistics.wanted(SITE, w_OI, 0.01), w_OI)


def test_inputs_that_were_always_zero_keep_their_weights() -> None:
    w_OI = torch.randn(ROWS, WIDTH)
    full, own = _pair(False, w_OI)
    for recording in (full, own):
        recording.inputs[NAME][0][..., 3] = 0
    statistics = PairedStatistics([SITE], CPU)
    statistics.add(full, own)
    wanted_OI = statistics.wanted(SITE, w_OI, 0.01)
    assert torch.equal(wanted_OI[:, 3], w_OI[:, 3]) and not torch.equal(wanted_OI, w_OI)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("counts", [(1, 1), (2, 1), (1, 0)])
def test_two_processes_see_what_one_does(sums: bool, counts: tuple[int, int]) -> None:
    """Two weights that read one tensor, sums over processes in place, and as many of them whatever each has seen."""
    sites = [SITE, replace(SITE, name="other.weight")]
    weights = {site.name: torch.randn(ROWS, WIDTH) for site in sites}
    alone, here, there = (PairedStatistics(sites, CPU, [NAME] if sums else []) for _ in range(3))
    for number, count in enumerate(counts):
        for _ in range(count):
            pair = _pair(sums, weights[NAME])
            for recording in pair:
                recording.inputs["other.weight"] = recording.inputs[NAME]
            alone.add(*pair)
            (here, there)[number].add(*pair)
    theirs: list[Tensor] = []
    there.reduce(lambda value: theirs.append(value.clone()) or value)  # type: ignore[func-returns-value]
    given = iter(theirs)
    here.reduce(lambda value: value.add_(next(given)))
    assert not list(given)
    for site in sites:
        w_OI = weights[site.name]
        torch.testing.assert_close(here.wanted(site, w_OI, 0.01), alone.wanted(site, w_OI, 0.01))
