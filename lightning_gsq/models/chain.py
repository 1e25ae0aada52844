"""Any Hugging Face causal decoder as a chain: embedding, blocks, head.

No model family is known by name. The blocks are the longest ``ModuleList`` with one entry per hidden layer; what
each block is called with beside the hidden states (masks, rotary embeddings) is recorded from one real forward
pass; and before anything long starts, :func:`check_chain` verifies that running the blocks one after another in
this way gives exactly what the model computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.compiling import compile_function


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside the hidden states; tensors have a batch of one and broadcast."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> BlockCall:
        """A copy on ``device``."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return BlockCall(tree_map(move, self.args), tree_map(move, self.kwargs))


def run_block(
    block: nn.Module, hidden_BTD: Tensor, call: BlockCall, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """Runs one block.

    Args:
        block: The block, left unchanged.
        hidden_BTD: Its input.
        call: Its other arguments.
        weights: Parameters to use in place of the block's own, by name.

    Returns:
        The new hidden states ``B T D``.
    """
    inputs = (hidden_BTD, *call.args)
    if weights is None:
        output = block(*inputs, **call.kwargs)
    else:
        output = torch.func.functional_call(block, weights, inputs, call.kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


BlockRunner = Callable[..., Tensor]
"""A function with the arguments and the result of :func:`run_block`."""


@functools.cache
def compiled_run_block() -> BlockRunner:
    """:func:`run_block` through ``torch.compile``: one graph serves all blocks of a kind and all batch sizes.

    Elementwise work (norms, rotary embedding, gates, casts) becomes a few loops, which takes about a quarter off a
    block's time on a CPU. The batch dimension is marked dynamic from the first call on, so that what is compiled, and
    with it every bit of a result, does not depend on which sizes came first.
    """
    compiled = compile_function(run_block)

    def run(block: nn.Module, hidden_BTD: Tensor, call: BlockCall, weights: dict[str, Tensor] | None = None) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(hidden_BTD, 0)
        return compiled(block, hidden_BTD, call, weights)

    return run


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks: the ``ModuleList`` with one module per hidden layer and the most parameters.

    Returns:
        Its name in the model, such as ``model.layers``, and the list.

    Raises:
        ConfigurationError: there is none.
    """
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise ConfigurationError(
            f"model: {type(model).__name__} has no list of {depth} transformer blocks; only causal decoders built as "
            "one stack of blocks can be quantized"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


class _Stop(Exception):  # noqa: N818 - no error
    """Ends a forward pass as soon as what was wanted has been recorded."""


@dataclass(frozen=True)
class Trace:
    """One real forward pass: what every block was called with, and its inputs and outputs.

    Args:
        calls: One a block.
        inputs_BTD: One a block.
        output_BTD: The last block's output.
    """

    calls: list[BlockCall]
    inputs_BTD: list[Tensor]
    output_BTD: Tensor


@torch.no_grad()
def trace(model: PreTrainedModel, ids_BT: Tensor) -> Trace:
    """Runs the model once and records how it calls its blocks.

    Args:
        model: The model.
        ids_BT: Token ids, ``B = 1`` so that masks broadcast over any batch.
    """
    _, blocks = find_blocks(model)
    calls: list[BlockCall] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, rest, others = split_hidden(args, kwargs)
        calls.append(BlockCall(rest, others))
        inputs.append(hidden.detach().clone())

    def after(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(blocks[-1].register_forward_hook(after).remove)
        model(ids_BT, use_cache=False)
    if len(calls) != len(blocks):
        raise ConfigurationError(
            f"model: {type(model).__name__} called its {len(blocks)} blocks {len(calls)} times in one forward pass; "
            "only models that run each block once can be quantized block by block"
        )
    return Trace(calls, inputs, outputs[-1])


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separates the hidden states from a block's other arguments, without the key-value cache."""
    others = {key: value for key, value in kwargs.items() if key not in _CACHE_ARGUMENTS}
    if "hidden_states" in others:
        return others.pop("hidden_states"), args, others
    return args[0], args[1:], others


_CACHE_ARGUMENTS = {"past_key_values", "past_key_value", "layer_past", "use_cache", "cache_position"}


@torch.no_grad()
def check_chain(model: PreTrainedModel, traced: Trace) -> None:
    """Verifies that the recorded calls, run block by block, reproduce the model's own forward pass.

    Raises:
        ConfigurationError: they do not, because something other than the hidden states passes between the blocks.
    """
    _, blocks = find_blocks(model)
    expected = [*traced.inputs_BTD[1:], traced.output_BTD]
    for index, (block, call, hidden, target) in enumerate(
        zip(blocks, traced.calls, traced.inputs_BTD, expected, strict=True)
    ):
        twice = run_block(block, torch.cat([hidden, hidden]), call)
        error = max(float((part - target[0]).abs().max()) for part in twice)
        if not error <= 1e-2 * float(target.abs().max()):
            raise ConfigurationError(
                f"model: block {index} of {type(model).__name__}, run alone, differs from the model by {error:.3g}: "
                "something other than the hidden states passes between its blocks, which cannot be quantized block "
                "by block"
            )


@torch.no_grad()
def embed(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """The input of the first block, ``B T D``."""
    _, blocks = find_blocks(model)
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(split_hidden(args, kwargs)[0])
        raise _Stop

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(ids_BT, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]
