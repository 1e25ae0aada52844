"""The predicted divergence of a change, compared with the divergence that it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

import lightning_gsq.widths.worth as module
from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.ends import end_names
from lightning_gsq.models.linear_weights import LinearSite, find_linear_sites
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.widths.rounding import change_of
from lightning_gsq.widths.worth import Candidate, change_bytes, measure_worth, samples
from tests.support.tiny import COMMON, FAMILIES, random_model

CPU = torch.device("cpu")
SCHEMES = {name: scheme_of(name) for name in ("w4g16", "w7g16")}


def _candidates(network: PreTrainedModel, ids_BT: Tensor) -> tuple[dict[int, list[Candidate]], list[Candidate]]:
    traced, inside = trace(network, ids_BT), {}
    for index, block in enumerate(find_blocks(network)[1]):
        hidden, call = traced.inputs_BTD[index], traced.calls[index]
        sites = find_linear_sites(block, lambda b=block, h=hidden, c=call: run_block(b, h, c))
        inside[index] = [Candidate(site, SCHEMES) for site in sites]
    shapes = {name: network.get_parameter(name).shape for name in end_names(network)}
    return inside, [Candidate(LinearSite(name, 0, *shape, False), SCHEMES) for name, shape in shapes.items()]


@torch.no_grad()
def _divergence(network: PreTrainedModel, name: str, site: LinearSite, scheme: str, ids_NT: Tensor) -> float:
    """The true divergence, nats a token."""
    parameter = network.get_parameter(name)
    original, before = parameter.data, network(ids_NT).logits.log_softmax(-1)
    w_OI = site.to_matrix(original)
    parameter.data = site.from_matrix(w_OI + change_of(w_OI, [None], SCHEMES[scheme], torch.float16)).contiguous()
    after = network(ids_NT).logits.log_softmax(-1)
    parameter.data = original
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("family", ["tied", "gemma3", "gpt2", "qwen3_moe"])
def test_predictions_agree_with_the_truth(family: str) -> None:
    network = random_model(LlamaConfig(**COMMON, tie_word_embeddings=True)) if family == "tied" else FAMILIES[family]()
    ids_NT = torch.randint(0, 256, (96, 16), generator=torch.Generator().manual_seed(0))
    inside, outside = _candidates(network, ids_NT[:1])
    state = {name: value.clone() for name, value in network.state_dict().items()}
    worth = measure_worth(network, inside, outside, ids_NT, CPU, torch.float16, seed=0)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])
    prefix = find_blocks(network)[0]
    sites = {f"{prefix}.{index}.{own.site.name}": own.site for index, all_ in inside.items() for own in all_}
    sites |= {own.site.name: own.site for own in outside}
    assert set(worth) == set(sites)
    predicted, true = [], []
    for name, site in sites.items():
        assert worth[name]["w4g16"] > worth[name]["w7g16"] >= 0
        predicted.append(worth[name]["w7g16"])
        true.append(_divergence(network, name, site, "w7g16", ids_NT))
    ratio = torch.tensor(predicted) / torch.tensor(true)
    # A change of what enters a router may send a token to another expert: a jump that no gradient sees.
    assert (0.25 if family == "qwen3_moe" else 0.6) < float(ratio.median()) < 1.6
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (predicted, true)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.7


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe"])
def test_a_limit_divides_the_matrices_of_a_block_and_changes_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = FAMILIES[family]()
    ids_NT = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    inside, outside = _candidates(network, ids_NT[:1])
    together: list[int] = []

    def counted(block: nn.Module, candidates: Sequence[Candidate], *rest: Any) -> Any:
        together.append(sum(change_bytes(own.site, len(SCHEMES)) for own in candidates))
        return looked_at(block, candidates, *rest)

    looked_at = module._looked_at
    monkeypatch.setattr(module, "_looked_at", counted)
    largest = max(change_bytes(own.site, len(SCHEMES)) for own in inside[0])
    found = []
    for limit in (math.inf, largest, 0.0):
        together.clear()
        found.append(measure_worth(network, inside, outside, ids_NT, CPU, torch.float16, 0, limit))
        assert max(together) <= max(limit, largest)
    assert len(together) == sum(map(len, inside.values()))  # one matrix after the other
    assert found[0] == found[1] == found[2]


def test_a_tied_embedding_is_worth_what_it_does_on_both_ends() -> None:
    network = random_model(LlamaConfig(**COMMON, tie_word_embeddings=True))
    ids_NT = torch.randint(0, 256, (96, 16), generator=torch.Generator().manual_seed(0))
    (own,) = _candidates(network, ids_NT[:1])[1]
    name, costs = own.site.name, []
    for tied in (True, False):
        if not tied:  # the same weights, but the change enters only
            network.config.tie_word_embeddings = False
            network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
        costs.append(measure_worth(network, {}, [own], ids_NT, CPU, torch.float16, seed=0)[name]["w7g16"])
        true = _divergence(network, name, own.site, "w7g16", ids_NT)
        assert 0.6 < costs[-1] / true < 1.6
    assert costs[0] > 1.3 * costs[1]


def test_samples_take_the_beginnings_first() -> None:
    ids_NT = torch.arange(3 * 300).view(3, 300)
    pieces = samples(ids_NT)
    assert pieces.shape == (6, 128)
    assert pieces[:, 0].tolist() == [0, 300, 600, 128, 428, 728]
    assert samples(ids_NT[:, :40]).shape == (3, 40)
