"""The weights of one block as a quantizer sees them: matrices, their inputs, the salient part of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import run_block
from lightning_gsq.models.expert_parallel import in_step
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import InputStatistics, Matrix
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.forward_passes import arguments_of, fetch, passes_of, sequences_at_once
from lightning_gsq.run.hidden_states import Stream
from lightning_gsq.run.run import Run
from lightning_gsq.saliency import Choice, settle
from lightning_gsq.system.processes import Ranks
from lightning_gsq.system.slices import slices
from lightning_gsq.weights.element import ElementTensor
from lightning_gsq.weights.mixed import MixedTensor, merge_columns
from lightning_gsq.weights.quantized import QuantizedTensor, QuantizedWeight, expand_groups


def hessian_sequences(run: Run) -> int:
    """This process's share of the sequences whose inputs the warm start sees."""
    return run.ranks.share_of(min(run.model.start.hessian_sequences, len(run.train_ids_NT) * run.ranks.world))


def matrices_of(
    run: Run,
    plan: BlockPlan,
    block: nn.Module,
    stream: Stream,
    arguments: Sequence[Tensor] | None = None,
    *,
    says: bool,
) -> dict[str, Matrix]:
    """The block's weights with the second moments of their inputs.

    Args:
        run: The run.
        plan: The block's weights and their schemes.
        block: The block on the device.
        stream: What enters it; its first sequences are watched.
        arguments: What it is called with for each sequence, if that is known already.
        says: Tell the user of matrices that few tokens reached.
    """
    needed, importance = run.model.start.watches_inputs, run.importance
    statistics = InputStatistics(list(plan.weights), run.device)
    if needed:
        collect(run, statistics, plan, block, stream, arguments)
        rare = rarely_reached(statistics, plan, run.ranks) if says else None
        if rare is not None:
            run.say(rare)

    def hessians(site: LinearSite) -> list[Tensor] | None:
        if importance is not None:
            return importance.hessians(f"{plan.name}.{site.name}", run.device, plan.held.get(site.name))
        return statistics.hessians(site) if needed else None

    return {
        site.name: Matrix(
            site.to_matrix(block.get_parameter(site.name)).detach().float(),
            hessians(site),
            scheme,
            f"{plan.name}.{site.name}",
        )
        for site, scheme in plan.weights.items()
    }


def collect(
    run: Run,
    statistics: InputStatistics,
    plan: BlockPlan,
    block: nn.Module,
    stream: Stream,
    arguments: Sequence[Tensor] | None = None,
) -> None:
    """Fills statistics with what the block's weights see, over all processes.

    Args:
        run: The run.
        statistics: Of the block's weights, as this process has them.
        plan: Their plan.
        block: The block on the device.
        stream: What enters it; its first sequences are watched.
        arguments: What it is called with for each sequence, if that is known already.
    """
    index = plan.index
    call, inputs_NTD = run.calls[index].to(run.device), stream.hidden_NTD[: hessian_sequences(run)]
    if arguments is None:
        arguments = arguments_of(run.model.network, run.forms, call, index, stream)
    watched = statistics.watching(block)
    with run.watch("statistics"), torch.no_grad(), watched, run.precision(), in_step(block, passes_of(inputs_NTD)):
        for part in slices(len(inputs_NTD), sequences_at_once(inputs_NTD.shape[1])):
            bound = call.bind([tensor[part] for tensor in arguments], torch.float32)
            run_block(block, fetch(run, inputs_NTD[part]), bound)
    if run.ranks.world > 1:
        # An expert that one process alone has has met the tokens of all.
        shared = [site for site in plan.weights if run.exchange is None or site.name not in plan.held]
        statistics.reduce(run.ranks.sum, shared)


def rarely_reached(statistics: InputStatistics, plan: BlockPlan, ranks: Ranks = Ranks()) -> str | None:  # noqa: B008
    """A line on the matrices, such as those of experts, that few tokens reached; None where all saw enough."""
    counts = {site.name: [(count, site.in_features) for count in statistics.tokens(site)] for site in plan.weights}
    own = [pair for name in plan.held for pair in counts[name]]
    seen = [pair for name in counts if name not in plan.held for pair in counts[name]]
    seen += [pair for pairs in (ranks.all(own) if plan.held else ()) for pair in pairs]
    rare = [count for count, columns in seen if count < columns]
    if not rare:
        return None
    none = rare.count(0)
    what = f"; {none} of them saw none, and are rounded by their weights alone" if none else ""
    return (
        f"{plan.name}: {len(rare)} of {len(seen)} matrices saw fewer calibration tokens than they have columns (the "
        f"fewest {min(rare)}){what}. More sequences: --model.hessian_sequences"
    )


def choose_salient(run: Run, matrices: dict[str, Matrix]) -> dict[str, Choice]:
    """The salient part of each matrix whose scheme has one."""
    mixed = {name: matrix for name, matrix in matrices.items() if matrix.scheme.mixed}
    if not mixed:
        return {}
    with run.watch("saliency"):
        return settle(mixed, run.model.start.saliency)


def as_stored(tensor: QuantizedWeight, w_OI: Tensor, name: str) -> QuantizedWeight:
    """The tensor as it is stored, on the CPU.

    Args:
        tensor: Its scales in their stored dtype.
        w_OI: The original weight.
        name: The weight's name.

    Raises:
        ConfigurationError: a scale does not fit into that dtype: it became infinite, or 0 where the weights are not.
    """
    tensor = tensor.cpu()
    for scales in tensor.scales:
        if not bool(torch.isfinite(scales).all()):
            raise ConfigurationError(
                f"model.scale_dtype: a scale of {name} does not fit into {_name(scales.dtype)}; use bfloat16 or float32"
            )
        if scales.dtype == torch.float16 and bool((scales == 0).any()):
            lost = int((_without_scale(tensor) & (w_OI.cpu() != 0)).sum())
            if lost:
                raise ConfigurationError(
                    f"model.scale_dtype: scales of {name} are too small for float16, so that {lost:,} weights would "
                    "become 0; use bfloat16 or float32, or leave the weight out with --model.exclude"
                )
    return tensor


def _without_scale(tensor: QuantizedWeight) -> Tensor:
    """The weights ``O I`` whose scale is 0, bool."""
    if isinstance(tensor, QuantizedTensor):
        columns = tensor.shape[1]
        if tensor.others:  # with two levels or offsets a group's scale may be 0 by choice
            return torch.zeros(tensor.shape, dtype=torch.bool)
        return expand_groups(tensor.scales_OG, columns, tensor.scheme.group_length(columns)) == 0
    if isinstance(tensor, MixedTensor):
        rest_OR = _without_scale(tensor.rest)
        salient_OK = rest_OR[:, :0] if tensor.salient is None else _without_scale(tensor.salient)
        return merge_columns(rest_OR, salient_OK, tensor.columns_K)
    assert isinstance(tensor, ElementTensor)
    lost_OI = (tensor.salient_scales_O == 0)[:, None].repeat(1, tensor.shape[1])
    lost_OI[~tensor.mask_OI] = (tensor.table_n == 0)[tensor.members.long()]
    return lost_OI


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
