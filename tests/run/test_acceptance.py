"""Which weights of a trained block stay: the block as a whole, single experts, single matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.experts import find_experts
from lightning_gsq.models.linear_weights import LinearSite, find_linear_sites
from lightning_gsq.quantizers import RTN, GumbelOptions, GumbelQuantizer
from lightning_gsq.quantizers.warm_start import Start
from lightning_gsq.run import acceptance
from lightning_gsq.run.acceptance import Accepted, accept, rows_of
from lightning_gsq.run.expert_outputs import output_errors
from lightning_gsq.system.processes import Ranks
from lightning_gsq.training import BlockQuantization
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.tiny import FAMILIES

RUN: Any = SimpleNamespace(
    device=torch.device("cpu"),
    precision=contextlib.nullcontext,
    ranks=Ranks(),
    model=SimpleNamespace(block=SimpleNamespace(expert_parallel=False)),
)
SCHEME = QuantScheme(2, 8)
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
Better = Callable[[LinearSite], Tensor]


def trained_block(
    family: str, start_is_good: Better, trained_is_good: Better
) -> tuple[BlockQuantization, list[tuple[Tensor, ...]]]:
    """A block whose matrices (``E`` a weight, as the functions say) are rounded to nearest, or badly."""
    model = FAMILIES[family]()
    traced = trace(model, torch.arange(16)[None])
    block = find_blocks(model)[1][0].float()
    sites = find_linear_sites(block, lambda: run_block(block, traced.inputs_BTD[0], traced.calls[0]))
    quantizers = {}
    for site in sites:
        w_OI = site.to_matrix(block.get_parameter(site.name)).float()
        good = RTN(weighted=False)(w_OI, None, SCHEME)
        bad_OI = (good.codes_OI + 1).clamp_max(1)
        start_O1, trained_O1 = (rows_of(site, of(site))[:, None] for of in (start_is_good, trained_is_good))
        start_OI = torch.where(start_O1, good.codes_OI, bad_OI)
        start = Start(start_OI, good.scales_OG, good.position_OI)
        quantizer = GumbelQuantizer(start, SCHEME, GumbelOptions(backend="eager"), torch.Generator())
        trained_OI = torch.where(trained_O1, good.codes_OI, bad_OI)
        levels = torch.tensor(quantizer.levels)[:, None, None]
        quantizer.logits.data = 9.0 * (levels == trained_OI)
        quantizers[site] = quantizer
    ids = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(1))
    hidden_BTD = model.get_input_embeddings()(ids).float()
    with torch.no_grad():
        target_BTD = run_block(block, hidden_BTD, traced.calls[0])
    module = BlockQuantization(block, traced.calls[0], quantizers, torch.optim.Adam)
    return module, [(h[None], t[None]) for h, t in zip(hidden_BTD, target_BTD, strict=True)]


def only(*names: str, experts: tuple[int, ...] = ()) -> Better:
    """True for weights of these names, and for these experts."""

    def of(site: LinearSite) -> Tensor:
        if not site.experts:
            return torch.tensor([site.name in names])
        return torch.tensor([number in experts for number in range(site.experts)])

    return of


def everything_but(*experts: int) -> Better:
    """True but for these experts."""
    return lambda site: ~only(experts=experts)(site) if site.experts else torch.tensor([True])


def test_an_expert_that_got_worse_goes_back_alone() -> None:
    module, batches = trained_block("qwen3_moe", only(experts=(2,)), everything_but(2))
    accepted = accept(RUN, module, batches)
    assert accepted.measures["trained"] < accepted.measures["start"]
    assert accepted.experts["mlp.experts"]["kept_start"] == [2]
    for name, trained_E in accepted.trained.items():
        assert trained_E.tolist() == ([True, True, False, True] if len(trained_E) == 4 else [True]), name
    assert accepted.measures["final"] < accepted.measures["trained"]  # the start of expert 2 was the better one
    line = accepted.line("model.layers.0")
    assert line is not None and "1 of mlp.experts (2) went back to the start" in line
    rows = rows_of_all(module, accepted)
    stored = {name: quantizer.blend(rows[name]) for name, quantizer in module.named_weights()}
    moved = [int((stored[name].codes_OI != q.start_codes).sum()) for name, q in module.named_quantizers()]
    total = sum(q.start_codes.numel() for _, q in module.named_quantizers())
    assert module.flip_rate(rows) == pytest.approx(sum(moved) / total)
    for name, quantizer in module.named_weights():
        codes_EOI = stored[name].codes_OI.view(len(accepted.trained[name]), -1)
        for number, trained in enumerate(accepted.trained[name].tolist()):
            source = quantizer.harden() if trained else quantizer.start_tensor()
            assert torch.equal(codes_EOI[number], source.codes_OI.view(codes_EOI.shape)[number])


def test_experts_that_no_held_out_token_reaches_keep_their_start() -> None:
    module, batches = trained_block("qwen3_moe", only(), everything_but())
    accepted = accept(RUN, module, [tuple(tensor[:, :1].expand_as(tensor) for tensor in batches[0])])
    own = accepted.experts["mlp.experts"]
    assert sorted(own["held_out_tokens"]) == [0, 0, 16, 16]
    assert own["kept_start"] == [number for number, tokens in enumerate(own["held_out_tokens"]) if not tokens]
    assert accepted.measures["final"] == accepted.measures["trained"]


def test_of_a_block_that_got_worse_what_is_better_stays() -> None:
    module, batches = trained_block(
        "qwen3_moe", only("self_attn.o_proj.weight", experts=(0, 2, 3)), only("self_attn.v_proj.weight", experts=(1,))
    )
    accepted = accept(RUN, module, batches)
    measures = accepted.measures
    assert measures["trained"] > measures["start"] > measures["final"]
    assert accepted.trained[UP].tolist() == accepted.trained[DOWN].tolist() == [False, True, False, False]
    assert accepted.trained["self_attn.v_proj.weight"].item() and not accepted.trained["self_attn.o_proj.weight"].item()
    dense = acceptance._Dense(module, {}).blended(accepted.trained)
    assert acceptance.error_of(RUN, module, batches, dense) == measures["final"]
    line = accepted.line("model.layers.0")
    assert line is not None and "1 of mlp.experts" in line and "self_attn.v_proj.weight" in line


def test_a_dense_block_that_got_better_is_taken_whole_after_two_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batches = trained_block("llama", only(), everything_but())
    seen, original = [], acceptance.error_of
    monkeypatch.setattr(acceptance, "error_of", lambda *args: seen.append(1) or original(*args))
    accepted = accept(RUN, module, batches)
    assert len(seen) == 2 and accepted.line("block") is None and not accepted.experts
    for site, (name, quantizer) in zip(module.sites, module.named_weights(), strict=True):
        stored = quantizer.blend(rows_of(site, accepted.trained[name]), torch.float16)
        assert all(
            torch.equal(a, b) for a, b in zip(stored.parts(), quantizer.harden(torch.float16).parts(), strict=True)
        )


def test_a_block_that_is_worse_in_everything_keeps_its_start() -> None:
    module, batches = trained_block("qwen3_moe", everything_but(), only())
    accepted = accept(RUN, module, batches)
    assert not any(bool(trained_E.any()) for trained_E in accepted.trained.values())
    assert accepted.measures["final"] == accepted.measures["start"]
    assert (accepted.line("block") or "").endswith("the block keeps its warm start")
    assert module.flip_rate() > 0
    assert module.flip_rate(rows_of_all(module, accepted)) == 0


def rows_of_all(module: BlockQuantization, accepted: Accepted) -> dict[str, Tensor]:
    return {site.name: rows_of(site, accepted.trained[site.name]) for site in module.sites}


def test_output_errors_are_those_of_the_experts_own_function() -> None:
    module, batches = trained_block("qwen3_moe", only(), everything_but(1))
    start, trained = module.start_weights(), module.hard_weights()
    (errors,) = output_errors(RUN, module, find_experts(module.block, module.sites), batches, start, trained, trained)
    reached: list[tuple[Tensor, Tensor]] = []
    hook = module.block.mlp.experts.register_forward_pre_hook(lambda _, args: reached.append(args[:2]))
    outside = {name: weight for name, weight in trained.items() if "experts" not in name}
    for hidden_BTD, _ in batches:
        module(hidden_BTD, outside)
    hook.remove()
    x_ND, chosen_NK = torch.cat([x for x, _ in reached]), torch.cat([chosen for _, chosen in reached])
    act = module.block.mlp.experts.act_fn

    def output(up: Tensor, down: Tensor, number: int) -> Tensor:
        gate, value = (x_ND[(chosen_NK == number).any(-1)] @ up[number].T).chunk(2, -1)
        return (act(gate) * value) @ down[number].T

    for number in range(4):
        exact = output(module.block.get_parameter(UP), module.block.get_parameter(DOWN), number)
        assert len(exact) == errors.tokens_E[number]
        for weights, found_E in ((start, errors.start_E), (trained, errors.trained_E)):
            wanted = (output(weights[UP], weights[DOWN], number) - exact).square().sum()
            torch.testing.assert_close(found_E[number].float(), wanted, rtol=1e-4, atol=1e-6)


class _Listed(nn.Module):
    """Experts in a list, and a list of branches that every token takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(3))
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        flat_ND = x_BTD.reshape(-1, 8)
        out_ND = sum(branch(flat_ND) for branch in self.branches)
        for number, expert in enumerate(self.experts):
            mine = flat_ND[:, 0].sign() == number - 1  # no token has a zero
            out_ND = out_ND.index_add(0, mine.nonzero()[:, 0], expert(flat_ND[mine]))
        return out_ND.view_as(x_BTD)


def test_experts_in_a_list() -> None:
    block = _Listed()
    sites = [LinearSite(name, 0, 8, 8, False) for name, p in block.named_parameters() if p.ndim == 2]
    places = find_experts(block, sites)
    assert [(place.name, len(place), place.fused) for place in places] == [
        ("experts", 3, False),
        ("branches", 2, False),
    ]
    assert places[0].parts[1] == (("experts.1.0.weight", 0), ("experts.1.2.weight", 0))
    weights = {site.name: block.get_parameter(site.name).detach() for site in sites}
    off = {name: weight + 0.1 for name, weight in weights.items()}
    quantizers: dict[LinearSite, Any] = {
        site: GumbelQuantizer(
            RTN(weighted=False)(weights[site.name], None, SCHEME), SCHEME, GumbelOptions(), torch.Generator()
        )
        for site in sites
    }
    module = BlockQuantization(block, BlockCall(), quantizers, torch.optim.Adam)
    x_BTD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    experts, branches = output_errors(RUN, module, places, [(x_BTD, x_BTD)], weights, off, weights)
    assert experts.routed and not branches.routed
    assert experts.tokens_E[1] == 0 and int(experts.tokens_E.sum()) == 10
    assert experts.start_E.tolist() == [0, 0, 0] and experts.trained_E[0] > 0 and experts.trained_E[1] == 0
