"""A matrix of a block in another choice, and what the model then says (``check_worth``, ``exchange_widths``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.models.chain import Trace, find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import find_linear_sites
from lightning_gsq.models.passing import Forms
from lightning_gsq.models.standing_in import standing_in
from lightning_gsq.models.survey import survey
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.widths.worth import Candidate, changes_of, on_device

CPU = torch.device("cpu")


class Roundings:
    """Matrices of a model in other choices, rounded to nearest.

    Args:
        network: The model in full precision.
        calibration_NT: Sequences whose inputs weigh the rounding.
    """

    def __init__(self, network: PreTrainedModel, calibration_NT: Tensor) -> None:
        self.prefix, self.blocks = find_blocks(network)
        self.calibration = [trace(network, ids_T[None]) for ids_T in calibration_NT]

    def place(self, name: str) -> tuple[int, str]:
        """The number of a matrix's block, and its name in it."""
        number, _, inside = name.removeprefix(f"{self.prefix}.").partition(".")
        return int(number), inside

    def of(self, name: str, choices: Sequence[str]) -> list[Tensor]:
        """The matrix in each choice, as its parameter is stored."""
        index, inside = self.place(name)
        block = self.blocks[index]
        batches = [(own.inputs_BTD[index], on_device(own.calls[index], CPU)) for own in self.calibration]
        hidden_BTD, call = batches[0]
        sites = find_linear_sites(block, lambda: run_block(block, hidden_BTD, call))
        site = next(site for site in sites if site.name == inside)
        candidate = Candidate(site, {choice: scheme_of(choice) for choice in choices})
        changes = changes_of(copy.deepcopy(block).float(), [candidate], batches, CPU, torch.float16)[inside]
        matrix_OI = site.to_matrix(block.get_parameter(inside))
        return [site.from_matrix(matrix_OI + change_OI).contiguous() for change_OI in changes]


class Predictions:
    """What a model says of held-out sequences; only blocks from a changed one on are run again.

    Args:
        network: The model, whose parameters others change.
        held_out_NT: The sequences.
    """

    def __init__(self, network: PreTrainedModel, held_out_NT: Tensor) -> None:
        self.network, self.held_out_NT = network, held_out_NT
        self.blocks = find_blocks(network)[1]
        self.forms: Forms = survey(network).forms
        self.remember()

    def remember(self) -> None:
        """Records what enters each block now."""
        self.traces = [trace(self.network, ids_T[None]) for ids_T in self.held_out_NT]

    @torch.no_grad()
    def of(self, n: int, index: int = 0) -> Tensor:
        """Log probabilities ``T V`` of a sequence; blocks before ``index`` only hand on what they gave before."""
        earlier = {i: _giving(self.forms, self.blocks[i], self.traces[n], i) for i in range(index)}
        with standing_in(earlier, self.blocks):
            logits_BTV = self.network(self.held_out_NT[n : n + 1], use_cache=False).logits
        return logits_BTV[0].float().log_softmax(-1)


def _giving(forms: Forms, block: nn.Module, own: Trace, index: int) -> Callable[..., Any]:
    after = own.inputs_BTD[index + 1] if index + 1 < len(own.inputs_BTD) else own.output_BTD
    return lambda *_, **__: forms.like(block, own.calls[index].layout.unpack(after))
