"""Hidden states on their way through the model, a block at a time, where nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import embed
from lightning_gsq.run.hidden_states import ActivationOptions, ActivationStore
from lightning_gsq.run.run import Run
from lightning_gsq.system.slices import slices
from lightning_gsq.training.losses import refuse_non_finite

FORWARD_TOKENS = 4096
"""Tokens that pass through a block at once where nothing is trained."""


def sequences_at_once(length: int) -> int:
    """Sequences of ``length`` tokens that pass through a block at once."""
    return max(1, FORWARD_TOKENS // length)


@contextmanager
def hidden_store(shape: tuple[int, int, int], options: ActivationOptions, streams: int) -> Iterator[ActivationStore]:
    """Room for hidden states ``N T D``, given back at the end."""
    store = ActivationStore(shape, options, streams)
    try:
        yield store
    finally:
        store.close()


def embed_all(network: PreTrainedModel, ids_NT: Tensor, out_NTD: Tensor) -> None:
    """Fills ``out`` with what enters the first block.

    Raises:
        NonFiniteLossError: it is not finite.
        ConfigurationError: it does not fit into the dtype of ``out``.
    """
    for part in slices(len(ids_NT), sequences_at_once(ids_NT.shape[1])):
        put(embed(network, ids_NT[part]), out_NTD[part], "enter the first block")


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


@torch.no_grad()
def pass_through(run_block: Callable[[Tensor], Tensor], source_NTD: Tensor, out_NTD: Tensor, index: int) -> torch.dtype:
    """Runs a block over a stream, some sequences at a time; ``out`` may be ``source``.

    Args:
        run_block: From hidden states as they are stored to what leaves the block.
        source_NTD: What enters it.
        out_NTD: Filled with what leaves it.
        index: The block's number, for messages.

    Returns:
        The dtype that the block computed in.

    Raises:
        NonFiniteLossError: what leaves it is not finite.
        ConfigurationError: it does not fit into the dtype of ``out``.
    """
    dtype = source_NTD.dtype
    for part in slices(len(source_NTD), sequences_at_once(source_NTD.shape[1])):
        output_BTD = run_block(source_NTD[part])
        put(output_BTD, out_NTD[part], f"leave block {index}")
        dtype = output_BTD.dtype
    return dtype


def propagate(run: Run, block: nn.Module, index: int, source_NTD: Tensor, out_NTD: Tensor) -> None:
    """Runs the ``index``-th block of a run over a stream, on the device, in fp32; ``out`` may be ``source``."""
    call = run.calls[index].to(run.device)
    with run.watch("streams"), run.precision():
        pass_through(lambda hidden: run.run_block(block, fetch(run, hidden), call), source_NTD, out_NTD, index)


def fetch(run: Run, hidden_BTD: Tensor) -> Tensor:
    """Hidden states on the device, fp32."""
    return hidden_BTD.to(run.device, torch.float32)


def working_copy(run: Run, index: int) -> nn.Module:
    """A block on the device in fp32; the model itself stays where it is."""
    return copy.deepcopy(run.blocks[index]).to(run.device, torch.float32)
