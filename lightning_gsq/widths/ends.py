"""The embedding and the head in :mod:`lightning_gsq.widths.worth`: what their changes do, sequence by sequence."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
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
from lightning_gsq.widths.rounding import change_of

Changes = dict[tuple[str, str], Tensor]
"""What rounding adds to a matrix, fp32 ``V D``, by its name and that of the choice."""


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
        self.changes: Changes = {}
        self._head: dict[tuple[str, str], list[Tensor]] = {}
        self._embedding: dict[tuple[str, str], list[float]] = {}

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
        self.changes = self._round(ids_NT, outputs)
        self._head = {key: [] for key in self.changes if key[0] == self.head}
        return [self._head_pass(ids_T[None], output) for ids_T, output in zip(ids_NT, outputs, strict=True)]

    def enter(self, ids_NT: Tensor, gradients: Sequence[Tensor]) -> None:
        """Takes each sequence's gradient at the first block's input."""
        name, module = self.embedding, self.network.get_input_embeddings()
        self._embedding = {key: [] for key in self.changes if key[0] == name}
        if not self._embedding:
            return
        for ids_T, gradient_BTD in zip(ids_NT, gradients, strict=True):
            entering = self._at_embedding(ids_T[None], gradient_BTD)
            for key, values in self._embedding.items():
                change = torch.func.functional_call(module, {"weight": self.changes[key]}, (ids_T[None],))
                values.append(float((change * entering.float()).sum()))

    def divergences(self) -> dict[tuple[str, str], float]:
        """Half the mean square of what each change does to a sequence, in nats."""
        worth = {}
        for key in self.changes:
            head = self._head.get(key)
            count = len(head if head is not None else self._embedding[key])
            squares = []
            for n in range(count):
                entering = self._embedding[key][n] if key in self._embedding else 0.0
                along_T = torch.zeros(1) if head is None else head[n]
                # Labels at different positions are independent: of the head's part, only squares are expected to stay.
                squares.append(float(along_T.square().sum() + entering**2 + 2 * entering * along_T.sum()))
            worth[key] = max(0.0, math.fsum(squares) / count / 2)
        return worth

    @torch.no_grad()
    def _round(self, ids_NT: Tensor, outputs: Sequence[Tensor]) -> Changes:
        """The changes; those of a head weighted by its inputs, as a run does it."""
        moments_D: Tensor | None = None
        if self.head in self.schemes:
            seen = [self._tail(ids_T[None], output)[0].float() for ids_T, output in zip(ids_NT, outputs, strict=True)]
            moments_D = torch.cat(seen).square().mean(0)
        changes = {}
        for name, choices in self.schemes.items():
            w_VD = self.network.get_parameter(name).detach().float()
            importance_D = moments_D if name == self.head else None
            for choice, scheme in choices.items():
                changes[name, choice] = change_of(w_VD, [importance_D], scheme, self.scale_dtype)
        return changes

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

    def _head_pass(self, ids_BT: Tensor, output_BTD: Tensor) -> Tensor:
        leaf_BTD = output_BTD.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            hidden_TD, raw, logits_TV = self._tail(ids_BT, leaf_BTD)
            logits_TV = logits_TV.float()
            drawn_T1 = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=self.generator)
            loss = -logits_TV.log_softmax(-1).gather(1, drawn_T1).sum()
        gradient_BTD, at_raw = torch.autograd.grad(loss, [leaf_BTD, raw])
        at_raw_TV, hidden_TD = at_raw.reshape(len(hidden_TD), -1).float(), hidden_TD.detach().float()
        for key, values in self._head.items():
            values.append(((at_raw_TV @ self.changes[key]) * hidden_TD).sum(-1))
        return gradient_BTD.detach()

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
