"""What the weights of a block see while their inputs are watched, and what is done for experts that see little."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.all_experts import all_experts, unreachable
from lightning_gsq.models.chain import find_blocks, run_block
from lightning_gsq.models.expert_parallel import held_weights, in_step
from lightning_gsq.models.experts import Experts, Part, find_experts
from lightning_gsq.models.survey import survey
from lightning_gsq.quantizers import InputStatistics
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.forward_passes import (
    arguments_of,
    embedded,
    fetch,
    hidden_store,
    passes_of,
    sequences_at_once,
)
from lightning_gsq.run.hidden_states import Stream
from lightning_gsq.run.run import Run, TokenWeights
from lightning_gsq.system.slices import slices
from lightning_gsq.training import ModelQuantization

Sent = dict[str, list[int]]
"""Tokens that a block's router sends to each expert, by place."""


def check_experts(model: ModelQuantization, plan: Sequence[BlockPlan]) -> None:
    """Verifies that what is asked for experts can be done; blocks run once more on a few tokens where it is much.

    Raises:
        ConfigurationError: no expert is quantized, or tokens cannot be sent to all experts of a block.
    """
    experts = model.start.experts
    if experts.option is None:
        return
    blocks = find_blocks(model.network)[1]
    places = {block.index: find_experts(blocks[block.index], block.weights) for block in plan}
    if not any(places.values()):
        raise ConfigurationError(
            f"{experts.option}: {type(model.network).__name__} has no experts among the weights to quantize; "
            "leave it out"
        )
    if not experts.all_experts:
        return
    surveyed = survey(model.network)
    for block in plan:
        call, inputs_BTD = surveyed.bound_call(block.index), surveyed.inputs_BTD[block.index]
        run = functools.partial(run_block, blocks[block.index], inputs_BTD, call)
        reason = unreachable(blocks[block.index], places[block.index], run)
        if reason is not None:
            raise ConfigurationError(
                f"{experts.option}: {reason} in {block.name} ({type(model.network).__name__}); use "
                "--model.moe_min_tokens_per_expert, which passes more text through the model as it is"
            )


@contextmanager
def spare_stream(run: Run) -> Iterator[Stream | None]:
    """The sequences for experts that few tokens reach, at the first block; None where there are none to be used."""
    ids_NT = run.spare_ids_NT
    if not len(ids_NT):
        yield None
        return
    with hidden_store((*ids_NT.shape, run.width), run.activations, streams=1) as store:
        yield embedded(run.model.network, ids_NT, store)


def hessian_sequences(run: Run) -> int:
    """This process's share of the sequences whose inputs the warm start sees."""
    return run.ranks.share_of(min(run.model.start.hessian_sequences, len(run.train_ids_NT) * run.ranks.world))


def collect(
    run: Run,
    statistics: InputStatistics,
    index: int,
    block: nn.Module,
    stream: Stream,
    arguments: Sequence[Tensor] | None = None,
    everywhere: Sequence[Experts] = (),
    weights: TokenWeights | None = None,
) -> None:
    """Fills statistics with what the block's weights see, over all processes.

    Args:
        run: The run.
        statistics: Of the block's weights.
        index: The block's number.
        block: The block on the device.
        stream: What enters it; its first sequences are watched.
        arguments: What it is called with for each sequence, if that is known already.
        everywhere: Experts that every token is sent to.
        weights: How much each token counts; all alike where a matrix has none.
    """
    ours = {part for place in everywhere for parts in place.parts for part in parts}
    others = None
    if everywhere:
        others = {(s.name, number) for s in statistics.sites.values() for number in range(max(s.experts, 1))} - ours
    watching = functools.partial(statistics.watching, block, ours)
    with all_experts(block, everywhere, watching):
        _pass(run, statistics, index, block, stream, slice(hessian_sequences(run)), arguments, others, weights)
    _reduce(run, statistics, block)


def _reduce(run: Run, statistics: InputStatistics, block: nn.Module) -> None:
    """Adds up what all processes have seen; an expert that one of them alone has has met the tokens of all."""
    if run.ranks.world > 1:
        own = {} if run.exchange is None else held_weights(block, run.ranks.rank, run.ranks.world)
        statistics.reduce(run.ranks.sum, [site for site in statistics.sites.values() if site.name not in own])


def _pass(
    run: Run,
    statistics: InputStatistics,
    index: int,
    block: nn.Module,
    stream: Stream,
    sequences: slice,
    arguments: Sequence[Tensor] | None,
    parts: Collection[Part] | None,
    weights: TokenWeights | None = None,
) -> None:
    """Some sequences of a stream through a block, with these matrices watched."""
    call = run.calls[index].to(run.device)
    if arguments is None:
        arguments = arguments_of(run.model.network, run.forms, call, index, stream)
    inputs_NTD, arguments = stream.hidden_NTD[sequences], [tensor[sequences] for tensor in arguments]
    watching, together = statistics.watching(block, parts), in_step(block, passes_of(inputs_NTD))
    with run.watch("statistics"), torch.no_grad(), watching, run.precision(), together:
        for part in slices(len(inputs_NTD), sequences_at_once(inputs_NTD.shape[1])):
            bound = call.bind([tensor[part] for tensor in arguments], torch.float32)
            if weights is not None:
                statistics.weigh({name: weight_NT[part].flatten() for name, weight_NT in weights.items()})
            run_block(block, fetch(run, inputs_NTD[part]), bound)


def collect_more(
    run: Run, statistics: InputStatistics, plan: BlockPlan, block: nn.Module, places: Sequence[Experts], spare: Stream
) -> str | None:
    """Passes more sequences through the block, for experts that saw fewer tokens than they should.

    Only the matrices of these experts see them, and only until they have enough: all others stay as they were.

    Args:
        run: The run.
        statistics: What was collected over all processes, and is added to.
        plan: The block's weights.
        block: The block on the device.
        places: Its experts.
        spare: What enters it of these sequences.

    Returns:
        A line on what was needed; None where nothing was.
    """
    least = run.model.start.experts.min_tokens
    assert least is not None
    lacked = _lacking(statistics, places, least)
    if not lacked:
        return None
    lacking, used = lacked, 0
    for part in slices(len(spare.hidden_NTD), sequences_at_once(spare.hidden_NTD.shape[1])):
        wanted = {matrix for place, number in lacking for matrix in places[place].parts[number]}
        seen = InputStatistics(list(plan.weights), run.device)
        _pass(run, seen, plan.index, block, spare, part, None, wanted)
        _reduce(run, seen, block)
        statistics.join(seen)
        used += (part.stop - part.start) * run.ranks.world
        lacking = _lacking(statistics, places, least)
        if not lacking:
            break
    watched = min(run.model.start.hessian_sequences, len(run.train_ids_NT) * run.ranks.world)
    line = f"{plan.name}: {len(lacked)} experts saw fewer than {least} tokens in {watched} sequences; with {used} more"
    if not lacking:
        return f"{line} none does"
    which = [f"{places[place].name} {number} ({tokens})" for (place, number), tokens in list(lacking.items())[:8]]
    rest = f" and {len(lacking) - 8} others" if len(lacking) > 8 else ""
    return (
        f"{line}, all there are, {len(lacking)} still do: {', '.join(which)}{rest}. More: "
        "--model.moe_max_extra_sequences, as far as the text goes"
    )


def _lacking(statistics: InputStatistics, places: Sequence[Experts], least: int) -> dict[tuple[int, int], int]:
    """Experts, by the number of their place and their own, whose matrices saw fewer tokens than that, and how many."""
    seen = {
        (index, number): max(int(statistics.alive.get(part, 0)) for part in parts)
        for index, place in enumerate(places)
        for number, parts in enumerate(place.parts)
    }
    return {expert: tokens for expert, tokens in seen.items() if tokens < least}


def tokens_of_experts(statistics: InputStatistics, places: Sequence[Experts]) -> Sent:
    """How many tokens the router sent to each expert of each place, of the sequences that were watched for it.

    Modules of a list that all tokens take are no experts, and left out.

    Args:
        statistics: What was collected over all processes.
        places: The experts.
    """
    found: Sent = {}
    for place in places:
        counts = statistics.passed if statistics.passed else statistics.alive
        tokens = [max(int(counts.get(part, 0)) for part in parts) for parts in place.parts]
        if place.fused or len(set(tokens)) > 1:
            found[place.name] = tokens
    return found
