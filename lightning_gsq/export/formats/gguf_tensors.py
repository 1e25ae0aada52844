"""The tensors of a GGUF file before it is written: names, types, and where the values come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.gguf_storage import EMBEDDINGS, F16, F32, ROTARY, Storage, in_file_order
from lightning_gsq.export.formats.linear import fits_dtype
from lightning_gsq.export.planned import ExportedWeight
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.blocks import BLOCK_TYPES, encode, projection
from lightning_gsq.gguf.file import Field, GGUFFile
from lightning_gsq.gguf.metadata import fields_of_file, fields_of_model, rotary_factors
from lightning_gsq.gguf.names import Layout
from lightning_gsq.gguf.types.codec import dequantize
from lightning_gsq.gguf.types.levels import scale_bits
from lightning_gsq.gguf.types.table import BY_NUMBER
from lightning_gsq.gguf.write import NewTensor
from lightning_gsq.weights.ledger import Ledger, LedgerEntry


def from_file(source: GGUFFile, layout: Layout, options: ExportOptions) -> tuple[dict[str, Field], Iterator[NewTensor]]:
    """The fields and tensors of a file, the latter byte by byte, embeddings in the type that was asked for."""
    fields = fields_of_file(source)
    architecture = fields["general.architecture"].value if "general.architecture" in fields else None
    if architecture != layout.architecture:
        raise ConfigurationError(
            f"format: gguf: {source.path} is of the architecture {architecture!r}, expected {layout.architecture!r}"
        )

    def tensors() -> Iterator[NewTensor]:
        for name, stored in source.tensors.items():
            if name in EMBEDDINGS and options.gguf_embedding is not None:
                dense = dequantize(source.raw(name), stored.number)
                yield _plain(name, stored.shape, lambda dense=dense: dense, options.gguf_embedding)  # type: ignore[misc]
            else:
                yield NewTensor(name, stored.shape, stored.number, lambda name=name: source.raw(name))  # type: ignore[misc]

    return fields, tensors()


def from_folder(
    run: FinishedRun, layout: Layout, options: ExportOptions
) -> tuple[dict[str, Field], Iterator[NewTensor]]:
    """The fields and tensors of a Hugging Face model; quantized ones as placeholders of the right name."""
    title = Path(run.address).name
    fields = fields_of_model(run.config, run.tokenizer, layout.architecture, title)

    def tensors() -> Iterator[NewTensor]:
        factors = rotary_factors(run.config)
        if factors is not None:
            yield NewTensor(ROTARY, tuple(factors.shape), F32, factors.numpy)
        for names in run.units():
            for name in names:
                stored = layout.name_of(name)
                shape = tuple(run.network.get_parameter(name).shape)
                kind = "F32" if len(shape) == 1 else "F16"
                if stored in EMBEDDINGS and options.gguf_embedding is not None:
                    kind = options.gguf_embedding

                def value(name: str = name, stored: str = stored) -> Tensor:
                    return in_file_order(layout, stored, run.parameter(name))

                yield _plain(stored, shape, value, kind)

    return fields, tensors()


def _plain(name: str, shape: tuple[int, ...], value: Callable[[], Tensor], kind: str) -> NewTensor:
    """A tensor as F32, F16, or rounded to a block type."""
    if kind == "F32":
        return NewTensor(name, shape, F32, lambda: value().float().numpy())
    if kind == "F16" or shape[-1] % BLOCK_TYPES[kind].length:
        return NewTensor(name, shape, F16, lambda: fits_dtype(name, value(), torch.float16).half().numpy())
    return NewTensor(name, shape, BLOCK_TYPES[kind].number, lambda: projection(value(), BLOCK_TYPES[kind]))


def quantized(run: FinishedRun, weight: ExportedWeight, layout: Layout, name: str, options: ExportOptions) -> NewTensor:
    """A quantized matrix, as the type that it is stored in."""
    storage = Storage.of(weight.scheme, weight.site.in_features, options.gguf_projection)

    def content() -> np.ndarray:
        tensor = run.tensor(weight.name)
        if storage.kind is None:
            dense = in_file_order(layout, name, tensor.dequantize(torch.float16))
            return fits_dtype(weight.name, dense, torch.float16).numpy()
        if not storage.exact:
            return projection(in_file_order(layout, name, tensor.dequantize()), storage.kind)
        return encode(tensor.map(lambda part: in_file_order(layout, name, part)), storage.kind)

    return NewTensor(name, weight.shape, storage.number, content)


def ledger_of(path: Path, tensors: Sequence[NewTensor], names: dict[str, str], quantized: set[str]) -> Ledger:
    """What a written file costs.

    Args:
        path: The file.
        tensors: What was written into it.
        names: Parameter names by the tensors' names.
        quantized: Names of the quantized parameters.
    """
    entries = []
    for tensor in tensors:
        name, weights, bits = names.get(tensor.name, tensor.name), math.prod(tensor.shape), 8 * tensor.num_bytes
        if name in quantized and tensor.number not in (F32, F16):
            kind = BY_NUMBER[tensor.number]
            scales = weights // kind.length * scale_bits(kind)
            entries.append(LedgerEntry(name, weights, codes=bits - scales, scales=scales))
        else:
            entries.append(LedgerEntry(name, weights, unquantized=bits))
    content = sum(tensor.num_bytes for tensor in tensors)
    ledger = Ledger(tuple(entries), {path.name: path.stat().st_size - content})
    ledger.verify([path])
    return ledger
