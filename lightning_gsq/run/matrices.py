"""The weights of one block as a quantizer sees them: matrices, their inputs, the salient part of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.experts import find_experts
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import InputStatistics, Matrix
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.calibration import Sent, collect, collect_more, tokens_of_experts
from lightning_gsq.run.end_loss import weights_of
from lightning_gsq.run.hidden_states import Stream
from lightning_gsq.run.run import Run
from lightning_gsq.saliency import Choice, settle
from lightning_gsq.system.processes import Ranks
from lightning_gsq.weights.element import ElementTensor
from lightning_gsq.weights.mixed import MixedTensor, merge_columns
from lightning_gsq.weights.quantized import QuantizedTensor, QuantizedWeight, expand_groups


@dataclass(frozen=True)
class Watched:
    """A block's weights, and what is known of them before any is quantized.

    Args:
        matrices: Each with the second moments of its inputs, by name.
        experts: Tokens that its router sends to each expert, by place; empty where no inputs are watched.
    """

    matrices: dict[str, Matrix]
    experts: Sent


def watch_inputs_of(
    run: Run,
    plan: BlockPlan,
    block: nn.Module,
    stream: Stream,
    spare: Stream | None,
    arguments: Sequence[Tensor] | None = None,
    *,
    says: bool,
) -> Watched:
    """The block's weights with the second moments of their inputs.

    Args:
        run: The run.
        plan: The block's weights and their schemes.
        block: The block on the device.
        stream: What enters it; its first sequences are watched.
        spare: What enters it of more sequences, for experts that few tokens reach; None where there are none.
        arguments: What it is called with for each sequence of the stream, if that is known already.
        says: Tell the user of matrices that few tokens reached.
    """
    needed, importance, experts = run.model.start.watches_inputs, run.importance, run.model.start.experts
    statistics, sent = InputStatistics(list(plan.weights), run.device), Sent()
    if needed:
        places = find_experts(block, plan.weights)
        everywhere, weights = places if experts.all_experts else (), weights_of(run, plan)
        collect(run, statistics, plan.index, block, stream, arguments, everywhere, weights)
        lines = [None if spare is None else collect_more(run, statistics, plan, block, places, spare)]
        lines.append(rarely_reached(statistics, plan, run.ranks))
        for line in filter(None, lines if says else ()):
            run.say(line)
        sent = tokens_of_experts(statistics, places)
        if plan.held:  # each process counted those of its own experts, which follow each other
            sent = {place: [count for own in run.ranks.all(tokens) for count in own] for place, tokens in sent.items()}

    def hessians(site: LinearSite) -> list[Tensor] | None:
        if importance is not None:
            return importance.hessians(f"{plan.name}.{site.name}", run.device, plan.held.get(site.name))
        return statistics.hessians(site) if needed else None

    matrices = {
        site.name: Matrix(
            site.to_matrix(block.get_parameter(site.name)).detach().float(),
            hessians(site),
            scheme,
            f"{plan.name}.{site.name}",
        )
        for site, scheme in plan.weights.items()
    }
    return Watched(matrices, sent)


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
        f"fewest {min(rare)}){what}. More sequences: "
        "--model.hessian_sequences, for experts alone --model.moe_min_tokens_per_expert"
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
