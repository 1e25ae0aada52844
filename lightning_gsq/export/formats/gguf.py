"""GGUF: llama.cpp and everything built on it load it.

Each quantized matrix is stored in the smallest ggml block type that holds it exactly
(:mod:`lightning_gsq.gguf.blocks`): 1 bit in Q1_0, 2 bits and ternary in Q2_0, 3 and 4 bits in Q4_0, 5 in Q5_0, 6 to 8
in Q8_0, where rows and groups are whole blocks. Other matrices are projected: rounded anew to a type with blocks of 32
(``gguf_projection``), or stored as F16 where a row is no whole blocks either. The table of runtimes and the check say
which.

A run that started from a GGUF file (its model, or its codes) keeps that file's key-values, tokenizer and remaining
tensors byte by byte, whatever its architecture is. For a Hugging Face folder they are derived for the architectures of
:mod:`lightning_gsq.gguf.architectures.table`, with norms and biases as F32 and everything else as F16.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
import yaml

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import CheckReport, ExportFormat, ExportOptions, FileSizes, Run, Runtime
from lightning_gsq.export.formats.gguf_check import check_file
from lightning_gsq.export.formats.gguf_embedding import refuse_asked_for, with_its_embedding
from lightning_gsq.export.formats.gguf_layout import Layout, layout_of
from lightning_gsq.export.formats.gguf_storage import (
    FILE,
    SUPPORTED_BY_TRANSFORMERS,
    Storage,
    fitting_schemes,
    same_up_to,
    source_file,
)
from lightning_gsq.export.formats.gguf_tensors import from_file, from_folder, ledger_of, quantized
from lightning_gsq.export.planned import ExportedWeight, PlannedRun, plain_bits
from lightning_gsq.export.readers import llama_cpp
from lightning_gsq.export.registry import register
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.file import Field
from lightning_gsq.gguf.layout import names_in_file
from lightning_gsq.gguf.metadata import FILE_TYPE, fields_of_file, fields_of_model, with_storage
from lightning_gsq.gguf.write import NewTensor, file_size, write_gguf
from lightning_gsq.weights.ledger import Ledger
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.widths.groups import scheme_name

WORTH_SAYING = 0.6
"""Bits a weight that a block type wastes before that is said."""


@register
class GGUFFormat(ExportFormat):
    """One GGUF file."""

    name: ClassVar[str] = "gguf"
    outer: ClassVar[bool] = True
    package: ClassVar[str] = llama_cpp.PACKAGE

    def view(self, run: Run, options: ExportOptions = ExportOptions()) -> Run:  # noqa: B008 - frozen
        """Without an embedding that the file it came from holds in fewer bits, where nobody asked for it."""
        return with_its_embedding(run, options)

    def refuse(self, run: PlannedRun) -> str | None:
        """Refuses what has no name, no type or no rule of splitting text in a GGUF file."""
        if run.scale_dtype == torch.float32 and run.start_file is None:
            return "gguf stores scales in float16; quantize with --model.scale_dtype float16"
        try:
            if source_file(run) is None:
                fields_of_model(run.config, run.tokenizer, run.address)
            layout_of(run)
        except ConfigurationError as error:
            return str(error).removeprefix("format: ").removeprefix("gguf: ")
        return None

    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        """Writes ``model.gguf``."""
        refuse_asked_for(run, options)
        layout = layout_of(run)
        planned = list(self._tensors(run, layout, options))
        fields = self._with_storage(run, layout, planned, options)
        write_gguf(folder / FILE, fields, planned)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(run.recipe, sort_keys=False), encoding="utf-8")
        return ledger_of(folder / FILE, planned, layout.parameters, set(run.weights))

    def sizes(self, run: PlannedRun) -> FileSizes:
        """Those of the file that :meth:`write` writes."""
        layout, options = layout_of(run), ExportOptions()

        def weight(name: str, scheme: QuantScheme) -> int:
            weight = replace(run.weights[name], scheme=scheme)
            return sum(quantized(run, weight, place, options).padded_bytes for place in layout.weights[name].places)

        def total(schemes: Mapping[str, QuantScheme]) -> int:
            other = run.with_schemes(schemes)
            planned = list(self._tensors(other, layout, options))
            return file_size(self._with_storage(other, layout, planned, options), planned)

        return FileSizes(weight, total)

    def why_no_choice(self, scheme: QuantScheme, in_features: int) -> str | None:
        """There is no block type for that, or none that is as small: a wider choice would cost the same bytes."""
        name = scheme_name(scheme)
        if scheme.mixed:
            return f"gguf has no salient columns, as {name} has; native has"
        storage = Storage.of(scheme, in_features, "Q8_0")
        own = plain_bits(scheme, in_features, 8 * torch.float16.itemsize)
        if storage.exact and storage.bits <= own:
            return None
        reason = "" if storage.exact else f"gguf has no type that holds {name} in rows of {in_features}: rounded anew, "
        reason += f"gguf holds {name} as {storage.name}, {storage.bits:.4g} bits a weight instead of {own:.4g}"
        fitting = ", ".join(scheme_name(other) for other, *_ in fitting_schemes(in_features))
        return f"{reason}; choose among {f'{fitting} and ' if fitting else ''}ggml's own types, such as q4_0 and q4_k"

    def _fields(self, run: PlannedRun, layout: Layout) -> dict[str, Field]:
        """Key-values, but for those that say how weights are stored."""
        if layout.source is not None:
            return fields_of_file(layout.source)
        return fields_of_model(run.config, run.tokenizer, Path(run.address).name)

    def _with_storage(
        self, run: PlannedRun, layout: Layout, planned: Sequence[NewTensor], options: ExportOptions
    ) -> dict[str, Field]:
        """All key-values. Where all types stay the file's it says so as before: ``Q4_K_M`` is a mixture, no type."""
        fields, source = self._fields(run, layout), layout.source
        if source is not None and FILE_TYPE in fields:
            before = {name: tensor.number for name, tensor in source.tensors.items()}
            if before == {tensor.name: tensor.number for tensor in planned}:
                return fields
        return with_storage(fields, self._most_common(run, options))

    def _tensors(self, run: PlannedRun, layout: Layout, options: ExportOptions) -> Iterator[NewTensor]:
        """What the file holds; the values are those of a finished run."""
        if layout.source is not None:
            return from_file(run, layout, layout.source, options)
        assert layout.architecture is not None
        return from_folder(run, layout, layout.architecture, options)

    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        """Reads the file back bit by bit, and loads it with transformers (where it can) and with llama.cpp."""
        return check_file(run, folder / FILE, layout_of(run))

    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        """llama.cpp, and transformers where its reader knows the block types."""
        storages = [Storage.of(weight.scheme, weight.site.in_features, "Q8_0") for weight in weights]
        exact, kinds = all(storage.exact for storage in storages), sorted({storage.name for storage in storages})
        how = ("exact" if exact else "a projection") + f" ({', '.join(kinds)})"
        runtimes = [Runtime("llama.cpp", how, f"llama-cli -m {{folder}}/{FILE}")]
        if {storage.number for storage in storages} <= SUPPORTED_BY_TRANSFORMERS:
            usage = f'{{auto_class}}.from_pretrained("{{folder}}", gguf_file="{FILE}")'
            runtimes.append(Runtime("transformers", how, usage))
        return runtimes

    def stored_bits(self, weight: ExportedWeight, run: PlannedRun) -> float:
        """Those of the block type."""
        return Storage.of(weight.scheme, weight.site.in_features, "Q8_0").bits

    def other_bytes(self, run: PlannedRun, count: int) -> int:
        """Those of the tensors that a file keeps from the one that the run came from, whatever their types are."""
        try:
            source = source_file(run)
            if source is None:
                return super().other_bytes(run, count)
            names = names_in_file(source, run.config)
            new = {name for parameter in run.weights for name in names.of(parameter, source.tensors)}
        except ConfigurationError:  # a file that is not here yet, or that refuse() will not take
            return super().other_bytes(run, count)
        return sum(tensor.num_bytes for name, tensor in source.tensors.items() if name not in new)

    def stored_as(self, weight: ExportedWeight) -> str:
        """The block type."""
        storage = Storage.of(weight.scheme, weight.site.in_features, "Q8_0")
        return storage.name if storage.exact else f"{storage.name}, rounded anew"

    def remarks(self, run: PlannedRun) -> list[str]:
        """Says how far a file without a window goes, and which schemes fit a block type where one fills it badly."""
        return [*self._remarks_on_windows(run), *self._remarks_on_schemes(run)]

    def _remarks_on_windows(self, run: PlannedRun) -> list[str]:
        layout = layout_of(run)
        length = same_up_to(run.config, self._fields(run, layout))
        if length is None:
            return []
        return [
            f"llama.cpp has no sliding window for a {run.config.model_type}: it computes the same for texts of up to "
            f"{length:,} tokens, the model's window; after that it attends to more, and gives other numbers"
            + ("" if layout.source is not None else ". The file names that length as its context")
        ]

    def _remarks_on_schemes(self, run: PlannedRun) -> list[str]:
        remarks = {}
        for weight in run.weights.values():
            storage = Storage.of(weight.scheme, weight.site.in_features, "Q8_0")
            scheme, bits = weight.scheme, weight.bits(8 * run.scale_dtype.itemsize)
            if scheme in remarks or storage.bits < bits + WORTH_SAYING:
                continue
            stored = f"{scheme}: held as {storage.name}, {storage.bits:.4g} bits a weight instead of {bits:.4g}"
            fitting = [s for s in fitting_schemes(weight.site.in_features) if s[1] <= storage.bits]
            choices = [f"{other} ({name}, {size:.4g} bits)" for other, size, name in fitting[-2:]]
            remarks[scheme] = stored + (f"; these fit a block type: {', '.join(choices)}" if choices else "")
        return list(remarks.values())

    def weight_files(self, folder: Path) -> list[Path]:
        """The GGUF file."""
        return [folder / FILE]

    def _most_common(self, run: PlannedRun, options: ExportOptions) -> str:
        counts: Counter[str] = Counter()
        for weight in run.weights.values():
            storage = Storage.of(weight.scheme, weight.site.in_features, options.gguf_projection)
            counts[storage.name] += math.prod(weight.shape)
        return counts.most_common(1)[0][0]
