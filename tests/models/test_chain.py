"""Finding blocks, their calls and their linear weights in every family, without knowing any by name."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import compiled_run_block, embed, find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import LinearSite, find_linear_sites
from lightning_gsq.system.compiling import compiler_available
from tests.support.tiny import FAMILIES, LINEAR_WEIGHTS


def _sites(model: PreTrainedModel) -> tuple[nn.Module, list[LinearSite]]:
    traced = trace(model, torch.arange(8)[None])
    block = find_blocks(model)[1][0]
    return block, find_linear_sites(block, lambda: run_block(block, traced.inputs_BTD[0], traced.calls[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_chain_of_blocks_reproduces_the_model(family: str) -> None:
    """At a length beyond the sliding windows, and with a batch that the recorded masks broadcast over."""
    model = FAMILIES[family]()
    ids = torch.randint(0, 256, (3, 24))
    traced = trace(model, ids[:1])
    hidden = embed(model, ids)
    for block, call in zip(find_blocks(model)[1], traced.calls, strict=True):
        hidden = run_block(block, hidden, call)
    expected = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    first = trace(model, ids[1:2])
    torch.testing.assert_close(hidden[1:2], first.output_BTD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embed(model, ids), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_weights(family: str) -> None:
    block, sites = _sites(FAMILIES[family]())
    assert len(sites) == LINEAR_WEIGHTS[family]
    for site in sites:
        parameter = block.get_parameter(site.name)
        matrix = site.to_matrix(parameter)
        assert matrix.shape == (site.rows, site.in_features)
        assert torch.equal(site.from_matrix(matrix), parameter)


def test_conv1d_is_recognised_as_transposed_even_when_square() -> None:
    _, sites = _sites(FAMILIES["gpt2"]())
    assert all(site.transposed for site in sites)
    square = next(site for site in sites if site.name == "attn.c_proj.weight")
    assert square.out_features == square.in_features == 32


def test_router_is_left_out() -> None:
    _, sites = _sites(FAMILIES["qwen3_moe"]())
    assert {site.name for site in sites if site.experts} == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert not any("mlp.gate" in site.name for site in sites)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_substituted_weights_are_used(family: str) -> None:
    """Every site found really drives the block's output: zeros in its place change it."""
    model = FAMILIES[family]()
    traced = trace(model, torch.arange(8)[None])
    block, sites = _sites(model)
    before = run_block(block, traced.inputs_BTD[0], traced.calls[0])
    for site in sites:
        zeros = {site.name: torch.zeros_like(block.get_parameter(site.name))}
        after = run_block(block, traced.inputs_BTD[0], traced.calls[0], zeros)
        assert not torch.allclose(before, after), site.name


def test_a_model_without_blocks_is_refused() -> None:
    model = FAMILIES["llama"]()
    model.config.num_hidden_layers = 5
    with pytest.raises(ConfigurationError, match="no list of 5 transformer blocks"):
        find_blocks(model)


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")
def test_compiled_run_agrees_and_compiles_once_for_all_blocks_and_batch_sizes(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    traced = trace(model, torch.arange(6)[None])
    _, blocks = find_blocks(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = compiled_run_block()
    with torch.no_grad():
        for block, call, hidden in zip(blocks, traced.calls, traced.inputs_BTD, strict=True):
            for batch in (4, 2, 3):
                several = hidden.repeat(batch, 1, 1)
                torch.testing.assert_close(run(block, several, call), run_block(block, several, call))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
