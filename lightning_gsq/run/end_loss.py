"""How much a calibration token matters to a matrix: the square of the end loss's gradient at the matrix's outputs.

An error of a matrix's outputs at a token changes the model's divergence from itself by the Fisher information there, of
which the mean square of the gradient of ``-log p(y)``, labels y drawn from the model's own predictions, is a sample.
Weighing the tokens of a Hessian by it makes least squares over the outputs an estimate of least divergence at the end
(one group of output channels of GuidedQuant, Kim et al., arXiv 2505.07004).

Some sequences at a time go forwards through the full-precision model, which leaves what enters each block, and back
through its blocks from the last to the first, each computed again with its gradient. Only tokens' weights are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import run_block
from lightning_gsq.models.head import find_head, last_hidden
from lightning_gsq.models.output_gradients import watch_output_gradients
from lightning_gsq.models.passing import instead_of_blocks
from lightning_gsq.ops.distillation import Head
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.calibration import hessian_sequences
from lightning_gsq.run.forward_passes import (
    arguments_of,
    embedded,
    fetch,
    hidden_store,
    propagate,
    sequences_at_once,
    working_copy,
)
from lightning_gsq.run.hidden_states import ActivationOptions, Stream
from lightning_gsq.run.run import Run, TokenWeights
from lightning_gsq.system.seeding import generator_of
from lightning_gsq.system.slices import slices
from lightning_gsq.training import ModelQuantization
from lightning_gsq.training.losses import LOSS_POSITIONS

OPTION, WAY_OUT = "model.end_loss_weights", "leave it out"
BESIDE = 2
"""Tensors of the size of hidden states beside what enters each block: what leaves the last one, and the gradient."""


def check_end_loss(model: ModelQuantization) -> None:
    """Verifies that gradients of the end loss can be had.

    Raises:
        ConfigurationError: the model's logits are not its output embedding applied to its last hidden states.
    """
    if model.start.end_loss_weights:
        find_head(model.network, OPTION, WAY_OUT)


def weights_of(run: Run, plan: BlockPlan) -> TokenWeights | None:
    """Those of a block's matrices, found for all blocks when first asked for; None where the run wants none."""
    if not run.model.start.end_loss_weights:
        return None
    if not run.token_weights:
        with run.watch("end_loss"):
            run.token_weights.update(token_weights(run))
    return run.token_weights[plan.index]


def token_weights(run: Run) -> dict[int, TokenWeights]:
    """Weights of the tokens that the warm start sees, this process's, by the number of each planned block.

    Matrices that see other rows than the tokens in their order, such as experts, have none.
    """
    network, count = run.model.network, hessian_sequences(run)
    head = find_head(network, OPTION, WAY_OUT)
    bias_V = None if head.bias_V is None else head.bias_V.to(run.device)
    head = Head(head.weight_VD.to(run.device), bias_V, head.scale, head.softcap)
    chances_NT = _chances(run, count)
    squares: dict[int, dict[str, list[Tensor]]] = {plan.index: {} for plan in run.plan}
    together = sequences_together(run.activations, run.data.sequence_length, run.width, len(run.blocks))
    for part in slices(count, together):
        ids_NT = run.train_ids_NT[part]
        with hidden_store((*ids_NT.shape, run.width), run.activations, streams=len(run.blocks) + BESIDE) as store:
            streams = [embedded(network, ids_NT, store)]
            for index in range(len(run.blocks)):
                streams.append(Stream(ids_NT, store.new(), store))
                propagate(run, working_copy(run, index), index, *streams[-2:])
            gradient_NTD = store.new()
            _at_last_block(run, head, streams.pop(), gradient_NTD, chances_NT[part])
            for index in reversed(range(run.plan[0].index, len(run.blocks))):
                found = _back(run, index, streams.pop(), gradient_NTD)
                if index in squares:
                    for name, square_NT in found.items():
                        squares[index].setdefault(name, []).append(square_NT)
    return {index: _of_mean_one(run, index, found) for index, found in squares.items()}


def sequences_together(options: ActivationOptions, tokens: int, width: int, blocks: int) -> int:
    """Sequences whose hidden states at all blocks are kept at once: as many as the limit for them allows.

    Args:
        options: How hidden states are kept.
        tokens: Of a sequence.
        width: Of hidden states.
        blocks: How many there are.
    """
    each = tokens * width * options.itemsize * (blocks + BESIDE)
    return max(sequences_at_once(tokens), int(options.limit) // each)


def _chances(run: Run, count: int) -> Tensor:
    """What labels are drawn by, ``N T``, uniform in 0 ... 1: a sequence's do not depend on which process has it."""
    ranks, tokens = run.ranks, run.data.sequence_length
    numbers = range(ranks.rank, ranks.rank + count * ranks.world, ranks.world)
    return torch.stack([torch.rand(tokens, generator=generator_of(run.seed, "end loss", number)) for number in numbers])


def _of_mean_one(run: Run, index: int, squares: Mapping[str, list[Tensor]]) -> TokenWeights:
    """Over the tokens of all processes; a matrix whose outputs move nothing weighs all tokens alike."""
    weights = {}
    for site in run.plan_of[index].weights:
        if site.name in squares:
            square_NT = torch.cat(squares[site.name])
            mean = run.mean(float(square_NT.mean()))
            weights[site.name] = square_NT / mean if mean > 0 else torch.ones_like(square_NT)
    return weights


def _at_last_block(run: Run, head: Head, last: Stream, gradient_NTD: Tensor, chances_NT: Tensor) -> None:
    """Fills in the gradient at what leaves the last block, of each sequence's ``-log p`` of labels drawn from ``p``."""
    network, final = run.model.network, len(run.blocks) - 1
    for part in slices(len(last.ids_NT), sequences_at_once(last.ids_NT.shape[1])):
        leaf_BTD = last.hidden_NTD[part].to(network.dtype).requires_grad_(True)

        def given(index: int, hidden_BTD: Tensor, _: BlockCall, leaf_BTD: Tensor = leaf_BTD) -> Tensor:
            return leaf_BTD if index == final else hidden_BTD

        with torch.enable_grad(), instead_of_blocks(network, run.forms, last.ids_NT[part], given):
            hidden_BTD = last_hidden(network, last.ids_NT[part])
        pieces = (rows.flatten(0, 1).split(LOSS_POSITIONS) for rows in (hidden_BTD, chances_NT[part]))
        at_hidden = [_at_head(run, head, *piece) for piece in zip(*pieces, strict=True)]
        (at_leaf_BTD,) = torch.autograd.grad(hidden_BTD, leaf_BTD, torch.cat(at_hidden).view_as(hidden_BTD))
        gradient_NTD[part] = at_leaf_BTD.to(gradient_NTD.dtype)


def _at_head(run: Run, head: Head, hidden_CD: Tensor, chance_C: Tensor) -> Tensor:
    """The gradient at what enters the head, on the host in the dtype of ``hidden_CD``."""
    entering_CD = hidden_CD.detach().to(run.device, head.weight_VD.dtype).requires_grad_(True)
    with torch.enable_grad():
        log_probs_CV = head.logits(entering_CD).float().log_softmax(-1)
        labels_C1 = draw(log_probs_CV.detach(), chance_C)
        (gradient_CD,) = torch.autograd.grad(-log_probs_CV.gather(1, labels_C1).sum(), entering_CD)
    return gradient_CD.to(hidden_CD.device, hidden_CD.dtype)


def draw(log_probs_CV: Tensor, chance_C: Tensor) -> Tensor:
    """A label ``C 1`` for each row, by numbers of the host, so that it is the same on every device."""
    below_CV = log_probs_CV.exp().cumsum(-1)
    chance_C1 = chance_C.to(below_CV.device)[:, None]
    return torch.searchsorted(below_CV, chance_C1 * below_CV[:, -1:]).clamp_max(below_CV.shape[1] - 1)


def _back(run: Run, index: int, entering: Stream, gradient_NTD: Tensor) -> dict[str, Tensor]:
    """Takes the gradient from what leaves a block to what enters it.

    Args:
        run: The run.
        index: The block's number.
        entering: What enters it.
        gradient_NTD: The gradient at what leaves it; changed.

    Returns:
        The mean squares ``N T`` of the gradients at the outputs of its matrices, fp32 on the host, by name.
    """
    block, call = working_copy(run, index).requires_grad_(False), run.calls[index].to(run.device)
    arguments = arguments_of(run.model.network, run.forms, call, index, entering)
    tokens, squares = entering.ids_NT.shape[1], dict[str, list[Tensor]]()
    for part in slices(len(entering.ids_NT), sequences_at_once(tokens)):
        hidden_BTD = fetch(run, entering.hidden_NTD[part]).requires_grad_(True)
        bound = call.bind([tensor[part] for tensor in arguments], torch.float32)
        rows = len(hidden_BTD) * tokens

        def seen(name: str, gradient: Tensor, rows: int = rows) -> None:
            square_N = gradient.float().square().mean(-1).flatten()
            if len(square_N) == rows:
                squares.setdefault(name, []).append(square_N.cpu().view(-1, tokens))

        with torch.enable_grad(), run.precision(), watch_output_gradients(block, seen):
            output_BTD = run_block(block, hidden_BTD, bound)
        (at_input_BTD,) = torch.autograd.grad(output_BTD, hidden_BTD, fetch(run, gradient_NTD[part]).to(output_BTD))
        gradient_NTD[part] = at_input_BTD.to(gradient_NTD)
    whole = {name: torch.cat(parts) for name, parts in squares.items()}
    return {name: square_NT for name, square_NT in whole.items() if len(square_NT) == len(entering.ids_NT)}
