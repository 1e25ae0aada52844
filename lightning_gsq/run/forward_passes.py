"""Hidden states on their way through the model, a block at a time, where nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import embed, run_block_giving
from lightning_gsq.models.expert_parallel import in_step, spread
from lightning_gsq.models.passing import Forms, arguments_from_ids
from lightning_gsq.run.hidden_states import ActivationOptions, ActivationStore, Stream
from lightning_gsq.run.run import Run
from lightning_gsq.system.slices import slices
from lightning_gsq.training.losses import refuse_non_finite

FORWARD_TOKENS = 4096
"""Tokens that pass through a block at once where nothing is trained."""


def sequences_at_once(length: int) -> int:
    """Sequences of ``length`` tokens that pass through a block at once."""
    return max(1, FORWARD_TOKENS // length)


def passes_of(hidden_NTD: Tensor) -> int:
    """In how many passes these sequences go through a block."""
    return -(-len(hidden_NTD) // sequences_at_once(hidden_NTD.shape[1]))


@contextmanager
def hidden_store(shape: tuple[int, int, int], options: ActivationOptions, streams: int) -> Iterator[ActivationStore]:
    """Room for hidden states ``N T D``, given back at the end."""
    store = ActivationStore(shape, options, streams)
    try:
        yield store
    finally:
        store.close()


def put(hidden_BTD: Tensor, out_BTD: Tensor, where: str) -> None:
    """Writes hidden states into ``out``, in its dtype.

    Args:
        hidden_BTD: Hidden states as they were computed.
        out_BTD: Where they are kept.
        where: Which they are, for the message: what follows "the hidden states that".

    Raises:
        NonFiniteLossError: they are not finite.
        ConfigurationError: they do not fit into that dtype.
    """
    largest = float(hidden_BTD.detach().abs().amax()) if hidden_BTD.numel() else 0.0
    refuse_non_finite(
        largest,
        f"the largest of the hidden states that {where}",
        "a weight of the model is not finite, or its activations overflow: see --model.dtype and --trainer.precision",
    )
    if largest > torch.finfo(out_BTD.dtype).max:
        raise ConfigurationError(
            f"activations.dtype: the hidden states that {where} reach {largest:.3g}, more than "
            f"{str(out_BTD.dtype).removeprefix('torch.')} holds; use --activations.dtype bfloat16 or float32"
        )
    out_BTD.copy_(hidden_BTD.to(out_BTD))


def embedded(network: PreTrainedModel, ids_NT: Tensor, store: ActivationStore) -> Stream:
    """A stream at the first block; errors as of :func:`put`."""
    stream = Stream(ids_NT, store.new(), store)
    for part in slices(len(ids_NT), sequences_at_once(ids_NT.shape[1])):
        put(embed(network, ids_NT[part]), stream.hidden_NTD[part], "enter the first block")
    return stream


def arguments_of(network: PreTrainedModel, forms: Forms, call: BlockCall, index: int, stream: Stream) -> list[Tensor]:
    """What the ``index``-th block is called with for each sequence, in the order of ``call.bound``, sequences first.

    Args:
        network: The model, on the host, in any state of its blocks: they do not run.
        forms: What its blocks return.
        call: The block's call.
        index: The block's number.
        stream: The sequences, at that block.
    """
    tensors: list[Tensor] = []
    if call.from_ids:
        for part in slices(len(stream.ids_NT), sequences_at_once(stream.ids_NT.shape[1])):
            computed = arguments_from_ids(network, forms, stream.ids_NT[part], index, call)
            tensors = tensors or [stream.store.room_for(tensor) for tensor in computed]
            for tensor, values in zip(tensors, computed, strict=True):
                tensor[part] = values.to(tensor.dtype)
    return [*tensors, *(stream.beside[name] for name in call.from_blocks)]


@torch.no_grad()
def pass_through(
    run_block: Callable[[Tensor, list[Tensor]], tuple[Tensor, dict[str, Tensor]]],
    arguments: Sequence[Tensor],
    source: Stream,
    out: Stream,
    needed: Collection[str],
    index: int,
) -> torch.dtype:
    """Runs a block over a stream, some sequences at a time; ``out`` may be ``source``.

    Args:
        run_block: From hidden states and arguments as they are stored to what leaves the block and what it gives.
        arguments: What it is called with for each sequence.
        source: What enters it.
        out: Filled with what leaves it.
        needed: Names of what blocks after it take from blocks before them.
        index: The block's number, for messages.

    Returns:
        The dtype that the block computed in.

    Raises:
        NonFiniteLossError: what leaves it is not finite.
        ConfigurationError: it does not fit into the dtype of ``out``.
    """
    dtype, beside = source.hidden_NTD.dtype, dict(source.beside)
    for part in slices(len(source.hidden_NTD), sequences_at_once(source.hidden_NTD.shape[1])):
        output_BTD, given = run_block(source.hidden_NTD[part], [tensor[part] for tensor in arguments])
        put(output_BTD, out.hidden_NTD[part], f"leave block {index}")
        dtype = output_BTD.dtype
        for name, tensor in given.items():
            if part.start == 0:
                beside[name] = source.store.room_for(tensor)
            beside[name][part] = tensor.to(beside[name])
    out.beside = {name: tensor for name, tensor in beside.items() if name in needed}
    return dtype


def propagate(run: Run, block: nn.Module, index: int, source: Stream, out: Stream) -> None:
    """Runs the ``index``-th block of a run over a stream, on the device, in fp32; ``out`` may be ``source``."""
    call = run.calls[index].to(run.device)

    def through(hidden_BTD: Tensor, tensors: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_BTD, bound = fetch(run, hidden_BTD), call.bind(tensors, torch.float32)
        if call.gives:
            return run_block_giving(block, hidden_BTD, bound)
        return run.run_block(block, hidden_BTD, bound), {}

    with run.watch("streams"), run.precision():
        arguments = arguments_of(run.model.network, run.forms, call, index, source)
        with torch.no_grad(), in_step(block, passes_of(source.hidden_NTD)):
            pass_through(through, arguments, source, out, needed_after(run.calls, index), index)


def needed_after(calls: Sequence[BlockCall], index: int) -> set[str]:
    """Names of what the blocks after one take from it and those before it."""
    return {name for call in calls[index + 1 :] for name in call.from_blocks}


def fetch(run: Run, hidden_BTD: Tensor) -> Tensor:
    """Hidden states on the device, fp32."""
    return hidden_BTD.to(run.device, torch.float32)


def working_copy(run: Run, index: int) -> nn.Module:
    """A block on the device in fp32, or this process's part of it; the model itself stays where it is."""
    if run.exchange is not None:
        return spread(run.blocks[index], run.exchange, run.device, torch.float32)
    return copy.deepcopy(run.blocks[index]).to(run.device, torch.float32)
