"""A model's own code without its blocks: what it hands them, and what it does with what they return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.models.calls import BlockCall, leaves, mapped
from lightning_gsq.models.chain import Reached, find_blocks, split_hidden
from lightning_gsq.models.standing_in import standing_in


@dataclass(frozen=True)
class Forms:
    """What each block returns beside its hidden states, so that something else can return the same.

    Args:
        outputs: What each block returned for a few tokens.
    """

    outputs: Mapping[nn.Module, Any]

    def like(self, block: nn.Module, hidden: Tensor) -> Any:
        """``hidden`` in the form in which the block returns its hidden states."""
        output = self.outputs[block]
        if isinstance(output, (tuple, list)):
            parts = [hidden, *output[1:]]
            return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
        return hidden

    def emptied(self) -> Forms:
        """The same forms without their values, so that nothing computed from them can be mistaken for the model's."""
        return Forms(
            {block: mapped(output, lambda _, t: torch.zeros_like(t)) for block, output in self.outputs.items()}
        )


@contextmanager
def instead_of_blocks(
    model: PreTrainedModel, forms: Forms, ids_BT: Tensor, function: Callable[[int, Tensor, BlockCall], Tensor]
) -> Iterator[None]:
    """While active, a function stands in for every block: from its number, hidden states and call to hidden states."""
    blocks = find_blocks(model)[1]

    def forward_of(index: int, block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_BTD, call = split_hidden(args, kwargs, ids_BT)
            return forms.like(block, call.layout.unpack(function(index, hidden_BTD, call)))

        return forward

    with standing_in({index: forward_of(index, block) for index, block in enumerate(blocks)}, blocks):
        yield


@torch.no_grad()
def calls_without_blocks(model: PreTrainedModel, forms: Forms, ids_BT: Tensor) -> list[BlockCall]:
    """What the model calls its blocks with if they only hand hidden states on: arguments that need no block."""
    calls: list[BlockCall] = []

    def note(_: int, hidden_BTD: Tensor, call: BlockCall) -> Tensor:
        calls.append(call)
        if len(calls) == len(forms.outputs):
            raise Reached  # what follows the last block needs no call
        return hidden_BTD

    with contextlib.suppress(Reached), instead_of_blocks(model, forms, ids_BT, note):
        model(ids_BT, use_cache=False)
    return calls


@torch.no_grad()
def arguments_from_ids(
    model: PreTrainedModel, forms: Forms, ids_BT: Tensor, index: int, call: BlockCall
) -> Sequence[Tensor]:
    """The arguments of one block that belong to these sequences and need no block before it.

    Args:
        model: The model.
        forms: What its blocks return.
        ids_BT: The sequences.
        index: Number of the block.
        call: Its call, which says where they stand.

    Returns:
        One tensor for each of ``call.from_ids``, sequences first.
    """
    reached: list[BlockCall] = []

    def stop(number: int, hidden_BTD: Tensor, here: BlockCall) -> Tensor:
        if number == index:
            reached.append(here)
            raise Reached
        return hidden_BTD

    with contextlib.suppress(Reached), instead_of_blocks(model, forms, ids_BT, stop):
        model(ids_BT, use_cache=False)
    there = dict(leaves({"args": reached[0].args, "kwargs": reached[0].kwargs}))
    return [there[carried.path].movedim(carried.batch, 0) for carried in call.from_ids]
