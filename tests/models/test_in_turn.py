"""Models whose blocks have weights only while they run compute what the whole ones do."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.in_turn import emptied_copy, filled_in_turn, float_in_turn

IDS = torch.arange(20)[None]


def _held(model: PreTrainedModel) -> int:
    """Numbers that the parameters of the blocks have."""
    return sum(parameter.numel() for parameter in find_blocks(model)[1].parameters())


@torch.no_grad()
def test_weights_that_come_and_go(family: PreTrainedModel) -> None:
    wanted, parameters, whole = family(IDS).logits, dict(family.named_parameters()), _held(family)
    asked: list[str] = []

    def value(name: str) -> Tensor:
        asked.append(name)
        return parameters[name].clone()

    for kept, left, times in ((False, 0, 2), (True, whole, 1)):
        asked.clear()
        model = filled_in_turn(emptied_copy(family), value, kept=kept)
        assert _held(model) == 0
        for _ in range(2):
            assert torch.equal(model(IDS).logits, wanted)
        assert _held(model) == left and _held(family) == whole
        prefix = f"{find_blocks(family)[0]}."
        assert sorted(asked) == sorted(times * [name for name in parameters if name.startswith(prefix)])


@torch.no_grad()
def test_half_precision_that_is_fp32_for_as_long_as_a_block_runs(family: PreTrainedModel) -> None:
    half = copy.deepcopy(family).to(torch.bfloat16)
    wanted = copy.deepcopy(half).float()(IDS).logits
    model = float_in_turn(half)
    dtypes = {parameter.dtype for parameter in find_blocks(model)[1].parameters()}
    for _ in range(2):
        assert torch.equal(model(IDS).logits, wanted)
        assert {parameter.dtype for parameter in find_blocks(model)[1].parameters()} == dtypes == {torch.bfloat16}
