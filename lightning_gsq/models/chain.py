"""Any Hugging Face causal decoder as a chain: embedding, blocks, head.

No model family is known by name. The blocks are a ``ModuleList`` with one entry per hidden layer; what each is called
with beside the hidden states is recorded from a real forward pass, and before anything long starts
:mod:`lightning_gsq.models.survey` finds out which of that belongs to its sequence and verifies that the blocks, run
one after another in this way, compute what the model computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.calls import BlockCall, Layout, with_containers
from lightning_gsq.system.compiling import compile_function


def run_block(
    block: nn.Module, hidden_BTD: Tensor, call: BlockCall, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """Runs one block.

    Args:
        block: The block, left unchanged.
        hidden_BTD: Its input.
        call: Its other arguments, bound to the sequences of the input.
        weights: Parameters to use in place of the block's own, by name.

    Returns:
        The new hidden states ``B T D``.
    """
    call = call.for_batch(len(hidden_BTD))
    if call.from_blocks or call.gives:
        call = with_containers(call)
    return call.layout.pack(hidden_of(_run(block, hidden_BTD, call, weights)))


def run_block_giving(
    block: nn.Module, hidden_BTD: Tensor, call: BlockCall, weights: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs one block like :func:`run_block`.

    Returns:
        The new hidden states, and what the block computes for blocks after it, by name, sequences first.
    """
    call = with_containers(call.for_batch(len(hidden_BTD)))
    output = _run(block, hidden_BTD, call, weights)
    return call.layout.pack(hidden_of(output)), call.given(output, call)


def _run(block: nn.Module, hidden_BTD: Tensor, call: BlockCall, weights: dict[str, Tensor] | None) -> Any:
    hidden = call.layout.unpack(hidden_BTD)
    inputs = (hidden, *call.args) if call.keyword is None else call.args
    kwargs = call.kwargs if call.keyword is None else {call.keyword: hidden, **call.kwargs}
    if weights is None:
        return block(*inputs, **kwargs)
    return torch.func.functional_call(block, weights, inputs, kwargs)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    first: Any = output
    if isinstance(output, (tuple, list)):
        first = output[0]
    elif isinstance(output, Mapping):
        first = output.get("hidden_states", next(iter(output.values())))
    if not isinstance(first, Tensor):
        raise ConfigurationError(
            f"model: a block returns a {type(output).__name__} that does not begin with its hidden states"
        )
    return first


BlockRunner = Callable[..., Tensor]
"""A function with the arguments and the result of :func:`run_block`."""


@functools.cache
def compiled_run_block() -> BlockRunner:
    """:func:`run_block` through ``torch.compile``: one graph serves all blocks of a kind and all batch sizes.

    Elementwise work (norms, rotary embedding, gates, casts) becomes a few loops, which takes about a quarter off a
    block's time on a CPU. The batch dimension is marked dynamic from the first call on, so that what is compiled, and
    with it every bit of a result, does not depend on which sizes came first. A block that exchanges more than hidden
    states with others is not compiled.
    """
    compiled = compile_function(run_block)

    def run(block: nn.Module, hidden_BTD: Tensor, call: BlockCall, weights: dict[str, Tensor] | None = None) -> Tensor:
        if call.from_blocks or call.gives:
            return run_block(block, hidden_BTD, call, weights)
        torch._dynamo.maybe_mark_dynamic(hidden_BTD, 0)
        return compiled(block, hidden_BTD, call, weights)

    return run


DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks", "decoder_layers")
"""Where a configuration says how many blocks there are."""


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks: the ``ModuleList`` with one module per hidden layer and the most parameters.

    Returns:
        Its name in the model, such as ``model.layers``, and the list.

    Raises:
        ConfigurationError: there is none, or two of them share the model's parameters.
    """
    config = model.config.get_text_config(decoder=True)
    depths = [getattr(config, name) for name in DEPTHS if isinstance(getattr(config, name, None), int)]
    everything = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lengths = {len(module) for module in everything.values()}
    depth = next((depth for depth in depths if depth in lengths), depths[0] if depths else None)
    lists = {name: module for name, module in everything.items() if len(module) == depth}
    # A model that sees or hears has blocks for that, maybe as many; its class knows which part decodes text.
    decoding = {id(module) for module in _decoder(model).modules()}
    lists = {name: module for name, module in lists.items() if id(module) in decoding} or lists
    outermost = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outermost:
        raise ConfigurationError(
            f"model: {type(model).__name__} has no list of {depth} transformer blocks; only causal decoders built as "
            "one stack of blocks can be quantized"
        )
    name, *others = sorted(outermost, key=lambda name: outermost[name], reverse=True)
    if others and outermost[others[0]] > COMPARABLE * outermost[name]:
        raise ConfigurationError(
            f"model: {type(model).__name__} has two lists of {depth} blocks, {name} and {others[0]}; only causal "
            "decoders built as one stack of blocks can be quantized"
        )
    return name, lists[name]


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else model


COMPARABLE = 0.25
"""Share of the largest list's parameters above which another list of as many modules is a stack of blocks as well."""


class Reached(Exception):  # noqa: N818 - no error
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

    Raises:
        ConfigurationError: the model cannot be run on these tokens, or does not run each block once.
    """
    _, blocks = find_blocks(model)
    calls: list[BlockCall] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_BTD, call = split_hidden(args, kwargs, ids_BT)
        calls.append(with_containers(call))
        inputs.append(hidden_BTD.detach().clone())

    def after(_: nn.Module, __: Any, output: Any) -> None:
        hidden = hidden_of(output)
        outputs.append(Layout.of(hidden, ids_BT).pack(hidden))

    with ExitStack() as hooks, running(model, "on a few tokens"):
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(blocks[-1].register_forward_hook(after).remove)
        model(ids_BT, use_cache=False)
    check_count(model, len(blocks), len(calls))
    return Trace(calls, inputs, outputs[-1])


@torch.no_grad()
def fitting(block: nn.Module, hidden_BTD: Tensor, call: BlockCall) -> BlockCall:
    """The call with which a block takes several sequences: as it is, or with its tensors repeated for each.

    For sizes alone: an argument that belongs to its sequence is repeated as well.

    Args:
        block: The block.
        hidden_BTD: Any input of one sequence.
        call: Its call for that.
    """
    try:
        run_block(block, torch.cat([hidden_BTD, hidden_BTD]), call)
    except (RuntimeError, ValueError, TypeError, IndexError):  # shapes that do not broadcast, or a check of shapes
        return call.repeating()
    return call


def check_count(model: PreTrainedModel, blocks: int, calls: int) -> None:
    """Refuses a model that does not run each block once.

    Raises:
        ConfigurationError: it does not.
    """
    if calls != blocks:
        raise ConfigurationError(
            f"model: {type(model).__name__} called its {blocks} blocks {calls} times in one forward pass; "
            "only models that run each block once can be quantized block by block"
        )


@contextmanager
def running(model: PreTrainedModel, how: str) -> Iterator[None]:
    """Whatever a model's code raises on a short sequence, as a refusal with that as its cause.

    Raises:
        ConfigurationError: something was raised.
    """
    try:
        yield
    except (Reached, ConfigurationError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's code may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigurationError(
            f"model: {type(model).__name__} cannot be run {how}: {type(error).__name__}: {reason}"
        ) from error


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], ids_BT: Tensor) -> tuple[Tensor, BlockCall]:
    """Separates the hidden states from a block's other arguments, without the key-value cache.

    Args:
        args: Positional arguments of the block.
        kwargs: Keyword arguments.
        ids_BT: The token ids that the hidden states belong to, or any tensor of their shape.

    Returns:
        The hidden states ``B T D``, and the rest.

    Raises:
        ConfigurationError: there are no hidden states among them.
    """
    others = {key: value for key, value in kwargs.items() if key not in _CACHE_ARGUMENTS}
    keyword = None if args else next((key for key, value in others.items() if isinstance(value, Tensor)), None)
    keyword = "hidden_states" if "hidden_states" in others else keyword
    hidden: Any = others.pop(keyword) if keyword else args[0] if args else None
    if not isinstance(hidden, Tensor):
        raise ConfigurationError("model: its blocks are called without hidden states")
    layout = Layout.of(hidden, ids_BT)
    return layout.pack(hidden), BlockCall(args if keyword else args[1:], others, layout, keyword)


_CACHE_ARGUMENTS = {"past_key_values", "past_key_value", "layer_past", "use_cache", "cache_position", "cache_params"}


@torch.no_grad()
def embed(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """The input of the first block, ``B T D``."""
    _, blocks = find_blocks(model)
    inputs: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(split_hidden(args, kwargs, ids_BT)[0])
        raise Reached

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    with ExitStack() as hooks, suppress(Reached):
        hooks.callback(handle.remove)
        model(ids_BT, use_cache=False)
    return inputs[0]
