"""What a weight is for, from what its product goes into: routers, indexers, gates and inputs of state space models.

Nothing is matched by name. While a block runs, every tensor carries the weights whose products it was computed from
since the last product on its way. A product of which the largest entries are taken (``topk``) chooses something: an
expert, if one weight computes it, or tokens to attend to, if several do. One that goes through ``softplus`` is the
time step of a state space model or of gated linear attention. These are small, and a wrong choice costs more than they
save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_gsq.models.products import Product

ROUTER = "it chooses, as routers do"
INDEXER = "it is part of what chooses the tokens that attention sees"
GATE = "it has a handful of rows or columns, as gates have"
STATE = "it sets what a state space model or gated linear attention keeps: it goes through softplus, or feeds that"

_CHOICES = {torch.topk, Tensor.topk, torch.sort, Tensor.sort, torch.argsort, Tensor.argsort}
_LARGEST = {torch.argmax, Tensor.argmax, torch.max, Tensor.max}
"""A choice where one weight alone is behind it and where the position is used, not the value."""
_TIME_STEPS = {nn.functional.softplus}
_HALF = 0.5
HANDFUL = 8
"""Fewer rows or columns than this make a gate or a mixture of a few streams."""


class Roles:
    """Follows products through a run of a block, call by call (see ``ran`` of ``products.WatchProducts``)."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        """The role of a weight, by name, for those that have one."""
        self._behind: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._positions: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._sizes: dict[str, int] = {}
        self._narrowed: dict[str, set[str]] = {}
        """For each weight, those whose products its inputs are a part of."""

    def ran(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, products: list[Product]
    ) -> None:
        """Takes one function call."""
        tensors = list(tensors_in((args, tuple(kwargs.values()))))
        for tensor in tensors:
            self._note(self._positions.get(tensor, ()), ROUTER)
        behind: frozenset[str] = frozenset().union(*(self._behind.get(tensor, frozenset()) for tensor in tensors))
        if func in _CHOICES and behind:
            self._note(behind, ROUTER if len(behind) == 1 else INDEXER)
        elif func in _LARGEST and len(behind) == 1:
            for tensor in tensors_in((output,)):
                if not tensor.is_floating_point():
                    self._positions[tensor] = behind
        elif func in _TIME_STEPS and tensors:
            self._note([name for name in behind if tensors[0].numel() >= _HALF * self._sizes[name]], STATE)
        if products:
            behind = self._after_products(products, behind, output)
        if behind:
            for tensor in tensors_in((output,)):
                self._behind[tensor] = behind

    def _after_products(self, products: list[Product], behind: frozenset[str], output: Any) -> frozenset[str]:
        """What is behind the result of products with weights: these alone."""
        for product in products:
            narrow = {name for name in behind if product.inputs.numel() < self._sizes[name]}
            self._narrowed.setdefault(product.name, set()).update(narrow)
            if isinstance(output, Tensor):
                self._sizes[product.name] = output.numel()
        return frozenset(product.name for product in products)

    def _note(self, names: Any, role: str) -> None:
        for name in names:
            if role != STATE:
                self.of[name] = role  # also where the scores of a router go through softplus first
                continue
            for other in (name, *self._narrowed.get(name, ())):  # what its input is a part of counts as well
                self.of.setdefault(other, STATE)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among some values, and in tuples and lists of these."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
