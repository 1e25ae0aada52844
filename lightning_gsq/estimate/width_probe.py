"""How long it takes to find out what the choices of a size are worth, from one block of random weights on this machine.

The code of :mod:`lightning_gsq.widths.worth` runs with one piece of text in place of all: a pass of the model as it is,
a pass that watches inputs, and one there and back that multiplies gradients with changes. Rounding is timed on the
largest matrix (or some of its rows) and scaled by the number of weights, the head on a slice of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate import limits
from lightning_gsq.estimate.probe import random_block
from lightning_gsq.estimate.problems import gigabytes
from lightning_gsq.estimate.quantities import Weights
from lightning_gsq.estimate.simulate import longer
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.estimate.start_probe import WEIGHTS
from lightning_gsq.estimate.timing import median_seconds
from lightning_gsq.estimate.width_terms import pieces_of
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import run_block
from lightning_gsq.models.ends import find_ends
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.run.perplexity import FP32
from lightning_gsq.system.seeding import generator_of
from lightning_gsq.system.slices import slices_within
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.widths.ends import EVERY
from lightning_gsq.widths.rounding import ROWS, change_of
from lightning_gsq.widths.worth import WEIGHED_BY, Candidate, back_through, change_bytes, changes_of, on_device

Schemes = Mapping[str, QuantScheme]
"""What a matrix may take, by the name of the choice."""
HOST = torch.device("cpu")


@dataclass(frozen=True)
class WidthTiming:
    """Seconds of the parts.

    Args:
        passed: One piece through one block of the model as it is, on the host.
        watched: One piece through one block in fp32, its inputs watched.
        looked_at: One piece there and back, along the changes of all choices.
        rounding: All choices of all matrices of a block.
        head: One piece through the head and back, along the changes of all choices.
        ends: All choices of embedding and head in rounding.
    """

    passed: float
    watched: float
    looked_at: float
    rounding: float
    head: float
    ends: float

    def total(self, pieces: int, blocks: int, deep: int, parts: int) -> float:
        """Seconds in all.

        Args:
            pieces: Pieces of text.
            blocks: Blocks of the model.
            deep: Those that gradients go through, the last one first.
            parts: Times that a block is passed, each for some of its matrices.
        """
        a_piece = blocks * self.passed + deep * parts * self.looked_at + self.head
        a_block = parts * min(pieces, WEIGHED_BY) * self.watched + self.rounding
        return pieces * a_piece + deep * a_block + self.ends


def width_seconds(
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    choices: Mapping[str, Schemes],
    device: torch.device,
    scale_dtype: torch.dtype,
    limit: float,
) -> tuple[float | None, str]:
    """Seconds of finding out what every choice is worth; None, and why, where one block does not fit this machine.

    Args:
        data: Calibration text.
        skeleton: The model.
        plan: Weights to quantize of each block.
        choices: What each matrix may take that is not pinned, by its full name.
        device: Where blocks are computed.
        scale_dtype: Stored dtype of scales that have none of their own.
        limit: Bytes that changes may take at once.
    """
    names = {index: {f"{skeleton.prefix}.{index}.{site.name}": site for site in plan[index]} for index in plan}
    wanting = [index for index, sites in names.items() if any(name in choices for name in sites)]
    index = next(iter(wanting), next(iter(plan)))
    free = {site: choices[name] for name, site in names[index].items() if name in choices}
    needed = FP32 * (skeleton.blocks[index].parameters + 2 * sum(map(_size, free)))
    room = limits.device_bytes(device) or limits.host_bytes()
    if needed > room:
        return None, f"one block with gradients takes {gigabytes(needed)}, {gigabytes(room)} are free here"
    pieces, tokens = pieces_of(data)
    passed, watched, looked_at = _passes(skeleton, index, free, tokens, device, scale_dtype)
    ends = find_ends(skeleton.model)
    embedding = choices.get(ends.embedding or "", {})
    head = embedding if ends.tied else choices.get(ends.head or "", {})
    rows, vocabulary = min(ROWS, skeleton.vocabulary), skeleton.vocabulary
    part = LinearSite("rows", 0, rows, skeleton.width, transposed=False)
    of_head = _rounding({part: head}, HOST, scale_dtype)
    of_embedding = of_head if ends.tied else _rounding({part: embedding}, HOST, scale_dtype)
    occurring = min(vocabulary, pieces * tokens)  # of an embedding, rows of tokens that occur, at most so many
    timing = WidthTiming(
        passed,
        watched,
        looked_at,
        _rounding(free, device, scale_dtype),
        vocabulary / rows * _head(skeleton, rows, tokens, len(head)),
        (vocabulary * of_head + occurring * of_embedding) / rows,
    )
    deep = len(skeleton.blocks) - (0 if embedding else min(wanting, default=len(skeleton.blocks)))
    parts = slices_within([change_bytes(site, len(schemes)) for site, schemes in free.items()], limit)
    return timing.total(pieces, len(skeleton.blocks), deep, max(1, len(parts))), ""


def _passes(
    skeleton: Skeleton,
    index: int,
    free: Mapping[LinearSite, Schemes],
    tokens: int,
    device: torch.device,
    scale_dtype: torch.dtype,
) -> tuple[float, float, float]:
    """Seconds of a piece through a block of the model as it is, and of the two passes in fp32."""
    own, call = skeleton.blocks[index], longer(skeleton.blocks[index].call, tokens)
    hidden_BTD = torch.randn(1, tokens, skeleton.width, dtype=skeleton.dtype)
    block = random_block(own, HOST, skeleton.dtype)
    with torch.no_grad():
        passed = median_seconds(lambda _: run_block(block, hidden_BTD, call), HOST, repeats=1)
    return passed, *_looked_at(block.to(device, torch.float32), free, hidden_BTD.to(device), call, scale_dtype)


def _looked_at(
    block: nn.Module, free: Mapping[LinearSite, Schemes], hidden_BTD: torch.Tensor, call: BlockCall, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of a pass that watches inputs, and of one there and back along all changes."""
    device, call = hidden_BTD.device, on_device(call, hidden_BTD.device)
    candidates = [Candidate(site, schemes) for site, schemes in free.items()]
    gradient_BTD = torch.randn_like(hidden_BTD, dtype=torch.float32)
    changes = {
        site.name: [torch.randn(site.rows, site.in_features, device=device)] * len(schemes)
        for site, schemes in free.items()
    }
    block.requires_grad_(False)

    def watch(_: int) -> None:
        changes_of(block, candidates, [(hidden_BTD, call)], device, dtype, change=lambda w_OI, *_: w_OI)

    watching = median_seconds(watch, device, repeats=1)
    for site in free:
        block.get_parameter(site.name).requires_grad_(True)
    back = median_seconds(
        lambda _: back_through(block, candidates, changes, hidden_BTD, call, gradient_BTD), device, repeats=1
    )
    return watching, back


def _rounding(free: Mapping[LinearSite, Schemes], device: torch.device, scale_dtype: torch.dtype) -> float:
    """Seconds of rounding these matrices to all of their choices, from the largest or a part of its rows."""
    if not any(free.values()):
        return 0.0
    site = max(free, key=lambda site: site.out_features * site.in_features)
    rows = min(site.out_features, max(1, WEIGHTS // site.in_features))
    w_OI, importance_I = (
        torch.randn(shape, device=device) for shape in ((rows, site.in_features), (site.in_features,))
    )

    def action(_: int) -> None:
        for scheme in free[site].values():
            change_of(w_OI, [importance_I.square()], scheme, scale_dtype)

    seconds = median_seconds(action, device, repeats=1)
    return seconds * sum(map(_size, free)) / w_OI.numel()


def _head(skeleton: Skeleton, rows: int, tokens: int, choices: int) -> float:
    """Seconds of a piece through so many rows of the head and back, and along a change of them for each choice."""
    weight_RD = torch.randn(rows, skeleton.width, dtype=skeleton.dtype)
    change_RD, hidden_TD = torch.randn(rows, skeleton.width), torch.randn(tokens, skeleton.width)
    hidden_PD = hidden_TD[::EVERY]
    generator = generator_of("probe", "head")

    def action(_: int) -> None:
        leaf_TD = hidden_TD.to(skeleton.dtype, copy=True).requires_grad_(True)
        raw_TR = leaf_TD @ weight_RD.T
        logits_TR = raw_TR.float()
        drawn_T1 = torch.multinomial(logits_TR.detach().softmax(-1), 1, generator=generator)
        loss = -logits_TR.log_softmax(-1).gather(1, drawn_T1).sum()
        at_raw_PR = torch.autograd.grad(loss, [leaf_TD, raw_TR])[1][::EVERY].to(torch.bfloat16)
        for _ in range(choices):
            ((at_raw_PR.float() @ change_RD) * hidden_PD).sum(-1)

    return median_seconds(action, HOST, repeats=1)


def _size(site: LinearSite) -> int:
    return site.rows * site.in_features
