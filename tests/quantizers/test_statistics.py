"""Hessians of linear inputs, shared inputs and fused experts."""

import torch

from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import find_linear_sites
from lightning_gsq.quantizers import InputStatistics
from tests.support.tiny import FAMILIES


def _statistics(family: str) -> tuple[torch.nn.Module, InputStatistics, torch.Tensor]:
    model = FAMILIES[family]()
    traced = trace(model, torch.arange(16)[None])
    block = find_blocks(model)[1][0]
    sites = find_linear_sites(block, lambda: run_block(block, traced.inputs_BTD[0], traced.calls[0]))
    statistics = InputStatistics(sites, torch.device("cpu"))
    hidden = torch.cat([traced.inputs_BTD[0], 2 * traced.inputs_BTD[0]])
    with torch.no_grad(), statistics.watching(block):
        for part in hidden.split(1):
            run_block(block, part, traced.calls[0])
    return block, statistics, hidden


def test_hessian_is_the_second_moment_of_the_inputs() -> None:
    block, statistics, hidden = _statistics("llama")
    x = block.input_layernorm(hidden).reshape(-1, hidden.shape[-1])
    for name in ("q_proj", "k_proj", "v_proj"):
        (hessian,) = statistics.hessians(statistics.sites[f"self_attn.{name}.weight"])
        torch.testing.assert_close(hessian, 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)


def test_transposed_weights_have_hessians_of_their_inputs() -> None:
    block, statistics, hidden = _statistics("gpt2")
    x = block.ln_1(hidden).reshape(-1, hidden.shape[-1])
    (hessian,) = statistics.hessians(statistics.sites["attn.c_attn.weight"])
    torch.testing.assert_close(hessian, 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)


def test_each_fused_expert_sees_its_own_tokens() -> None:
    _, statistics, hidden = _statistics("qwen3_moe")
    site = statistics.sites["mlp.experts.gate_up_proj"]
    counts = [statistics.counts.get((site.name, expert), 0) for expert in range(4)]
    tokens = hidden.shape[0] * hidden.shape[1]
    assert sum(counts) == 2 * tokens  # two experts a token
    hessians = statistics.hessians(site)
    assert len(hessians) == 4
    assert all(bool(h.any()) == bool(n) for h, n in zip(hessians, counts, strict=True))
