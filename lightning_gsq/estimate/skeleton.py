"""A model's structure from its configuration alone: sizes, blocks, linear weights; no weight is loaded or stored.

The model is built on the meta device. To find the linear weights, its blocks have to run once (as
``models/linear_weights.py`` says), and some cannot on the meta device (masks and routers look at values). So everything
else of the model, and each block of a structure not seen before, gets zeros on the CPU that take no memory until
written to; a block whose structure is known only passes its predecessor's output on.
"""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_gsq.models import loading
from lightning_gsq.models.calls import BlockCall, leaves, with_containers
from lightning_gsq.models.chain import Reached, check_count, find_blocks, fitting, running, split_hidden
from lightning_gsq.models.empty import empty_model
from lightning_gsq.models.linear_weights import LinearSite, find_all_sites
from lightning_gsq.models.probe import probe_ids


@dataclass(frozen=True, eq=False)
class BlockSkeleton:
    """One block; another of equal parts is another one.

    Args:
        module: The block, on the meta device.
        sites: Its linear weights, those that are left out as well.
        call: How the model calls it, for the tokens of :func:`probe_ids`.
    """

    module: nn.Module
    sites: list[LinearSite]
    call: BlockCall

    @property
    def parameters(self) -> int:
        """Parameters of the block."""
        return sum(p.numel() for p in self.module.parameters())


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights.

    Args:
        model: The model on the meta device.
        prefix: Name of the list of blocks, such as ``model.layers``.
        blocks: The blocks.
        dtype: Dtype the weights are loaded in.
        width: Features of the hidden states, ``D``.
        vocabulary: Rows of the head.
    """

    model: PreTrainedModel
    prefix: str
    blocks: list[BlockSkeleton]
    dtype: torch.dtype
    width: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


def make_skeleton(source: loading.ModelSource, config: PretrainedConfig, dtype: loading.Dtype) -> Skeleton:
    """Builds the skeleton of the model with this configuration.

    Raises:
        ConfigurationError: the architecture is no chain of blocks.
    """
    loaded_as = _dtype(config, dtype, source.gguf_file is not None)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    model = empty_model(source, config, loaded_as)
    prefix, blocks = find_blocks(model)
    watched = _watch(copy.deepcopy(model), len(blocks))
    head = model.get_output_embeddings()
    vocabulary = int(head.weight.shape[0]) if head is not None else int(config.get_text_config().vocab_size)
    parts = [BlockSkeleton(block, sites, call) for block, (sites, call, _) in zip(blocks, watched, strict=True)]
    return Skeleton(model, prefix, parts, loaded_as, watched[0][2], vocabulary)


def _dtype(config: PretrainedConfig, dtype: loading.Dtype, is_gguf: bool) -> torch.dtype:
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    stated = getattr(config, "dtype", None)
    return torch.float32 if is_gguf or stated is None else stated


def zeros_on_cpu(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written to, and may be more than there is."""
    size = max(1, math.prod(shape)) * dtype.itemsize
    octets = torch.from_numpy(np.frombuffer(mmap.mmap(-1, size, **_UNRESERVED), np.uint8))
    return octets.view(dtype)[: math.prod(shape)].view(shape)


_UNRESERVED = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000} if sys.platform == "linux" else {}
"""Linux refuses a mapping larger than its memory unless it is told not to reserve any (MAP_NORESERVE)."""


def _zeros_like(tensor: Tensor) -> Tensor:
    return zeros_on_cpu(tensor.shape, tensor.dtype)


def _watch(model: PreTrainedModel, depth: int) -> list[tuple[list[LinearSite], BlockCall, int]]:
    """Sites, call and input width of every block; ``model`` is used up."""
    blocks = find_blocks(model)[1]
    seen: dict[Any, tuple[list[LinearSite], BlockCall, Any]] = {}
    watched: list[tuple[list[LinearSite], BlockCall, int]] = []
    writes: list[nn.Module] = []
    """Blocks that leave something for others in what they are called with: then all have to run."""

    def instead_of(block: nn.Module) -> Any:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_BTD, call = split_hidden(args, kwargs, ids_BT)
            signature = (type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
            if signature not in seen or writes:
                outputs: list[Any] = []
                block._apply(_zeros_like)
                before = _count(kwargs)
                call = fitting(block, hidden_BTD, with_containers(call))
                sites = find_all_sites(block, lambda: outputs.append(original(*args, **kwargs)))
                seen[signature] = sites, call, outputs[0]
                block.to("meta")
                writes.extend([block] if _count(kwargs) > before else [])
            sites, fitted, output = seen[signature]
            call = replace(call, repeated=fitted.repeated)
            watched.append((sites, call, int(hidden_BTD.shape[-1])))
            if len(watched) == depth:
                raise Reached
            return output

        return forward

    inside = {id(p) for p in blocks.parameters()} | {id(b) for b in blocks.buffers()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in inside:
                module._parameters[name] = nn.Parameter(_zeros_like(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in inside:
                module._buffers[name] = _zeros_like(buffer)
    ids_BT = probe_ids(model)  # on the device of the embedding, which is the CPU by now
    for block in blocks:
        block.forward = instead_of(block)
    with torch.no_grad(), contextlib.suppress(Reached), running(model, "on a few tokens"):
        model(ids_BT, use_cache=False)
    check_count(model, depth, len(watched))
    return watched


def _count(kwargs: dict[str, Any]) -> int:
    return sum(1 for _ in leaves(kwargs))
