"""How much memory a block's activations take, by running it on tensors without content.

A forward and a backward pass run under ``FakeTensorMode``: shapes and dtypes only, whatever the block's size, on any
machine. A dispatch mode counts the bytes of every storage from its first sight until it is freed; the peak, less the
weights, is what activations and temporaries take, the gradient of one weight at a time included.

Experts get equal shares of the tokens (:mod:`lightning_gsq.estimate.experts`). A block that looks at values in another
way cannot run so. It runs on real zeros instead, on few tokens, and the peak is extrapolated linearly.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lightning_gsq.estimate.experts import equal_shares, most_experts, thinner
from lightning_gsq.estimate.skeleton import BlockSkeleton, zeros_on_cpu
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import run_block
from lightning_gsq.models.probe import PROBE_TOKENS

FEW_TOKENS = (64, 128)
FEW_EXPERTS = (8, 16)
"""Of hundreds of experts so many run; what they take grows linearly with their number, all with the same tokens."""
PASSES = 64
"""Passes that are remembered: a run that does not fit is counted again with every option that may make it fit."""


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages seen and not freed yet; ``peak`` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, output)
        return output

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@dataclass(frozen=True)
class PassBytes:
    """Bytes of activations and temporaries of one pass through a block.

    Args:
        peak: The most there are at once.
        kept: What stays for the backward pass when the forward pass ends; 0 without one.
    """

    peak: int
    kept: int


@functools.lru_cache(maxsize=PASSES)
def activation_bytes(
    block: BlockSkeleton,
    width: int,
    batch: int,
    tokens: int,
    bf16: bool,
    training: bool,
    narrow: frozenset[str] = frozenset(),
) -> PassBytes:
    """Memory of one pass beside the weights; of the last passes asked for it is known.

    Args:
        block: The block.
        width: Features of the hidden states.
        batch: Sequences.
        tokens: Tokens of a sequence.
        bf16: Matrix products in bfloat16 (autocast).
        training: With a backward pass to the weights; otherwise a forward pass without gradients.
        narrow: Names of weights that come in bfloat16, as samples of bfloat16 logits do under autocast.
    """
    run = functools.partial(_run, width=width, bf16=bf16, training=training, narrow=narrow)
    if (experts := most_experts(block.module)) > FEW_EXPERTS[1]:
        few, more = (
            activation_bytes(
                replace(block, module=thinner(block.module, count)), width, batch, tokens, bf16, training, narrow
            )
            for count in FEW_EXPERTS
        )
        return _further(few, more, (experts - FEW_EXPERTS[0]) / (FEW_EXPERTS[1] - FEW_EXPERTS[0]))
    try:
        with FakeTensorMode(), equal_shares(block.module):
            return run(block, torch.empty, batch=batch, tokens=tokens)
    except (DataDependentOutputException, DynamicOutputShapeException):
        few, more = (run(block, zeros_on_cpu, batch=1, tokens=count) for count in FEW_TOKENS)
        further = (batch * tokens - FEW_TOKENS[0]) / (FEW_TOKENS[1] - FEW_TOKENS[0])
        return _further(few, more, further)


def _further(few: PassBytes, more: PassBytes, further: float) -> PassBytes:
    """What two passes say of a larger one that is so many times their difference away from the first."""
    return PassBytes(
        max(few.peak, int(few.peak + further * (more.peak - few.peak))),
        max(few.kept, int(few.kept + further * (more.kept - few.kept))),
    )


def _run(
    block: BlockSkeleton,
    make: Callable[..., Tensor],
    width: int,
    batch: int,
    tokens: int,
    bf16: bool,
    training: bool,
    narrow: Collection[str] = (),
) -> PassBytes:
    def fp32(tensor: Tensor, name: str = "") -> Tensor:
        dtype = torch.bfloat16 if name in narrow else torch.float32
        return make(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)

    weights = {name: fp32(p, name).requires_grad_(training) for name, p in block.module.named_parameters()}
    buffers = {name: fp32(b) for name, b in block.module.named_buffers()}
    call = longer(block.call, tokens)
    hidden, target = (make(torch.Size([batch, tokens, width]), dtype=torch.float32) for _ in range(2))
    live = _LiveBytes()
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with live, torch.set_grad_enabled(training), autocast:
        for tensor in (*weights.values(), *buffers.values(), hidden, target):
            live.add(tensor)
            if tensor.requires_grad:  # the sampling op takes each weight's gradient as soon as it is there
                tensor.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        before = live.peak = live.live
        output = run_block(block.module, hidden, call, weights | buffers)
        kept = live.live - before if training else 0
        if training:
            nn.functional.mse_loss(output.float(), target).backward()
    return PassBytes(live.peak - before, kept)


def longer(call: BlockCall, tokens: int) -> BlockCall:
    """The call, recorded for a few tokens, for another number of them; the values are zeros."""

    def resize(_: str, value: Tensor) -> Tensor:
        return torch.zeros([tokens if size == PROBE_TOKENS else size for size in value.shape], dtype=value.dtype)

    return call.mapped(resize)
