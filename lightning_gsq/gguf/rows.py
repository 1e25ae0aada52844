"""In which order do the rows of a matrix lie in a GGUF file?

llama.cpp rotates neighbouring rows of a query or key head together where Hugging Face's Llama rotates row ``i`` with
row ``i + d/2``; files of the architectures that it treats so hold those two matrices with the halves of every head
interleaved. Which architectures those are is not asked where a file is at hand: the model's rows are compared with the
file's. Rows are independent of each other, so codes and scales move with them and nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.types.codec import dequantize

SAMPLE = 128
"""Rows that are compared to tell one order from another."""
ROUNDING = 2.0**-7
"""Of the largest value: bfloat16's rounding."""
ALIKE = 0.5
"""Cosine between a row and what a quantizer made of it: 0.8 at one bit, and about zero for another row."""


@dataclass(frozen=True)
class Place:
    """A tensor of a file that holds a parameter, or a part of one.

    Args:
        name: Its name in the file.
        rows: The parameter's row, seen as one matrix, that stands in each of its rows; None for all of them in order.
    """

    name: str
    rows: Tensor | None = None

    def of_file(self, value: Tensor) -> Tensor:
        """The rows of a parameter (or of its codes, or scales) that the tensor holds, in its order."""
        return value if self.rows is None else value[self.rows]


def to_model(places: Sequence[Place], parts: Sequence[Tensor]) -> Tensor:
    """A parameter's rows in the model's order.

    Args:
        places: Its places.
        parts: What the tensors there hold, row by row.
    """
    if len(places) == 1 and places[0].rows is None:
        return parts[0]
    joined = torch.cat(list(parts))
    restored = torch.empty_like(joined)
    begin = 0
    for place, part in zip(places, parts, strict=True):
        rows = torch.arange(begin, begin + len(part)) if place.rows is None else place.rows
        restored[rows] = part
        begin += len(part)
    return restored


def interleaved(rows: int, heads: int) -> Tensor:
    """The order of a query's or key's rows with the halves of every head interleaved."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def parts_of_experts(rows: int, experts: int, count: int) -> list[Tensor]:
    """Which rows each of ``count`` tensors holds of a parameter with all of them one after another in every expert."""
    return list(torch.arange(rows).view(experts, count, -1).transpose(0, 1).reshape(count, -1))


def places_in_file(file: GGUFFile, names: Sequence[str], w_OI: Tensor, heads: Iterable[int], same: bool) -> list[Place]:
    """Where a file holds a matrix, found by comparing some of its rows.

    Args:
        file: The file.
        names: Names of the tensors.
        w_OI: The model's matrix.
        heads: Numbers of heads that its rows may be divided into.
        same: Whether the model's values are the file's; else they are those of the model that was quantized to it.

    Raises:
        ConfigurationError: the file holds something else, or rows in an order that is not found.
    """
    verify_shapes(file, names, (w_OI.shape[0], w_OI.shape[1]))
    if len(names) > 1:
        parts = parts_of_experts(len(w_OI), experts_of(file, names[0]), len(names))
        places = [Place(name, rows) for name, rows in zip(names, parts, strict=True)]
        if all(_likeness(file, place, w_OI, same) > ALIKE for place in places):
            return places
    else:
        halves = sorted({count for count in heads if count and len(w_OI) % (2 * count) == 0})
        orders = [None, *(interleaved(len(w_OI), count) for count in halves)]
        places = [Place(names[0], rows) for rows in orders]
        # Two orders may share half of their rows: the best one, not the first that is good enough.
        best = max(places, key=lambda place: _likeness(file, place, w_OI, same))
        if _likeness(file, best, w_OI, same) > ALIKE:
            return [best]
        order = _matched(file, names[0], w_OI) if same else None
        if order is not None:
            return [Place(names[0], order)]
    raise ConfigurationError(
        f"{file.path} holds {' and '.join(names)} with other values than the model, or with its rows in an order that "
        "is not known; export to native or dequantized"
    )


def equal(stored: Tensor, model: Tensor) -> bool:
    """Whether values are the same but for what the model's dtype and another order of multiplication round."""
    error = (stored.reshape(model.shape) - model.float()).abs().max() if model.numel() else torch.zeros(())
    return bool(error <= ROUNDING * model.float().abs().max())


def _likeness(file: GGUFFile, place: Place, w_OI: Tensor, same: bool) -> float:
    """How much some rows of a tensor are those of the model that stand there in this order: 1 at most."""
    count = len(file.raw(place.name))
    some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SAMPLE].sort().values
    stored_RI = dequantize(file.raw(place.name)[some.numpy()], file.tensors[place.name].number)
    model_RI = w_OI[some if place.rows is None else place.rows[some]]
    if same:
        return float(equal(stored_RI, model_RI))
    return float(torch.nn.functional.cosine_similarity(stored_RI, model_RI.float(), dim=1).mean())


def verify_shapes(file: GGUFFile, names: Sequence[str], shape: tuple[int, int]) -> None:
    """Verifies that tensors of a file together have the shape of a matrix.

    Args:
        file: The file.
        names: Names of the tensors.
        shape: ``(O, I)``.

    Raises:
        ConfigurationError: they have not, or one is not there.
    """
    lacking = [name for name in names if name not in file.tensors]
    stored = [file.tensors[name].shape for name in names if name not in lacking]
    rows = sum(math.prod(part[:-1]) for part in stored)
    if lacking or rows != shape[0] or any(part[-1] != shape[1] for part in stored):
        shapes = f"{' and '.join(names)} in the shape {' and '.join(map(str, stored))}"
        what = f"no tensor {lacking[0]}" if lacking else shapes
        raise ConfigurationError(
            f"{file.path} has {what}, where the model has a matrix of {shape}: it is a file of another model"
        )


def experts_of(file: GGUFFile, name: str) -> int:
    """Matrices in a tensor of a file."""
    shape = file.tensors[name].shape
    return shape[0] if len(shape) > 2 else 1


def _matched(file: GGUFFile, name: str, w_OI: Tensor) -> Tensor | None:
    """The model's row that is equal to each row of a tensor; None if one has no equal, or several."""
    stored_OI = dequantize(file.raw(name), file.tensors[name].number).to(w_OI.dtype)
    places = {row: index for index, row in enumerate(_bytes(w_OI))}
    rows = [places.get(row) for row in _bytes(stored_OI)]
    if None in rows or len(set(rows)) != len(w_OI):
        return None
    return torch.tensor(rows)


def _bytes(w_OI: Tensor) -> list[bytes]:
    """Each row's bytes, with one zero instead of two."""
    return [row.tobytes() for row in (w_OI + 0.0).contiguous().view(torch.uint8).numpy()]
