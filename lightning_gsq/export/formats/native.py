"""The project's own format: packed codes and scales in safetensors, loaded without unpacking.

A quantized weight ``<stem>.weight`` is stored as ``<stem>.codes`` (int32 words ``O W``, the canonical packing) and
``<stem>.scales`` (``O G``, the run's scale dtype); every other parameter as plain numbers under its usual name. The
layout of each weight stands in ``quantization_config`` of config.json, so that a reader needs nothing else:

    {"quant_method": "lightning_gsq", "version": 1,
     "weights": {"model.layers.0.mlp.down_proj.weight": {"bits": 3, "group_size": 64, "shape": [576, 1536]}, ...}}

A weight with a salient part is stored as the tensors of its layout (``lightning_gsq.weights.mixed`` and ``element``),
and ``salient`` in its entry says the rest.

It holds every scheme exactly, and a loaded model takes as much memory as the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.export.check import compare_model
from lightning_gsq.export.companions import file_names, write_companions
from lightning_gsq.export.contract import CheckReport, ExportFormat, ExportOptions, FileSizes, Run, Runtime
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.registry import register
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.export.writer import PlannedShards, ShardWriter
from lightning_gsq.packed.config import GSQConfig
from lightning_gsq.packed.embedding import is_packable_embedding
from lightning_gsq.packed.exchange import stem_of, why_no_packed_form
from lightning_gsq.packed.layers import PackedWeight
from lightning_gsq.packed.salient_linear import SageLinear
from lightning_gsq.weights.ledger import Ledger, LedgerEntry
from lightning_gsq.weights.mixed import mixed_like
from lightning_gsq.weights.quantized import packed_like
from lightning_gsq.weights.scheme import QuantScheme

PACKED = (PackedWeight, SageLinear)


@register
class NativeFormat(ExportFormat):
    """Packed safetensors for :func:`lightning_gsq.load`."""

    name: ClassVar[str] = "native"
    salient: ClassVar[bool] = True
    outer: ClassVar[bool] = True
    outside: ClassVar[bool] = True

    def view(self, run: Run, options: ExportOptions = ExportOptions()) -> Run:  # noqa: B008 - frozen
        """Without embedding and head where one is a module that does more than to look rows up, or to multiply."""
        owners = [run.network.get_submodule(name.rpartition(".")[0]) for name in run.outer]
        packable = all(type(owner) is nn.Linear or is_packable_embedding(owner) for owner in owners)
        return run if packable else run.within_blocks

    def refuse(self, run: PlannedRun) -> str | None:
        """Holds everything but salient parts of fused experts, and weights of modules that have no packed form."""
        return self.refuse_weights(run)

    def refuse_weights(self, run: PlannedRun) -> str | None:
        """The same."""
        for weight in run.weights.values():
            if weight.scheme.mixed and weight.site.experts:
                return f"native has no salient weights in fused experts ({weight.name}); use dequantized"
            owner, _, attribute = weight.name.rpartition(".")
            reason = why_no_packed_form(run.network.get_submodule(owner), attribute, weight.site)
            if reason is not None:
                return f"{weight.name} {reason}; use dequantized"
        return None

    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        """Writes ``model.safetensors`` (or shards), config and tokenizer."""
        writer = ShardWriter(folder, options.shard_size)
        layouts = {}
        for names in run.units():
            plain = {name: run.parameter(name) for name in names if name not in run.weights}
            for name, value in file_names(run, plain).items():
                writer.add_plain(name, value)
            for name in names:
                if name in run.weights:
                    weight, tensor = run.weights[name], run.quantized(name)
                    layouts[name] = (tensor.scheme, weight.site)
                    stem = stem_of(name, weight.site)
                    parts = {f"{stem}.{part}": value for part, value in tensor.pack().items()}
                    writer.add(parts, LedgerEntry.of(name, tensor))
        write_companions(run, folder, GSQConfig.of(layouts).to_dict())
        return writer.finish()

    def sizes(self, run: PlannedRun) -> FileSizes:
        """Those of the files that :meth:`write` writes."""
        dtype, shard_size = run.model.storage.scale_dtype, ExportOptions().shard_size

        def packed(weight: ExportedWeight) -> dict[str, Tensor]:
            like = mixed_like if weight.scheme.mixed else packed_like
            parts = like(weight.scheme, *weight.shape, dtype)
            return {f"{stem_of(weight.name, weight.site)}.{part}": value for part, value in parts.items()}

        def weight(name: str, scheme: QuantScheme) -> int:
            return sum(tensor.nbytes for tensor in packed(replace(run.weights[name], scheme=scheme)).values())

        def total(schemes: Mapping[str, QuantScheme]) -> int:
            other, shards = run.with_schemes(schemes), PlannedShards(shard_size)
            for names in other.units():
                plain = {name: _empty(other, name) for name in names if name not in other.weights}
                for name, value in file_names(other, plain).items():
                    shards.add({name: value})
                for name in names:
                    if name in other.weights:
                        shards.add(packed(other.weights[name]))
            return shards.num_bytes

        return FileSizes(weight, total)

    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        """Loads it with the project's runtime."""
        return compare_model(run, folder, "lightning-gsq", _dense_of)

    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        """The project's runtime, by itself or inside transformers."""
        return [
            Runtime("lightning-gsq", "exact", 'lightning_gsq.load("{folder}")'),
            Runtime(
                "transformers",
                "exact",
                'import lightning_gsq; {auto_class}.from_pretrained("{folder}")',
            ),
        ]


def _empty(run: PlannedRun, name: str) -> Tensor:
    """A parameter or buffer as :meth:`PlannedRun.parameter` gives it, on the meta device."""
    value = run.values[name]
    return torch.empty(value.shape, dtype=run.dtype_of(name), device="meta")


def _dense_of(model: PreTrainedModel, name: str) -> Tensor:
    module = model.get_submodule(name.removesuffix(".weight"))
    if not isinstance(module, PACKED):
        module = model.get_submodule(name)  # experts, of which a parameter of a module is packed
    if not isinstance(module, PACKED):
        raise TypeError(f"{name} is not packed in the loaded model but a {type(module).__name__}")
    return module.dequantize(torch.float32)
