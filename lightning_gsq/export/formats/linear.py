"""What the formats made of ``nn.Linear`` layers have in common: which layers, at how many bits, tensor by tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.companions import file_names
from lightning_gsq.export.contract import ExportFormat
from lightning_gsq.export.formats.expert_tensors import expert_stems, expert_tensors, stem_of
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.export.writer import ShardWriter
from lightning_gsq.weights.ledger import LedgerEntry
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

NARROWEST = 2
"""Bits of the narrowest grid -2^(b-1) ... 2^(b-1) - 1 that holds -1 and +1."""


class LinearFormat(ExportFormat):
    """A format that stores each quantized ``nn.Linear`` as a few tensors, and everything else as plain numbers."""

    codes: ClassVar[str]
    """Which of a layer's tensors holds the codes."""
    scales: ClassVar[str]
    """Which of them holds the scales."""
    levels: ClassVar[str] = "symmetric levels with one scale"
    """What it holds, in words."""
    family_names: ClassVar[bool] = False
    """Whether files have the names of the family's own checkpoints, with the matrices of fused experts one by one;
    otherwise those of the model in memory, and fused experts are refused."""

    @abstractmethod
    def encode(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors of one layer, by the part's name.

        Raises:
            ConfigurationError: the format cannot hold a value.
        """

    @abstractmethod
    def refuse_weight(self, weight: ExportedWeight) -> str | None:
        """Why the format cannot hold the grid or the groups of a plain linear layer; None if it can."""

    def bits(self, scheme: QuantScheme) -> int:
        """Bits of a stored code."""
        return linear_bits(scheme)

    def refuse(self, run: PlannedRun) -> str | None:
        """Refuses fused experts, transposed weights, what :meth:`refuse_weight` names, and numbers that do not fit."""
        return self.refuse_weights(run) or self.refuse_values(run)

    def refuse_weights(self, run: PlannedRun) -> str | None:
        """All of it but the numbers."""
        weights = list(run.weights.values())
        reasons = [*map(self._refuse_layout, weights), *map(self.refuse_weight, weights)]
        reasons += [self._refuse_form(run, weight) for weight in weights]
        return next((reason for reason in reasons if reason), None)

    def holds(self, scheme: QuantScheme) -> bool:
        """Whether the format knows such scales and levels at all."""
        return scheme.plain_symmetric

    def _refuse_layout(self, weight: ExportedWeight) -> str | None:
        if self.holds(weight.scheme):
            return None
        outside = "; --model.embedding (or head) w8g32 is such a scheme" if weight.block is None else ""
        return (
            f"{self.name} holds {self.levels} a group, and {weight.name} is {weight.scheme}; native holds it, and gguf "
            f"or mlx if it is a type of theirs{outside}"
        )

    def _refuse_form(self, run: PlannedRun, weight: ExportedWeight) -> str | None:
        site = weight.site
        if site.experts and self.family_names:
            if expert_stems(run, weight):
                return None
            return (
                f"{self.name} holds a matrix for each expert, and the files of a {type(run.network).__name__} hold "
                f"{weight.name} as one tensor of all experts, for which there is no packed layout that its readers "
                "share; native and dequantized hold it, and gguf where it knows the architecture"
            )
        if site.experts or site.transposed:
            what = "fuses several experts" if site.experts else "is stored transposed"
            others = " compressed-tensors," if site.experts else ""
            return (
                f"{self.name} holds plain linear layers, and {weight.name} {what};{others} native and dequantized "
                "hold it"
            )
        return None

    def refuse_values(self, run: PlannedRun) -> str | None:
        """Why the format cannot hold the scales or the plain numbers; None if it can."""
        dtypes = {weight.scheme.layout.dtype or run.model.storage.scale_dtype for weight in run.weights.values()}
        if len(dtypes) > 1:
            names = " and ".join(sorted(map(str, dtypes)))
            return (
                f"{self.name} stores all scales in one dtype, and the run has {names}; quantize with "
                "--model.scale_dtype float16, which presets of ggml and MLX have"
            )
        dtype = self.compute_dtype(run)
        if dtype == torch.float16 and run.scale_dtype == torch.float32:
            return f"{self.name} stores scales in float16; quantize with --model.scale_dtype float16"
        for name in run.other_names():
            try:
                fits_dtype(name, run.parameter(name), dtype)
            except ConfigurationError as error:
                return str(error)
        return None

    def compute_dtype(self, run: PlannedRun) -> torch.dtype:
        """What readers compute in: plain numbers have to fit it."""
        return run.scale_dtype

    def stored_bits(self, weight: ExportedWeight, run: PlannedRun) -> float:
        """Codes, and a scale a group."""
        return self.bits(weight.scheme) + 8 * run.scale_dtype.itemsize / weight.group_length

    def write_layers(self, run: FinishedRun, writer: ShardWriter) -> None:
        """Adds every parameter of a run: quantized layers as the format encodes them, the others as plain numbers.

        Args:
            run: The run.
            writer: Where to.

        Raises:
            ConfigurationError: a plain number does not fit the dtype that readers compute in.
        """
        for names in run.units():
            plain = {name: self.plain(name, run) for name in names if name not in run.weights}
            # transformers unpacks experts one by one, and takes those that are not quantized as it has them in memory.
            fused = {name: value for name, value in plain.items() if value.ndim == 3 or not self.family_names}
            others = {name: value for name, value in plain.items() if name not in fused}
            for name, value in (fused | file_names(run, others)).items():
                writer.add_plain(name, value)
            for name in names:
                if name in run.weights:
                    weight, tensor = run.weights[name], run.tensor(name)
                    encoded = {stem: self.encode(piece) for stem, piece in self._pieces(run, weight, tensor).items()}
                    tensors = {
                        f"{stem}.{part}": value for stem, parts in encoded.items() for part, value in parts.items()
                    }
                    writer.add(tensors, self._entry(name, tensor, list(encoded.values())))

    def _pieces(self, run: PlannedRun, weight: ExportedWeight, tensor: QuantizedTensor) -> dict[str, QuantizedTensor]:
        """The layers that a weight is stored as, by their names."""
        if not self.family_names:
            return {weight.stem: tensor}
        if weight.site.experts:
            return expert_tensors(run, weight, tensor)
        return {stem_of(run, weight.name): tensor}

    def plain(self, name: str, run: FinishedRun) -> Tensor:
        """A parameter that is not quantized, as it is stored.

        Raises:
            ConfigurationError: it does not fit the dtype that readers compute in.
        """
        return fits_dtype(name, run.parameter(name), self.compute_dtype(run))

    def _entry(self, name: str, tensor: QuantizedTensor, layers: Sequence[Mapping[str, Tensor]]) -> LedgerEntry:
        """What the tensors of a weight's layers cost."""
        weights = tensor.codes_OI.numel()
        code_bits = weights * self.bits(tensor.scheme)
        sizes = {part: 8 * sum(parts[part].nbytes for parts in layers) for part in layers[0]}
        return LedgerEntry(
            name,
            weights,
            codes=code_bits,
            scales=sizes.pop(self.scales),
            padding=sizes.pop(self.codes) - code_bits,
            redundant=sum(sizes.values()),
        )


def linear_bits(scheme: QuantScheme) -> int:
    """Bits of a code in a format whose grids are -2^(b-1) ... 2^(b-1) - 1: 1 bit and ternary take two."""
    return max(NARROWEST, scheme.storage_bits)


def other_linear_layers(run: PlannedRun) -> list[str]:
    """Names of the model's linear layers that are not quantized."""
    quantized = {weight.stem for weight in run.weights.values()}
    modules = run.network.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and name not in quantized]


def fits_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value as it is, if a reader can load it in ``dtype`` without overflow.

    Raises:
        ConfigurationError: it cannot.
    """
    if value.is_floating_point() and not bool(torch.isfinite(value.to(dtype)).all()):
        raise ConfigurationError(
            f"export: {name} reaches {float(value.abs().max()):.3g}, more than {dtype} holds, in which a reader loads "
            "the folder because the scales are stored in it; quantize with --model.scale_dtype bfloat16, or export to "
            "native"
        )
    return value
