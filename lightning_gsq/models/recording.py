"""What enters some weights of a block in one run of it, and the sums that their outputs become a part of.

Attention and MLP end in a product whose result is added to the hidden states that go past them. Which weight that is,
and which sum, is seen while the block runs; nothing is matched by name. A product that a norm follows before the sum,
as in Gemma 3, has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_gsq.models.products import Product, WatchProducts
from lightning_gsq.models.roles import tensors_in

_SUMS = {Tensor.__add__, Tensor.__radd__, Tensor.add, torch.add}
_SAME = {Tensor.view, Tensor.reshape, Tensor.contiguous, Tensor.to, nn.functional.dropout}
"""What leaves the numbers of a result as they are, up to its shape and dtype."""


@dataclass
class Recording:
    """One run of a block.

    Args:
        inputs: What each weight was applied to, in the order of the products, ``... I``, by name.
        sums: What the result of a weight's only product and something else added up to, ``... O``, by name.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def of(self, names: Collection[str]) -> Recording:
        """What was seen of some of the weights."""
        return Recording(
            {name: inputs for name, inputs in self.inputs.items() if name in names},
            {name: result for name, result in self.sums.items() if name in names},
        )

    def to(self, device: torch.device) -> Recording:
        """The same on a device; what several weights share stays one tensor."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device)
            return moved[id(tensor)]

        inputs = {name: [move(tensor) for tensor in tensors] for name, tensors in self.inputs.items()}
        return Recording(inputs, {name: move(result) for name, result in self.sums.items()})

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        tensors = [*(tensor for inputs in self.inputs.values() for tensor in inputs), *self.sums.values()]
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


class _EnoughSeenError(Exception):
    """Ends a run of which nothing more is wanted."""


def record(
    block: nn.Module, run: Callable[[], Any], names: Collection[str], until: Recording | None = None
) -> Recording:
    """Watches some weights while a block runs.

    Args:
        block: The block.
        run: Runs it once.
        names: The weights.
        until: A run of the same block: this one ends as soon as everything was seen that was seen there. None runs it
            to its end.
    """
    seen, results, inside = Recording(), _Results(), set[str]()

    def product(p: Product) -> None:
        if p.name in names:
            seen.inputs.setdefault(p.name, []).append(p.inputs)

    def ran(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, products: list[Product]) -> None:
        for name, apart in results.summed(func, args, kwargs):
            if not apart or name in seen.sums:
                inside.add(name)
            else:
                seen.sums[name] = output
        results.ran(func, args, kwargs, output, [p.name for p in products if p.name in names])
        if until is not None and _as_much(seen, until):
            raise _EnoughSeenError

    with contextlib.suppress(_EnoughSeenError), WatchProducts(dict(block.named_parameters()), product, ran):
        run()
    wanted = {name for name, inputs in seen.inputs.items() if len(inputs) == 1} - inside
    if until is not None:
        wanted = set(until.sums)
    seen.sums = {name: result for name, result in seen.sums.items() if name in wanted}
    return seen


def _as_much(seen: Recording, wanted: Recording) -> bool:
    return seen.sums.keys() >= wanted.sums.keys() and all(
        len(seen.inputs.get(name, ())) >= len(inputs) for name, inputs in wanted.inputs.items()
    )


class _Results:
    """Results of products, and what was computed from them."""

    def __init__(self) -> None:
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._behind: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, own: list[str]) -> None:
        """Takes one function call, and the weights whose product it is."""
        behind = frozenset(own).union(*(self._behind.get(t, frozenset()) for t in tensors_in((args, *kwargs.values()))))
        for tensor in tensors_in((output,)) if behind else ():
            self._behind[tensor] = behind
        if own and isinstance(output, Tensor):
            self._of[output] = own[0]
        elif func in _SAME and isinstance(output, Tensor) and args[0] in self._of:
            self._of[output] = self._of[args[0]]

    def summed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        """The results among what a call adds up, by the weight, and whether the other summand is one of its own.

        Some activation functions add up what they computed from the same result.
        """
        if func not in _SUMS or kwargs or not all(isinstance(summand, Tensor) for summand in args[:2]):
            return
        left, right = args[:2]
        for result, other in ((left, right), (right, left)) if left.shape == right.shape else ():
            if result in self._of:
                name = self._of[result]
                yield name, name not in self._behind.get(other, ())
