"""What enters weights, and the sums that their outputs become a part of, in blocks of several families."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.models.chain import find_blocks, run_block
from lightning_gsq.models.recording import Recording, record
from lightning_gsq.models.survey import survey
from tests.support.tiny import FAMILIES

ADDED = {
    # weights whose outputs go into the hidden states at once, by family
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "gemma2": [],  # a norm comes first
    "gpt2": ["attn.c_proj", "mlp.c_proj"],  # and not c_fc, whose activation function adds what it computed from it
    "qwen3_moe": ["self_attn.o_proj"],  # experts' outputs are weighed
}


def _block(network: PreTrainedModel) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    surveyed, block = survey(network), find_blocks(network)[1][0]
    return block, lambda: run_block(block, surveyed.inputs_BTD[0], surveyed.bound_call(0))


@pytest.mark.parametrize("family", ADDED)
def test_what_is_added(family: str) -> None:
    block, run = _block(FAMILIES[family]())
    seen = record(block, run, dict(block.named_parameters()))
    assert sorted(seen.sums) == sorted(f"{name}.weight" for name in ADDED[family])


def test_the_numbers() -> None:
    network = FAMILIES["llama"]()
    block, run = _block(network)
    names = ["self_attn.o_proj.weight", "mlp.down_proj.weight"]
    seen = record(block, run, names)
    assert list(seen.inputs) == names
    attended, gated = (inputs[0] @ block.get_parameter(name).T for name, inputs in seen.inputs.items())
    torch.testing.assert_close(seen.sums[names[0]], survey(network).inputs_BTD[0] + attended)
    torch.testing.assert_close(seen.sums[names[1]], seen.sums[names[0]] + gated)
    torch.testing.assert_close(seen.sums[names[1]], run())


def test_a_run_ends_where_everything_was_seen() -> None:
    block, run = _block(FAMILIES["llama"]())
    reached = []
    block.mlp.register_forward_hook(lambda *_: reached.append(True))
    names = ["self_attn.q_proj.weight", "self_attn.o_proj.weight"]
    seen = record(block, run, names)
    assert reached == [True]
    again = record(block, run, names, until=seen)
    assert reached == [True]
    for one, two in ((seen, again),):
        assert list(one.inputs) == list(two.inputs) and list(one.sums) == list(two.sums)
    torch.testing.assert_close(again.sums[names[1]], seen.sums[names[1]])
    record(block, run, names, until=Recording({"mlp.down_proj.weight": [torch.zeros(1)]}))
    assert reached == [True, True], "what is not seen ends nothing"
