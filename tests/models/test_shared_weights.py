"""Weights in two places of a model: one code for one memory, or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.shared_weights import refuse_shared
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.training import ModelQuantization
from tests.support.tiny import FAMILIES

MLP = "model.layers.{}.mlp.{}_proj.weight"


def share_mlp(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def share_query(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


def share_memory(model: PreTrainedModel) -> None:
    """Another parameter object, with half of the first block's memory."""
    first, second = (block.mlp.gate_proj for block in model.model.layers)
    second.weight = nn.Parameter(first.weight[24:].repeat(1, 1), requires_grad=False)
    second.weight.data = first.weight.data[24:]


def tie_head(model: PreTrainedModel) -> None:
    model.lm_head.weight = model.model.layers[1].mlp.gate_proj.weight


def repeat_block(model: PreTrainedModel) -> None:
    model.model.layers[1] = model.model.layers[0]


@pytest.mark.parametrize(
    ("share", "first", "second"),
    [
        (share_mlp, MLP.format(0, "gate"), MLP.format(1, "gate")),
        (share_query, "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        (share_memory, MLP.format(0, "gate"), MLP.format(1, "gate")),
        (tie_head, MLP.format(1, "gate"), "lm_head.weight"),
        (repeat_block, "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refused_by_name(share: Callable[[PreTrainedModel], None], first: str, second: str, device: str) -> None:
    model = FAMILIES["llama"]().to(device)
    if device == "meta" and share is share_memory:
        pytest.skip("two objects without memory share none")
    share(model)
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if ".layers." in name and p.ndim == 2]
    with pytest.raises(ConfigurationError) as raised:
        refuse_shared(model, names)
    assert {first, second} <= set(str(raised.value).replace(",", "").split())
    assert "--model.exclude '[" in str(raised.value)


def test_the_plan_refuses_it_and_takes_the_way_out() -> None:
    network = FAMILIES["llama"]()
    share_mlp(network)
    model = ModelQuantization("x")
    model.network = network
    with pytest.raises(ConfigurationError, match="are the same numbers in memory"):
        make_plan(model)
    model = ModelQuantization("x", exclude=["*.mlp.*"])
    model.network = network
    assert sum(len(block.weights) for block in make_plan(model)) == 8


def test_the_way_out_names_all_of_them() -> None:
    network = FAMILIES["llama"]()
    share_mlp(network)
    names = [MLP.format(block, part) for block in (0, 1) for part in ("gate", "up", "down")]
    with pytest.raises(ConfigurationError) as raised:
        refuse_shared(network, names)
    assert str(raised.value).endswith(f"--model.exclude '[{', '.join(names)}]'")


def test_one_of_two_is_refused_too() -> None:
    """The other one would change without having been trained."""
    network = FAMILIES["llama"]()
    share_mlp(network)
    with pytest.raises(ConfigurationError, match=r"--model.exclude '\[model.layers.0.mlp.up_proj.weight\]'"):
        refuse_shared(network, [MLP.format(0, "up")])


def test_what_is_not_quantized_may_be_shared() -> None:
    network = FAMILIES["llama"]()
    network.lm_head.weight = network.model.embed_tokens.weight
    refuse_shared(network, [name for name, p in network.named_parameters() if ".layers." in name and p.ndim == 2])


def test_neighbours_in_one_storage_share_nothing() -> None:
    """As weights of a memory-mapped file are."""
    network = FAMILIES["llama"]()
    parameters = list(network.parameters())
    flat = torch.cat([p.flatten() for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    refuse_shared(network, [name for name, p in network.named_parameters() if ".layers." in name])
