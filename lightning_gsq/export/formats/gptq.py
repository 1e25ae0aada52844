"""The GPTQ format: gptqmodel loads it, and for 4 and 8 bits most runtimes with GPTQ kernels.

A linear layer ``x`` is stored as

    x.qweight   int32 ceil(I bits / 32) O      code + 2^(bits - 1), packed along the input dimension
    x.qzeros    int32 G ceil(O bits / 32)      zero points less one, packed along the output dimension
    x.scales    fp16 G O
    x.g_idx     int32 I                        the group of every input

The packing is that of :mod:`lightning_gsq.weights.packing`, transposed. The grid is symmetric, so that every zero
point is 2^(bits - 1); the checkpoint format ``gptq`` stores it less one, a habit of the first implementation that
every reader undoes. Codes of 1 bit and ternary codes are stored as 2 bits.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.export.check import compare
from lightning_gsq.export.companions import write_companions
from lightning_gsq.export.contract import CheckFailedError, CheckReport, ExportOptions, Runtime
from lightning_gsq.export.formats.linear import LinearFormat, linear_bits, other_linear_layers
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.readers.packages import not_checked
from lightning_gsq.export.registry import register
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.export.writer import ShardWriter
from lightning_gsq.gguf.blocks import fp16_scales
from lightning_gsq.weights.ledger import Ledger
from lightning_gsq.weights.packing import pack
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

PACKAGE = "gptqmodel"
BITS = (2, 3, 4, 8)
DTYPE = torch.float16
"""Of the scales, and what readers compute in."""
BLOCK = 32
"""3-bit kernels unpack 32 codes from three words at once."""


def quantization_config(layers: Mapping[str, QuantScheme], others: Sequence[str], writer: str) -> dict[str, Any]:
    """``quantization_config`` of config.json, and the whole of quantize_config.json.

    Args:
        layers: Scheme of every quantized layer, by its name.
        others: Names of the linear layers inside the blocks that are not quantized.
        writer: Name and version of the program that wrote the file, as ``name:version``.
    """
    kinds = {name: (linear_bits(scheme), scheme.group_size) for name, scheme in layers.items()}
    (bits, group_size), _ = Counter(kinds.values()).most_common(1)[0]
    dynamic: dict[str, dict[str, int]] = {f"-:^{re.escape(name)}$": {} for name in others}
    for name, (own_bits, own_size) in kinds.items():
        if (own_bits, own_size) != (bits, group_size):
            dynamic[f"^{re.escape(name)}$"] = {"bits": own_bits, "group_size": own_size}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": dynamic or None,
        "meta": {"quantizer": [writer]},
    }


@register
class GPTQFormat(LinearFormat):
    """GPTQ safetensors."""

    name: ClassVar[str] = "gptq"
    codes: ClassVar[str] = "qweight"
    scales: ClassVar[str] = "scales"
    package: ClassVar[str] = PACKAGE

    def encode(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of one layer.

        Raises:
            ConfigurationError: a scale is no fp16 number.
        """
        bits, (rows, columns) = self.bits(tensor.scheme), tensor.shape
        zero, groups = 2 ** (bits - 1), tensor.scales_OG.shape[1]
        length = tensor.scheme.group_length(columns)
        return {
            "qweight": pack(tensor.codes_OI.to(torch.int16) + zero, bits).T.contiguous(),
            "qzeros": pack(torch.full((groups, rows), zero - 1), bits),
            "scales": fp16_scales(tensor.scales_OG).T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // length,
        }

    def compute_dtype(self, run: PlannedRun) -> torch.dtype:
        """float16, whatever the scales were trained in."""
        return DTYPE

    def stored_bits(self, weight: ExportedWeight, run: PlannedRun) -> float:
        """Codes, and a scale and a zero point a group."""
        bits = self.bits(weight.scheme)
        return bits + (8 * DTYPE.itemsize + bits) / weight.group_length

    def refuse_weight(self, weight: ExportedWeight) -> str | None:
        """Refuses 5 to 7 bits, and 3-bit matrices that are not made of blocks of 32."""
        bits = self.bits(weight.scheme)
        if bits not in BITS:
            return (
                f"{self.name} holds 2, 3, 4 and 8 bits, and {weight.name} has {bits}: gptqmodel reads 5 to 7 bits in "
                "another, planar layout (gptq_p), which is not written; compressed-tensors holds them"
            )
        if bits == 3 and any(size % BLOCK for size in weight.shape):
            return (
                f"{self.name} at 3 bits needs sizes that are multiples of {BLOCK}, and {weight.name} is "
                f"{weight.shape}; compressed-tensors holds it"
            )
        return None

    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        """Writes safetensors, config, quantize_config.json and tokenizer."""
        writer = ShardWriter(folder, options.shard_size)
        self.write_layers(run, writer)
        layers = {weight.stem: weight.scheme for weight in run.weights.values()}
        config = quantization_config(layers, other_linear_layers(run), f"lightning-gsq:{version('lightning-gsq')}")
        write_companions(run, folder, config, DTYPE)
        content = json.dumps(config, indent=2) + "\n"
        (folder / "quantize_config.json").write_text(content, encoding="utf-8")
        return writer.finish()

    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        """Loads it with gptqmodel's torch kernel on the CPU, compared in fp32: fp16 scales become that unchanged."""
        report = not_checked(PACKAGE)
        if report is not None:
            return report
        try:
            loaded = _load(folder, run.model.address.trust_remote_code)
        except Exception as error:  # whatever the package raises, the file is not what it should be
            raise CheckFailedError(f"{PACKAGE} cannot load {folder}: {error}") from error
        return compare(run, loaded.float().eval(), f"{PACKAGE} {version(PACKAGE)}", _dense)

    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        """gptqmodel; others for the widths that they have kernels for."""
        return [Runtime(PACKAGE, "exact", 'GPTQModel.load("{folder}")')]


def _load(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    from gptqmodel import BACKEND, GPTQModel

    options = {"backend": BACKEND.GPTQ_TORCH, "device": "cpu", "dtype": DTYPE, "trust_remote_code": trust_remote_code}
    model: PreTrainedModel = GPTQModel.load(str(folder), **options).model
    return model


def _dense(model: PreTrainedModel, name: str) -> Tensor:
    """A weight as gptqmodel's torch kernel unpacks it, ``O I``."""
    module: Any = model.get_submodule(name.removesuffix(".weight"))
    w_IO: Tensor = module.dequantize_weight()
    return w_IO.T
