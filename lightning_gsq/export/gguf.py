"""GGUF: llama.cpp and everything built on it load it.

Each quantized matrix is stored in the smallest ggml block type that holds it exactly
(:mod:`lightning_gsq.gguf.blocks`): 1 bit in Q1_0, 2 bits and ternary in Q2_0, 3 and 4 bits in Q4_0, 5 in Q5_0, 6 to 8
in Q8_0, where rows and groups are whole blocks. Other matrices are projected: rounded anew to a type with blocks of 32
(``gguf_projection``), or stored as F16 where a row is no whole blocks either. The table of runtimes and the check say
which.

A run that started from a GGUF file (its model, or its codes) keeps that file's key-values, tokenizer and remaining
tensors byte by byte. For a
Hugging Face folder they are written for the Llama family, with norms and biases as F32 and everything else as F16.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import gguf
import numpy as np
import torch
import yaml
from gguf import GGMLQuantizationType
from torch import Tensor

from lightning_gsq import loading
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.formats import CheckReport, ExportFormat, ExportOptions, Runtime
from lightning_gsq.export.linear import fits_dtype, refuse_other_than_linear
from lightning_gsq.export.source import ExportedWeight, FinishedRun
from lightning_gsq.gguf.blocks import BLOCK_TYPES, encode, exact_type, projection
from lightning_gsq.gguf.file import Field, GGUFFile
from lightning_gsq.gguf.metadata import fields_of_file, fields_of_model, rotary_factors, storage_fields
from lightning_gsq.gguf.names import Layout
from lightning_gsq.gguf.types.codec import dequantize
from lightning_gsq.gguf.types.table import GgmlType
from lightning_gsq.gguf.write import NewTensor, write_gguf
from lightning_gsq.ledger import Ledger, LedgerEntry
from lightning_gsq.qtensor import QuantizedTensor
from lightning_gsq.scheme import QuantScheme

FILE = "model.gguf"
F32, F16 = int(GGMLQuantizationType.F32), int(GGMLQuantizationType.F16)
EMBEDDINGS = ("token_embd.weight", "output.weight")
ROTARY = "rope_freqs.weight"
SUPPORTED_BY_TRANSFORMERS = {int(kind) for kind in gguf.quants._type_traits} | {F32, F16}


@dataclass(frozen=True)
class Storage:
    """How a quantized matrix is stored.

    Args:
        kind: Its block type; None for F16.
        exact: Whether the file's values are the run's.
    """

    kind: GgmlType | None
    exact: bool

    @classmethod
    def of(cls, scheme: QuantScheme, in_features: int, projected: str) -> Storage:
        """The smallest exact type; else the type to project to, or F16 for rows that are no whole blocks."""
        kind = exact_type(scheme, in_features)
        if kind is not None:
            return cls(kind, True)
        other = BLOCK_TYPES[projected]
        return cls(None if in_features % other.length else other, False)

    @property
    def name(self) -> str:
        """llama.cpp's name of the type."""
        return "F16" if self.kind is None else self.kind.name

    @property
    def number(self) -> int:
        """ggml's number of the type."""
        return F16 if self.kind is None else self.kind.number


class GGUFFormat(ExportFormat):
    """One GGUF file."""

    name: ClassVar[str] = "gguf"

    def refuse(self, weights: Sequence[ExportedWeight]) -> str | None:
        """Refuses fused experts and transposed weights."""
        return refuse_other_than_linear(self.name, weights)

    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        """Writes ``model.gguf``."""
        layout = Layout.of(run.config)
        source = source_file(run)
        names = {layout.name_of(name): name for name in [*run.other_names(), *run.weights]}
        fields, tensors = _from_folder(run, layout, options) if source is None else _from_file(source, layout, options)
        fields |= storage_fields(self._most_common(run, options))
        planned = []
        for tensor in tensors:
            weight = run.weights.get(names.get(tensor.name, ""))
            planned.append(tensor if weight is None else _quantized(run, weight, layout, tensor.name, options))
        missing = set(run.weights) - {names[tensor.name] for tensor in planned if tensor.name in names}
        if missing:
            raise ConfigurationError(f"format: gguf: {source and source.path} has no tensor for {sorted(missing)[0]}")
        write_gguf(folder / FILE, fields, planned)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(run.recipe, sort_keys=False), encoding="utf-8")
        return _ledger(folder / FILE, planned, names, set(run.weights))

    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        """Reads the file back bit by bit, and loads it with transformers (where it can) and with llama.cpp."""
        from lightning_gsq.export.gguf_check import check_file

        return check_file(run, folder / FILE, source_file(run))

    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        """llama.cpp, and transformers where its reader knows the block types."""
        storages = [Storage.of(weight.scheme, weight.site.in_features, "Q8_0") for weight in weights]
        exact, kinds = all(storage.exact for storage in storages), sorted({storage.name for storage in storages})
        how = ("exact" if exact else "a projection") + f" ({', '.join(kinds)})"
        found = [Runtime("llama.cpp", how, f"llama-cli -m {{folder}}/{FILE}")]
        if {storage.number for storage in storages} <= SUPPORTED_BY_TRANSFORMERS:
            usage = f'AutoModelForCausalLM.from_pretrained("{{folder}}", gguf_file="{FILE}")'
            found.append(Runtime("transformers", how, usage))
        return found

    def weight_files(self, folder: Path) -> list[Path]:
        """The GGUF file."""
        return [folder / FILE]

    def _most_common(self, run: FinishedRun, options: ExportOptions) -> str:
        counts: Counter[str] = Counter()
        for weight in run.weights.values():
            storage = Storage.of(weight.scheme, weight.site.in_features, options.gguf_projection)
            counts[storage.name] += math.prod(weight.shape)
        return counts.most_common(1)[0][0]


def source_file(run: FinishedRun) -> GGUFFile | None:
    """The GGUF file whose remaining contents an export keeps; None for a run that has none.

    That is the file whose codes the run started from (``FromFile``), or the one that holds its original model.

    Raises:
        ConfigurationError: the file is not there or cannot be read.
    """
    start = run.recipe["settings"]["model"].get("warm_start")
    if isinstance(start, dict) and str(start.get("class_path", "")).rpartition(".")[2] == "FromFile":
        return GGUFFile(Path(start["init_args"]["file"]).expanduser())
    source = loading.resolve(run.address, run.model.revision, run.model.trust_remote_code)
    if source.gguf_file is None:
        return None
    if not source.files:
        raise ConfigurationError(
            f"format: gguf: download {run.address} first and start the run from the local file, whose key-values are "
            "copied"
        )
    return GGUFFile(source.files[0])


def _from_file(
    source: GGUFFile, layout: Layout, options: ExportOptions
) -> tuple[dict[str, Field], Iterator[NewTensor]]:
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


def _from_folder(
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
                    return _in_file_order(layout, stored, run.parameter(name))

                yield _plain(stored, shape, value, kind)

    return fields, tensors()


def _plain(name: str, shape: tuple[int, ...], value: Callable[[], Tensor], kind: str) -> NewTensor:
    """A tensor as F32, F16, or rounded to a block type."""
    if kind == "F32":
        return NewTensor(name, shape, F32, lambda: value().float().numpy())
    if kind == "F16" or shape[-1] % BLOCK_TYPES[kind].length:
        return NewTensor(name, shape, F16, lambda: fits_dtype(name, value(), torch.float16).half().numpy())
    return NewTensor(name, shape, BLOCK_TYPES[kind].number, lambda: projection(value(), BLOCK_TYPES[kind]))


def _quantized(
    run: FinishedRun, weight: ExportedWeight, layout: Layout, name: str, options: ExportOptions
) -> NewTensor:
    storage = Storage.of(weight.scheme, weight.site.in_features, options.gguf_projection)

    def content() -> np.ndarray:
        tensor = run.tensor(weight.name)
        if storage.kind is None:
            dense = _in_file_order(layout, name, tensor.dequantize(torch.float16))
            return fits_dtype(weight.name, dense, torch.float16).numpy()
        if not storage.exact:
            return projection(_in_file_order(layout, name, tensor.dequantize()), storage.kind)
        codes = _in_file_order(layout, name, tensor.codes_OI)
        scales = _in_file_order(layout, name, tensor.scales_OG)
        return encode(QuantizedTensor(codes, scales, tensor.scheme), storage.kind)

    return NewTensor(name, weight.shape, storage.number, content)


def _in_file_order(layout: Layout, name: str, value: Tensor) -> Tensor:
    rows = layout.rows_of(name, len(value))
    return value if rows is None else value[rows]


def _ledger(path: Path, tensors: Sequence[NewTensor], names: dict[str, str], quantized: set[str]) -> Ledger:
    entries = []
    kinds = {kind.number: kind for kind in BLOCK_TYPES.values()}
    for tensor in tensors:
        name, weights, bits = names.get(tensor.name, tensor.name), math.prod(tensor.shape), 8 * tensor.num_bytes
        if name in quantized and tensor.number in kinds:
            scales = 16 * (weights // kinds[tensor.number].length)
            entries.append(LedgerEntry(name, weights, codes=bits - scales, scales=scales))
        else:
            entries.append(LedgerEntry(name, weights, unquantized=bits))
    content = sum(tensor.num_bytes for tensor in tensors)
    ledger = Ledger(tuple(entries), {path.name: path.stat().st_size - content})
    ledger.verify([path])
    return ledger
