"""Every token through every routed expert, beside what a block computes.

A module that gets hidden states, the numbers of the experts chosen for each token and their weights (``N D``, ``N K``,
``N K``, as positions or by name) is called once more with all numbers. Experts in a list are called with what enters
the module around the list, if that is where their tokens come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gsq.models.experts import Experts

Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def all_experts(
    block: nn.Module, places: Sequence[Experts], watching: Callable[[], AbstractContextManager[None]]
) -> Iterator[dict[str, int]]:
    """While active, each run of a block is followed by one of its experts on all of its tokens.

    Args:
        block: The block, run as a module; what it gives stays as it is.
        places: Its experts.
        watching: Makes a context for these further runs.

    Yields:
        How many tokens went through all experts of each place; a place is missing where its experts cannot be reached.
    """
    calls: dict[str, list[Call]] = {}
    sent: dict[str, int] = {}
    modules = dict(block.named_modules())

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: calls.setdefault(name, []).append((args, kwargs))

    def further(*_: Any) -> None:
        seen = {name: tuple(own) for name, own in calls.items()}  # the runs to come are noted as well
        for place in places:
            count = 0
            with torch.no_grad(), watching():
                for name in _around(place):  # the nearest module that is told which experts are chosen
                    count = sum(_send(modules, place, name, call) for call in seen.get(name, []))
                    if count:
                        break
            if count:
                sent[place.name] = sent.get(place.name, 0) + count
        calls.clear()

    with ExitStack() as hooks:
        for name in dict.fromkeys(name for place in places for name in _around(place)):
            hooks.callback(modules[name].register_forward_pre_hook(note(name), with_kwargs=True).remove)
        hooks.callback(block.register_forward_hook(further).remove)
        yield sent


def _around(place: Experts) -> list[str]:
    """Names of the modules that may be called with what the experts need, the nearest first; the block is none."""
    name = place.name if place.fused else place.name.rpartition(".")[0]
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)][: None if place.fused else 1]


def _send(modules: Mapping[str, nn.Module], place: Experts, name: str, call: Call) -> int:
    """Sends the tokens of one call through all experts; gives their number, 0 where the call is of another form."""
    args, kwargs = call
    if not place.fused:
        x_ND = _hidden(args, kwargs)[0]
        for number in range(len(place)):
            modules[f"{place.name}.{number}"](x_ND)
        return len(x_ND)
    values: dict[Any, Any] = dict(enumerate(args)) | kwargs
    found = _routing(values)
    if found is None:
        return 0
    chosen, weights = found
    count, experts = len(values[chosen]), len(place)
    values[chosen] = torch.arange(experts, device=values[chosen].device).to(values[chosen].dtype).repeat(count, 1)
    values[weights] = values[weights].new_full((count, experts), 1 / experts)
    modules[name](*(values[i] for i in range(len(args))), **{key: values[key] for key in kwargs})
    return count


def _routing(values: Mapping[Any, Any]) -> tuple[Any, Any] | None:
    """Where the experts' numbers and weights stand among a call's arguments; None where there are none."""
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor) and value.ndim > 1}
    hidden = next((value for value in tensors.values() if value.is_floating_point()), None)
    for chosen, value in tensors.items():
        if value.ndim != 2 or value.dtype not in (torch.int64, torch.int32) or hidden is None:
            continue
        for weights, other in tensors.items():
            tokens = hidden.numel() // hidden.shape[-1] == len(value)
            if other is not hidden and other.is_floating_point() and other.shape == value.shape and tokens:
                return chosen, weights
    return None


@torch.no_grad()
def unreachable(block: nn.Module, places: Sequence[Experts], run: Callable[[], Any]) -> str | None:
    """Why tokens cannot be sent to all experts of a block; None where they can.

    Args:
        block: The block.
        places: Its experts.
        run: Runs the block once on any input.
    """
    listed = [place for place in places if not place.fused]
    names = [f"{place.name}.{number}" for place in listed for number in range(len(place))]
    entered: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for name in dict.fromkeys([*names, *(around for place in listed for around in _around(place))]):

            def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                entered.setdefault(name, []).extend(_hidden(args, kwargs))

            hooks.callback(block.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True).remove)
        run()
    for place in listed:
        rows = [x_ND for name in _around(place) for x_ND in entered.get(name, [])]
        of_experts = [x_ND for number in range(len(place)) for x_ND in entered.get(f"{place.name}.{number}", [])]
        if not all(any(_inside(x_ND, others_ND) for others_ND in rows) for x_ND in of_experts):
            return f"the tokens of {place.name} are not those that enter the module around them"
    with all_experts(block, places, nullcontext) as sent:
        run()
    missing = [place.name for place in places if place.name not in sent]
    return f"{missing[0]} is not called with the numbers of the experts that are chosen" if missing else None


def _inside(x_ND: Tensor, others_ND: Tensor) -> bool:
    """Whether each row is one of the others."""
    same_width = x_ND.shape[-1] == others_ND.shape[-1]
    return same_width and bool((x_ND[:, None] == others_ND).all(-1).any(1).all())


def _hidden(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What a module is called with first, ``N D``; empty where that is no tensor of numbers."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1]
    return [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors[:1]]
