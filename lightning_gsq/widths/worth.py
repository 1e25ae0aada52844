"""What a matrix is worth: how far the model's predictions move when it alone takes a choice, before any is tried.

For a change ``D`` of one matrix the divergence of the model from itself begins with the second order (the first is
zero, as the model is its own optimum), and that order is the Fisher information along ``D``:

    KL  ~  1/2 E (G . D)^2        G: gradient of -log p(y | text), summed over a sequence, with labels y drawn from p

Labels at different positions are independent given the text, so that one draw of a whole sequence sums up the
divergences of all of its positions without bias; over the length it is nats a token. ``D`` is the change that plain
rounding makes of this very matrix, so that direction, correlations and all columns count, and no factorization is
needed: one gradient a sequence serves every matrix and every choice.

The model stays where it is. One forward pass a sequence records what enters each block; then blocks go through the
device from the last to the first, each with its gradient, its changes and nothing else; where the changes are more than
a limit, some of its matrices after the others, with a pass there and back for each part. The head and the embedding are
linear in what they are given, so that theirs needs no gradient of a matrix. Tensors that a block hands to later blocks
beside the hidden states (shared keys and values) count as constants.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.models.survey import survey
from lightning_gsq.quantizers.statistics import InputSquareSums
from lightning_gsq.system.slices import slices_within
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.widths.ends import EndChanges
from lightning_gsq.widths.rounding import Change, change_of

SEQUENCES, TOKENS = 64, 128
"""How many sequences are looked at, and how long: each is a sample, so that many short ones are better than few."""
WEIGHED_BY = 16
"""How many of them say what the columns of a matrix count for in rounding."""
Worth = dict[str, dict[str, float]]
"""Predicted divergence in nats a token, by parameter name and by the name of the choice."""


@dataclass(frozen=True)
class Candidate:
    """A matrix and the schemes that it may take.

    Args:
        site: Its shape; its name inside its block, or in the model where it is outside of the blocks.
        schemes: By the name of the choice.
    """

    site: LinearSite
    schemes: Mapping[str, QuantScheme]


def samples(ids_NT: Tensor) -> Tensor:
    """The sequences that predictions are made from: the beginnings of all calibration sequences first, then more."""
    length = min(TOKENS, ids_NT.shape[1])
    pieces_NPT = ids_NT[:, : ids_NT.shape[1] // length * length].unflatten(1, (-1, length))
    return pieces_NPT.transpose(0, 1).flatten(0, 1)[:SEQUENCES]


def measure_worth(
    network: PreTrainedModel,
    inside: Mapping[int, Sequence[Candidate]],
    outside: Sequence[Candidate],
    ids_NT: Tensor,
    device: torch.device,
    scale_dtype: torch.dtype,
    seed: int,
    limit: float = math.inf,
    left: Callable[[int], None] = lambda _: None,
) -> Worth:
    """Predicts the divergence of every choice of every matrix.

    Args:
        network: The model; it is left as it was.
        inside: Matrices of each block, by its number.
        outside: The embedding and the head, where they have a choice.
        ids_NT: Calibration sequences; each is one sample.
        device: Where blocks are computed, in fp32.
        scale_dtype: Stored dtype of scales that have none of their own.
        seed: Of the labels.
        limit: Bytes that changes and gradients of a block's matrices may take at once; a matrix alone may take more.
        left: Told after each block how many are left.

    Returns:
        By full parameter name, then by the name of the choice.
    """
    prefix, blocks = find_blocks(network)
    traces = [trace(network, ids_T[None]) for ids_T in ids_NT]
    calls, inputs = [traced.calls for traced in traces], [traced.inputs_BTD for traced in traces]
    schemes = {candidate.site.name: candidate.schemes for candidate in outside}
    ends = EndChanges(network, survey(network).forms, schemes, scale_dtype, seed)
    gradients = ends.gradients(ids_NT, [traced.output_BTD for traced in traces])
    worth: Worth = {}
    # Gradients go no further down than something wants them.
    wanting = [index for index, chosen in inside.items() if chosen]
    lowest = 0 if ends.wants_embedding else min(wanting, default=len(blocks))
    for index in reversed(range(lowest, len(blocks))):
        block = copy.deepcopy(blocks[index]).to(device, torch.float32).requires_grad_(False)
        chosen = list(inside.get(index, ()))
        batches = [(inputs[n][index], on_device(calls[n][index], device)) for n in range(len(ids_NT))]
        sizes = [change_bytes(candidate.site, len(candidate.schemes)) for candidate in chosen]
        for part in slices_within(sizes, limit) or [slice(0)]:  # without a choice, gradients pass all the same
            entering, products = _looked_at(block, chosen[part], batches, gradients, device, scale_dtype)
            for candidate in chosen[part]:
                nats_C = _divergences(products[candidate.site.name], ids_NT.shape[1])
                worth[f"{prefix}.{index}.{candidate.site.name}"] = dict(zip(candidate.schemes, nats_C, strict=True))
        gradients = entering
        for calls_of, inputs_of in zip(calls, inputs, strict=True):
            del calls_of[index], inputs_of[index]
        left(index - lowest)
    ends.enter(ids_NT, gradients)
    for (name, choice), nats in ends.divergences().items():
        worth.setdefault(name, {})[choice] = nats / ids_NT.shape[1]
    return worth


def change_bytes(site: LinearSite, choices: int) -> int:
    """What the changes of a matrix and its gradient take."""
    return torch.float32.itemsize * (choices + 1) * site.rows * site.in_features


def _looked_at(
    block: nn.Module,
    candidates: Sequence[Candidate],
    batches: Sequence[tuple[Tensor, BlockCall]],
    gradients: Sequence[Tensor],
    device: torch.device,
    scale_dtype: torch.dtype,
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """All sequences through a block and back; the gradients at its input, and along the changes of some matrices."""
    changes = changes_of(block, candidates, batches[:WEIGHED_BY], device, scale_dtype)
    products: dict[str, list[Tensor]] = {name: [] for name in changes}
    entering = []
    for candidate in candidates:
        block.get_parameter(candidate.site.name).requires_grad_(True)
    for (hidden_BTD, call), gradient_BTD in zip(batches, gradients, strict=True):
        into_BTD, along = back_through(block, candidates, changes, hidden_BTD.to(device), call, gradient_BTD)
        entering.append(into_BTD)
        for name, products_C in along.items():
            products[name].append(products_C)
    block.requires_grad_(False)
    return entering, products


def _divergences(products: list[Tensor], tokens: int) -> list[float]:
    """Half the mean squares over the sequences, a token, of each choice."""
    nats_C: list[float] = (torch.stack(products).double().square().mean(0) / 2 / tokens).tolist()
    return nats_C


def on_device(call: BlockCall, device: torch.device) -> BlockCall:
    """A call on the device, in fp32."""
    return call.mapped(lambda _, t: t.to(device, torch.float32 if t.is_floating_point() else t.dtype))


def changes_of(
    block: nn.Module,
    candidates: Sequence[Candidate],
    batches: Sequence[tuple[Tensor, BlockCall]],
    device: torch.device,
    scale_dtype: torch.dtype,
    change: Change = change_of,
) -> dict[str, list[Tensor]]:
    """What rounding adds to each matrix of a block.

    Args:
        block: The block, on the device in fp32.
        candidates: Its matrices.
        batches: Hidden states that enter it and its call, for each calibration sequence.
        device: The device.
        scale_dtype: Stored dtype of scales that have none of their own.
        change: Rounds.

    Returns:
        fp32 ``O I``, one for each choice in the order of the candidate's, by the matrix's name in the block.
    """
    if not candidates:
        return {}

    sums, changes = InputSquareSums([candidate.site for candidate in candidates], device), {}
    with torch.no_grad(), sums.watching(block):
        for hidden_BTD, call in batches:
            run_block(block, hidden_BTD.to(device, torch.float32), call)
    for candidate in candidates:
        site = candidate.site
        w_OI = site.to_matrix(block.get_parameter(site.name)).detach()
        importances = list(sums.of(site)[0].to(device))
        changes[site.name] = [change(w_OI, importances, scheme, scale_dtype) for scheme in candidate.schemes.values()]
    return changes


def back_through(
    block: nn.Module,
    candidates: Sequence[Candidate],
    changes: Mapping[str, Sequence[Tensor]],
    hidden_BTD: Tensor,
    call: BlockCall,
    gradient_BTD: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient at a block's input, and along each change of its matrices.

    Args:
        block: The block, in fp32; the candidates' parameters want gradients.
        candidates: Its matrices.
        changes: Of :func:`changes_of`.
        hidden_BTD: What enters the block.
        call: Its call.
        gradient_BTD: The gradient at its output.

    Returns:
        The gradient, fp32 ``B T D``, and by the matrix's name the products of its own with each change, ``C`` on the
        host.
    """
    hidden_BTD = hidden_BTD.float().requires_grad_(True)
    parameters = [block.get_parameter(candidate.site.name) for candidate in candidates]
    with torch.enable_grad():
        output_BTD = run_block(block, hidden_BTD, call)
    grads = torch.autograd.grad(output_BTD, [hidden_BTD, *parameters], gradient_BTD.to(output_BTD), allow_unused=True)
    along = {}
    for candidate, gradient in zip(candidates, grads[1:], strict=True):
        own = changes[candidate.site.name]
        if gradient is None:
            along[candidate.site.name] = torch.zeros(len(own))
            continue
        gradient_W = candidate.site.to_matrix(gradient).flatten()
        along[candidate.site.name] = torch.stack([change_OI.flatten() @ gradient_W for change_OI in own]).cpu()
    entering = grads[0]
    return torch.zeros_like(hidden_BTD) if entering is None else entering.detach(), along
