"""The tensors of a GGUF file before it is written: names, types, and where the values come from."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.gguf_layout import Layout
from lightning_gsq.export.formats.gguf_storage import F16, F32, Storage
from lightning_gsq.export.formats.linear import fits_dtype
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.architectures.table import Architecture
from lightning_gsq.gguf.blocks import BLOCK_TYPES, encode, projection
from lightning_gsq.gguf.file import GGUFFile, StoredTensor
from lightning_gsq.gguf.layout import EMBEDDINGS, Stored
from lightning_gsq.gguf.rows import Place
from lightning_gsq.gguf.types.codec import dequantize, scale_bits
from lightning_gsq.gguf.types.table import BY_NUMBER
from lightning_gsq.gguf.write import NewTensor
from lightning_gsq.weights.ledger import Ledger, LedgerEntry

ROUTER = "ffn_gate_inp"
"""What chooses among experts: llama.cpp wants it in fp32."""


def from_file(run: PlannedRun, layout: Layout, source: GGUFFile, options: ExportOptions) -> Iterator[NewTensor]:
    """The tensors of a file, byte by byte but for what a run quantized or trained, and embeddings where asked for.

    Args:
        run: The run.
        layout: Its layout.
        source: The file.
        options: Settings of the export.
    """
    parameters = layout.parameters
    for name, stored in source.tensors.items():
        parameter = parameters.get(name)
        if parameter in run.weights:
            yield quantized(run, run.weights[parameter], _place(layout.weights, parameter, name), options, stored.shape)
        elif parameter is not None:
            yield _other(run, layout.others[parameter], parameter, name, stored.shape, _kind(name, stored, options))
        elif name in EMBEDDINGS and options.gguf_embedding is not None:
            dense = functools.partial(lambda name_: dequantize(source.raw(name_), source.tensors[name_].number), name)
            yield _plain(name, stored.shape, dense, options.gguf_embedding)
        else:
            yield NewTensor(name, stored.shape, stored.number, functools.partial(source.raw, name))
    for name, parameter in parameters.items():
        if name not in source.tensors:  # a head that was tied to the embedding before it trained
            shape, kind = tuple(run.values[parameter].shape), options.gguf_embedding or "F16"
            yield _other(run, layout.others[parameter], parameter, name, shape, kind)


def from_folder(
    run: PlannedRun, layout: Layout, architecture: Architecture, options: ExportOptions
) -> Iterator[NewTensor]:
    """The tensors of a Hugging Face model.

    Args:
        run: The run.
        layout: Its layout.
        architecture: Its architecture.
        options: Settings of the export.
    """
    for name, value in architecture.tensors(run.config).items():
        yield NewTensor(name, tuple(value.shape), F32, value.numpy)
    for names in run.units():
        for parameter in names:
            weight = run.weights.get(parameter)
            places = (layout.others if weight is None else layout.weights)[parameter].places
            for place in places:
                if weight is not None:
                    yield quantized(run, weight, place, options)
                    continue
                shape = tuple(run.values[parameter].shape)
                shape = shape if len(shape) < 3 else (shape[0], shape[1] // len(places), shape[2])
                kind = "F32" if len(shape) == 1 or ROUTER in place.name else "F16"
                if place.name in EMBEDDINGS and options.gguf_embedding is not None:
                    kind = options.gguf_embedding
                yield _other(run, layout.others[parameter], parameter, place.name, shape, kind)


def quantized(
    run: PlannedRun,
    weight: ExportedWeight,
    place: Place,
    options: ExportOptions,
    shape: tuple[int, ...] | None = None,
) -> NewTensor:
    """A quantized matrix, or the part of fused ones that a tensor holds, as the type that it is stored in.

    Args:
        run: The run.
        weight: The weight.
        place: The tensor.
        options: Settings of the export.
        shape: The tensor's shape; None for the weight's own.
    """
    storage = Storage.of(weight.scheme, weight.site.in_features, options.gguf_projection)
    if shape is None:
        rows, experts = weight.site.rows if place.rows is None else len(place.rows), weight.site.experts
        shape = (experts, rows // experts, weight.shape[1]) if experts else (rows, weight.shape[1])

    def content() -> np.ndarray:
        assert isinstance(run, FinishedRun)
        tensor = run.tensor(weight.name)
        if storage.kind is None:
            return fits_dtype(weight.name, place.of_file(tensor.dequantize(torch.float16)), torch.float16).numpy()
        if not storage.exact:
            return projection(place.of_file(tensor.dequantize()), storage.kind)
        return encode(tensor.map(place.of_file), storage.kind)

    return NewTensor(place.name, shape, storage.number, content)


def _place(places: dict[str, Stored], parameter: str, name: str) -> Place:
    return next(place for place in places[parameter].places if place.name == name)


def _kind(name: str, stored: StoredTensor, options: ExportOptions) -> str:
    """The type of a parameter that a run from a file trained: its own if that can be written, else F16."""
    if name in EMBEDDINGS and options.gguf_embedding is not None:
        return options.gguf_embedding
    kind = BY_NUMBER[stored.number].name if stored.number in BY_NUMBER else "F16"
    return kind if kind in ("F32", "F16", *BLOCK_TYPES) and kind not in ("Q1_0", "Q2_0") else "F16"


def _other(run: PlannedRun, stored: Stored, parameter: str, name: str, shape: tuple[int, ...], kind: str) -> NewTensor:
    """A parameter that is not quantized, or the part of it that a tensor holds."""
    place = next(place for place in stored.places if place.name == name)

    def value() -> Tensor:
        dense = run.parameter(parameter)
        rows = dense.reshape(-1, dense.shape[-1]) if dense.ndim > 1 else dense
        return place.of_file(rows.float() + stored.shift if stored.shift else rows)

    return _plain(name, shape, value, kind)


def _plain(name: str, shape: tuple[int, ...], value: Callable[[], Tensor], kind: str) -> NewTensor:
    """A tensor as F32, F16, or rounded to a block type."""
    if kind == "F32":
        return NewTensor(name, shape, F32, lambda: value().float().numpy())
    if kind == "F16" or shape[-1] % BLOCK_TYPES[kind].length:
        return NewTensor(name, shape, F16, lambda: fits_dtype(name, value(), torch.float16).half().numpy())
    return NewTensor(name, shape, BLOCK_TYPES[kind].number, lambda: projection(value(), BLOCK_TYPES[kind]))


def ledger_of(path: Path, tensors: Sequence[NewTensor], names: dict[str, str], quantized: set[str]) -> Ledger:
    """What a written file costs.

    Args:
        path: The file.
        tensors: What was written into it.
        names: Parameter names by the tensors' names.
        quantized: Names of the quantized parameters.
    """
    entries: dict[str, LedgerEntry] = {}
    for tensor in tensors:
        name, weights, bits = names.get(tensor.name, tensor.name), math.prod(tensor.shape), 8 * tensor.num_bytes
        if name in quantized and tensor.number not in (F32, F16):
            kind = BY_NUMBER[tensor.number]
            scales = weights // kind.length * scale_bits(kind)
            entry = LedgerEntry(name, weights, codes=bits - scales, scales=scales)
        else:
            entry = LedgerEntry(name, weights, unquantized=bits)
        entries[name] = entry if name not in entries else _both(entries[name], entry)
    content = sum(tensor.num_bytes for tensor in tensors)
    ledger = Ledger(tuple(entries.values()), {path.name: path.stat().st_size - content})
    ledger.verify([path])
    return ledger


def _both(first: LedgerEntry, second: LedgerEntry) -> LedgerEntry:
    """Two parts of one parameter."""
    return dataclasses.replace(
        first,
        weights=first.weights + second.weights,
        codes=first.codes + second.codes,
        scales=first.scales + second.scales,
        unquantized=first.unquantized + second.unquantized,
    )
