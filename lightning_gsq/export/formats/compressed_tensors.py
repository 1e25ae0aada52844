"""The compressed-tensors format ``pack-quantized``: transformers, vLLM and SGLang load it.

A linear layer ``x`` is stored as

    x.weight_packed    int32 O ceil(I bits / 32)   code + 2^(bits - 1), the packing of lightning_gsq.weights.packing
    x.weight_scale     O G
    x.weight_shape     int64 (O, I)

and ``quantization_config`` in config.json says which layers those are: one config group for every pair of bits and
group size, with the layers' names as targets, and an ignore list for linear layers that were not quantized. Codes of
1 bit (-1, +1) and ternary codes (-1, 0, +1) are stored as 2 bits, the narrowest grid of the format that holds them.

A runtime multiplies codes by scales in the dtype that the model is loaded with. config.json therefore names the scales'
dtype rather than the original model's: with any other of 16 bits, loading would round the scales first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.export.check import compare_model
from lightning_gsq.export.companions import write_companions
from lightning_gsq.export.contract import CheckReport, ExportOptions, Runtime
from lightning_gsq.export.formats.linear import LinearFormat, linear_bits, other_linear_layers
from lightning_gsq.export.planned import ExportedWeight
from lightning_gsq.export.readers.packages import not_checked
from lightning_gsq.export.registry import register
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.export.writer import ShardWriter
from lightning_gsq.weights.ledger import Ledger
from lightning_gsq.weights.packing import pack
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

PACKAGE = "compressed-tensors"
SERVED_EVERYWHERE = {4, 8}
"""Bits that every vLLM and SGLang has kernels for; 2, 3 and 5 to 7 bits need a vLLM with Humming's."""


def quantization_config(layers: Mapping[str, tuple[QuantScheme, int]], ignore: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json.

    Args:
        layers: Scheme and ``I`` of every quantized layer, by its name.
        ignore: Names of the linear layers that are not quantized.
    """
    groups: dict[tuple[int, int | None], list[str]] = {}
    for name, (scheme, in_features) in layers.items():
        length = None if scheme.num_groups(in_features) == 1 else scheme.group_length(in_features)
        groups.setdefault((linear_bits(scheme), length), []).append(name)
    return {
        "quant_method": PACKAGE,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if length is None else "group",
                    "group_size": length,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for index, ((bits, length), names) in enumerate(groups.items())
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


@register
class CompressedTensorsFormat(LinearFormat):
    """``pack-quantized`` safetensors."""

    name: ClassVar[str] = PACKAGE
    codes: ClassVar[str] = "weight_packed"
    scales: ClassVar[str] = "weight_scale"
    package: ClassVar[str] = PACKAGE
    outside: ClassVar[bool] = True

    def encode(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """``weight_packed``, ``weight_scale`` and ``weight_shape`` of one layer."""
        bits = self.bits(tensor.scheme)
        return {
            "weight_packed": pack(tensor.codes_OI.to(torch.int16) + 2 ** (bits - 1), bits),
            "weight_scale": tensor.scales_OG.cpu().contiguous(),
            "weight_shape": torch.tensor(tensor.shape),
        }

    def refuse_weight(self, weight: ExportedWeight) -> str | None:
        """Refuses rows that end inside a group."""
        in_features = weight.site.in_features
        if in_features % weight.group_length == 0:
            return None
        return (
            f"{self.name} needs rows of whole groups, and {weight.name} has {in_features} weights a row in groups of "
            f"{weight.scheme.group_size}; native holds it"
        )

    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        """Writes safetensors, config and tokenizer."""
        writer = ShardWriter(folder, options.shard_size)
        self.write_layers(run, writer)
        layers = {weight.stem: (weight.scheme, weight.site.in_features) for weight in run.weights.values()}
        write_companions(run, folder, quantization_config(layers, other_linear_layers(run)), run.scale_dtype)
        return writer.finish()

    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        """Loads it with transformers and the compressed-tensors package."""
        return not_checked(PACKAGE) or compare_model(run, folder, PACKAGE, _dense)

    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        """transformers; vLLM and SGLang by the width."""
        runtimes = [Runtime("transformers", "exact", '{auto_class}.from_pretrained("{folder}")')]
        if {self.bits(weight.scheme) for weight in weights} <= SERVED_EVERYWHERE:
            runtimes.append(Runtime("vLLM", "exact (not run here)", "vllm serve {folder}"))
            runtimes.append(
                Runtime("SGLang", "exact (not run here)", "python -m sglang.launch_server --model-path {folder}")
            )
        else:
            runtimes.append(Runtime("vLLM with Humming kernels, GPU", "exact (not run here)", "vllm serve {folder}"))
        return runtimes


def _dense(model: PreTrainedModel, name: str) -> Tensor:
    """A weight as the package itself unpacks it."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    module: Any = model.get_submodule(name.removesuffix(".weight"))
    if "weight_packed" not in dict(module.named_parameters()):
        return module.weight
    state = {key: value.data for key, value in module.named_parameters()}
    return PackedQuantizationCompressor.decompress(state, module.quantization_scheme)["weight"]
