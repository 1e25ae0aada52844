"""The embedding and the head in :mod:`lightning_gsq.widths.worth`: what their changes do, sequence by sequence."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import Reached
from lightning_gsq.models.ends import find_ends
from lightning_gsq.models.passing import Forms, instead_of_blocks
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.widths.rounding import ROWS, change_of

EVERY = 4
"""Of so many positions of a sequence one is looked at along the changes of the head: each is a sample of its own."""
Key = tuple[str, str]
"""The name of a matrix and that of a choice."""


@dataclass(frozen=True)
class HeadPass:
    """What a sequence leaves of its way through the head and back.

    Args:
        gradient_BTD: At the last block's output.
        hidden_TD: What enters the head, fp32.
        first: The first position that is looked at, of :data:`EVERY` one.
        at_raw_PV: The gradient at what leaves the head at those positions, bf16; empty where it has no choice.
    """

    gradient_BTD: Tensor
    hidden_TD: Tensor
    first: int
    at_raw_PV: Tensor

    @property
    def hidden_PD(self) -> Tensor:
        """What enters the head at the positions that are looked at."""
        return self.hidden_TD[self.first :: EVERY]


class EndChanges:
    """Adds up what the changes of embedding and head do.

    Args:
        network: The model.
        forms: What its blocks return.
        schemes: The choices of each of the two that has any, by parameter name and name of the choice.
        scale_dtype: Stored dtype of scales that have none of their own.
        seed: Of the labels.

    Raises:
        ConfigurationError: the model names no head, or does not call it.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        forms: Forms,
        schemes: Mapping[str, Mapping[str, QuantScheme]],
        scale_dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.network, self.forms, self.schemes, self.scale_dtype = network, forms, schemes, scale_dtype
        ends = find_ends(network)  # a tied head is one matrix with the embedding, and goes by its name
        self.embedding, self.head = ends.embedding, ends.embedding if ends.tied else ends.head
        if network.get_output_embeddings() is None:
            raise ConfigurationError(
                f"model.size: {type(network).__name__} names no module as its head, so that what its predictions "
                "depend on is not known; give --model.scheme"
            )
        self.generator = torch.Generator().manual_seed(seed)
        self._moments_D: Tensor | None = None
        self._head: dict[Key, list[Tensor]] = {}
        self._tokens = 0  # of a sequence
        self._embedding: dict[Key, list[float]] = {}

    @property
    def wants_embedding(self) -> bool:
        """Whether the gradient at the first block's input is needed."""
        return self.embedding in self.schemes

    def gradients(self, ids_NT: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The gradient at the last block's output of each sequence's ``-log p`` of labels drawn from ``p``.

        Args:
            ids_NT: The sequences.
            outputs: What the last block gives for each, ``1 T D``.
        """
        self._tokens = ids_NT.shape[1]
        passes = [self._head_pass(n, ids_T[None], outputs[n]) for n, ids_T in enumerate(ids_NT)]
        if self.head is not None and self.head in self.schemes:
            self._moments_D = torch.cat([own.hidden_TD for own in passes]).square().mean(0)
            self._along_head(self.head, passes)
        return [own.gradient_BTD for own in passes]

    @torch.no_grad()
    def _along_head(self, name: str, passes: Sequence[HeadPass]) -> None:
        """What the changes of the head do at the positions looked at: rows by slices, for all sequences."""
        choices, w_VD = self.schemes[name], self.network.get_parameter(name)
        for choice in choices:
            self._head[name, choice] = [torch.zeros(len(own.hidden_PD)) for own in passes]
        for start in range(0, len(w_VD), ROWS):
            rows = slice(start, start + ROWS)
            for choice, scheme in choices.items():
                change_RD = change_of(w_VD[rows].float(), [self._moments_D], scheme, self.scale_dtype)
                for along_P, own in zip(self._head[name, choice], passes, strict=True):
                    along_P += ((own.at_raw_PV[:, rows].float() @ change_RD) * own.hidden_PD).sum(-1)

    @torch.no_grad()
    def enter(self, ids_NT: Tensor, gradients: Sequence[Tensor]) -> None:
        """Takes each sequence's gradient at the first block's input."""
        name, module = self.embedding, self.network.get_input_embeddings()
        if name is None or name not in self.schemes:
            return
        entering = [
            self._at_embedding(ids_T[None], gradient_BTD).float()
            for ids_T, gradient_BTD in zip(ids_NT, gradients, strict=True)
        ]
        # Only the rows of tokens that occur, and one choice at a time.
        w_VD, rows_U = self.network.get_parameter(name), ids_NT.unique()
        importance_D = self._moments_D if name == self.head else None
        change_VD = torch.zeros(w_VD.shape)
        for choice, scheme in self.schemes[name].items():
            change_VD[rows_U] = change_of(w_VD[rows_U].float(), [importance_D], scheme, self.scale_dtype)
            changes = [torch.func.functional_call(module, {"weight": change_VD}, (ids_T[None],)) for ids_T in ids_NT]
            self._embedding[name, choice] = [
                float((change * own).sum()) for change, own in zip(changes, entering, strict=True)
            ]

    def divergences(self) -> dict[tuple[str, str], float]:
        """Half the mean square of what each change does to a sequence, in nats."""
        worth = {}
        for key in [(name, choice) for name, choices in self.schemes.items() for choice in choices]:
            head = self._head.get(key)
            count = len(head if head is not None else self._embedding[key])
            squares = []
            for n in range(count):
                entering = self._embedding[key][n] if key in self._embedding else 0.0
                along_P = torch.zeros(1) if head is None else head[n]
                share = self._tokens / len(along_P)
                # Labels at different positions are independent: of the head's part, only squares are expected to stay.
                at_head = share * float(along_P.square().sum() + 2 * entering * along_P.sum())
                squares.append(at_head + entering**2)
            worth[key] = max(0.0, math.fsum(squares) / count / 2)
        return worth

    def _tail(self, ids_BT: Tensor, output_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What enters the head ``T D`` and leaves it ``T V``, and the logits ``T V``, of the last block's output."""
        seen: list[tuple[Tensor, Tensor]] = []

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((args[0], output))

        def given(index: int, hidden_BTD: Tensor, call: BlockCall) -> Tensor:
            return output_BTD if index == len(self.forms.outputs) - 1 else hidden_BTD

        handle = self.network.get_output_embeddings().register_forward_hook(note)
        try:
            with instead_of_blocks(self.network, self.forms, ids_BT, given):
                logits_BTV = self.network(ids_BT, use_cache=False).logits
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ConfigurationError(
                f"model.size: {type(self.network).__name__} calls the module that it names as its head {len(seen)} "
                "times in a forward pass, so that what its predictions depend on is not known; give --model.scheme"
            )
        hidden, raw = seen[0]
        return hidden.reshape(-1, hidden.shape[-1]), raw, logits_BTV.flatten(0, -2)

    def _head_pass(self, number: int, ids_BT: Tensor, output_BTD: Tensor) -> HeadPass:
        leaf_BTD = output_BTD.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            hidden_TD, raw, logits_TV = self._tail(ids_BT, leaf_BTD)
            logits_TV = logits_TV.float()
            drawn_T1 = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=self.generator)
            loss = -logits_TV.log_softmax(-1).gather(1, drawn_T1).sum()
        gradient_BTD, at_raw = torch.autograd.grad(loss, [leaf_BTD, raw])
        first = number % min(EVERY, len(hidden_TD))  # other positions in the next sequence
        at_raw_TV = at_raw.reshape(len(hidden_TD), -1) if self.head in self.schemes else at_raw.new_zeros(0)
        at_raw_PV = at_raw_TV[first::EVERY].to(torch.bfloat16, copy=True)
        return HeadPass(gradient_BTD.detach(), hidden_TD.detach().float(), first, at_raw_PV)

    def _at_embedding(self, ids_BT: Tensor, gradient_BTD: Tensor) -> Tensor:
        """The gradient at what the embedding gives, from that at the first block's input."""
        leaves: list[Tensor] = []
        entered: list[Tensor] = []

        def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().clone().requires_grad_(True))
            return leaves[-1]

        def stop(_: int, hidden_BTD: Tensor, call: BlockCall) -> Tensor:
            entered.append(hidden_BTD)
            raise Reached

        handle = self.network.get_input_embeddings().register_forward_hook(cut)
        try:
            with (
                torch.enable_grad(),
                contextlib.suppress(Reached),
                instead_of_blocks(self.network, self.forms, ids_BT, stop),
            ):
                self.network(ids_BT, use_cache=False)
        finally:
            handle.remove()
        return torch.autograd.grad(entered[0], leaves[0], gradient_BTD.to(entered[0]))[0]
