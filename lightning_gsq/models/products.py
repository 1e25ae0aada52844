"""Matrix products with a parameter, seen while a block runs, however the block writes them.

``nn.functional.linear``, ``x @ W``, ``W @ x``, ``mm``, ``addmm``, ``bmm``, ``baddbmm`` and ``einsum`` all come down to
matrices and what they are applied to. A parameter is known by its memory: a view, a slice or a transpose of it lies
inside the addresses of the parameter.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Product:
    """One matrix applied to some vectors.

    Args:
        name: The parameter that the matrix lies in.
        offset: Where it begins there, in elements.
        matrix: The matrix as it was used, two-dimensional.
        inputs: What it was applied to, ``... I``.
        rows_are_outputs: The matrix is ``O I`` rather than ``I O``.
    """

    name: str
    offset: int
    matrix: Tensor
    inputs: Tensor
    rows_are_outputs: bool

    @property
    def out_features(self) -> int:
        """``O``."""
        return self.matrix.shape[0 if self.rows_are_outputs else 1]

    @property
    def transposed(self) -> bool:
        """The parameter stores ``I O``."""
        stored_as_seen = self.matrix.stride(1) == 1
        return stored_as_seen != self.rows_are_outputs

    @property
    def part(self) -> int:
        """The matrix's number among those of its size in the parameter."""
        return self.offset // max(1, self.matrix.numel())


class Parameters:
    """Parameters by address, to find the one that a tensor lies in.

    By address range, not by storage: a memory-mapped file is one storage for all its tensors.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        ranges = sorted(
            (p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in parameters.items() if p.ndim > 1 and p.numel()
        )
        self._starts, self._ranges = [start for start, _, _ in ranges], ranges
        self._itemsizes = {name: p.itemsize for name, p in parameters.items()}
        self._copies: list[tuple[Tensor, str, int]] = []

    def note_cast(self, tensor: Tensor, copy: Tensor) -> None:
        """A tensor in another dtype: routers are often multiplied with in fp32. It is kept, so that its address is."""
        place = self.place(tensor)
        if place is not None and tensor.is_contiguous() and copy.is_contiguous():
            self._copies.append((copy, *place))

    def place(self, tensor: Tensor) -> tuple[str, int] | None:
        """Name of the parameter that a tensor begins in, and where, in elements; None if it is in none."""
        address = tensor.data_ptr()
        for copy, name, offset in self._copies:
            if copy.data_ptr() <= address < copy.data_ptr() + copy.nbytes:
                return name, offset + (address - copy.data_ptr()) // copy.itemsize
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or not tensor.numel():
            return None
        start, end, name = self._ranges[index]
        return (name, (address - start) // self._itemsizes[name]) if address < end else None


Pair = tuple[Tensor, Tensor, bool]
"""Inputs ``... I``, matrix (of two dimensions, or of three for a batch of them), and whether the matrix is ``O I``."""


def _linear(inputs: Tensor, weight: Tensor, *_: Any) -> Iterator[Pair]:
    yield inputs, weight, True


def _matmul(left: Tensor, right: Tensor, *_: Any) -> Iterator[Pair]:
    yield left, right, False
    yield (right.transpose(-1, -2) if right.ndim > 1 else right[None]), left, True


def _added(_: Tensor, left: Tensor, right: Tensor, *__: Any) -> Iterator[Pair]:
    yield from _matmul(left, right)


def _reversed(right: Tensor, left: Tensor, *_: Any) -> Iterator[Pair]:
    yield from _matmul(left, right)


_PRODUCTS: dict[Any, tuple[Callable[..., Iterator[Pair]], tuple[str, ...]]] = {
    # function -> what it multiplies, and the names of its arguments
    nn.functional.linear: (_linear, ("input", "weight")),
    torch.addmm: (_added, ("input", "mat1", "mat2")),
    Tensor.addmm: (_added, ("input", "mat1", "mat2")),
    torch.baddbmm: (_added, ("input", "batch1", "batch2")),
    Tensor.baddbmm: (_added, ("input", "batch1", "batch2")),
    torch.mm: (_matmul, ("input", "mat2")),
    Tensor.mm: (_matmul, ("input", "mat2")),
    torch.bmm: (_matmul, ("input", "mat2")),
    Tensor.bmm: (_matmul, ("input", "mat2")),
    torch.mv: (_matmul, ("input", "vec")),
    Tensor.mv: (_matmul, ("input", "vec")),
    torch.matmul: (_matmul, ("input", "other")),
    Tensor.matmul: (_matmul, ("input", "other")),
    Tensor.__matmul__: (_matmul, ("input", "other")),
    Tensor.__rmatmul__: (_reversed, ("input", "other")),
}


def products_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], parameters: Parameters) -> list[Product]:
    """The products with a known parameter in one call of a function."""
    if func is torch.einsum or func is torch.functional.einsum:
        return _of_einsum(args, parameters)
    if func not in _PRODUCTS:
        return []
    form, names = _PRODUCTS[func]
    operands = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
    if not all(isinstance(operand, Tensor) for operand in operands[-2:]):
        return []
    products: list[Product] = []
    for inputs, matrix, rows_are_outputs in form(*operands):
        products += _single(inputs, matrix, rows_are_outputs, parameters)
    return products


def _single(inputs: Tensor, matrix: Tensor, rows_are_outputs: bool, parameters: Parameters) -> list[Product]:
    """A product, one matrix at a time."""
    place = parameters.place(matrix) if matrix.ndim in (2, 3) else None
    if place is None:
        return []
    if matrix.ndim == 2:
        return [Product(*place, matrix, inputs, rows_are_outputs)]
    if matrix.stride(0) == 0:  # one matrix, expanded
        return [Product(*place, matrix[0], inputs, rows_are_outputs)]
    apart = inputs.ndim > 2 and inputs.shape[-3] == len(matrix)
    return [
        Product(
            place[0],
            place[1] + number * matrix.stride(0),
            matrix[number],
            inputs.select(-3, number) if apart else inputs,
            rows_are_outputs,
        )
        for number in range(len(matrix))
    ]


def _of_einsum(args: tuple[Any, ...], parameters: Parameters) -> list[Product]:
    """Products written as ``einsum`` of two operands, one of them a parameter."""
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return []
    terms, result = equation.replace(" ", "").split("->")
    for weight, inputs, of_weight, of_inputs in zip(
        operands, operands[::-1], terms.split(","), terms.split(",")[::-1], strict=True
    ):
        place = parameters.place(weight)
        if place is not None and "..." not in of_weight:
            return _canonical(place, weight, inputs, of_weight, of_inputs, result)
    return []


def _canonical(
    place: tuple[str, int], weight: Tensor, inputs: Tensor, of_weight: str, of_inputs: str, result: str
) -> list[Product]:
    """The matrices ``O I`` of an ``einsum``: summed letters are inputs, others outputs, those in all three a batch."""
    head, _, tail = of_inputs.partition("...")
    position = dict(zip(head, range(len(head)), strict=True))
    position |= dict(zip(tail, range(inputs.ndim - len(tail), inputs.ndim), strict=True))
    batch = [x for x in of_weight if x in position and x in result]
    summed = [x for x in of_weight if x in position and x not in result]
    outputs = [x for x in of_weight if x not in position and x in result]
    if len(batch) > 1 or not summed or not outputs or len(batch) + len(summed) + len(outputs) != weight.ndim:
        return []
    parts = weight.permute([of_weight.index(x) for x in (*batch, *outputs, *summed)])
    first, last = ([position[x] for x in letters] for letters in (batch, summed))
    between = [d for d in range(inputs.ndim) if d not in (*first, *last)]
    vectors = inputs.permute(*first, *between, *last).flatten(-len(last))
    products = []
    for number, part in enumerate(parts if batch else parts[None]):
        matrix = part.flatten(0, len(outputs) - 1).flatten(1)
        if matrix.data_ptr() != part.data_ptr():
            return []  # a copy: the parameter's order is that of no matrix
        offset = place[1] + number * (parts.stride(0) if batch else 0)
        products.append(Product(place[0], offset, matrix, vectors[number] if batch else vectors, True))
    return products


_CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as}


class WatchProducts(TorchFunctionMode):
    """Calls ``seen`` for every product with one of the parameters, and ``ran`` for everything that runs.

    Args:
        parameters: The parameters, by name.
        seen: Takes each product.
        ran: Takes each function's arguments, its result and its products.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        seen: Callable[[Product], None],
        ran: Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any, list[Product]], None] | None = None,
    ) -> None:
        super().__init__()
        self.seen, self.ran, self.parameters = seen, ran, Parameters(parameters)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        products = products_of(func, args, kwargs or {}, self.parameters)
        for product in products:
            self.seen(product)
        output = func(*args, **(kwargs or {}))
        if func in _CASTS and output.data_ptr() != args[0].data_ptr():
            self.parameters.note_cast(args[0], output)
        if self.ran is not None:
            self.ran(func, args, kwargs or {}, output, products)
        return output
