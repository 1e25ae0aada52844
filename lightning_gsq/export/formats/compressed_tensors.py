"""The compressed-tensors format ``pack-quantized``: transformers, vLLM and SGLang load it.

A linear layer ``x`` is stored as

    x.weight_packed    int32 O ceil(I bits / 32)   code + 2^(bits - 1), the packing of lightning_gsq.weights.packing
    x.weight_scale     O G
    x.weight_shape     int64 (O, I)

and ``quantization_config`` in config.json says which layers those are: one config group for every pair of bits and
group size, with the layers' names as targets, and an ignore list for layers that were not quantized. Codes of 1 bit
(-1, +1) and ternary codes (-1, 0, +1) are stored as 2 bits, the narrowest grid of the format that holds them.

Layers have the names of the family's own checkpoints, fused experts those of each expert's matrices
(:mod:`lightning_gsq.export.formats.expert_tensors`). vLLM wants all matrices of a block's experts alike. transformers
keeps layers packed; experts, and models whose code does not bear packed layers, it unpacks when it loads them
(``dequantize``), for which it knows one scheme for all experts and one for everything else.

A runtime multiplies codes by scales in the dtype that the model is loaded with. config.json therefore names the scales'
dtype rather than the original model's: with any other of 16 bits, loading would round the scales first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.export.check import compare, compare_model
from lightning_gsq.export.companions import file_names, write_companions
from lightning_gsq.export.contract import CheckReport, ExportOptions, Runtime
from lightning_gsq.export.formats.expert_tensors import expert_stems, parents, patterns, stem_of
from lightning_gsq.export.formats.linear import LinearFormat, linear_bits
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.readers.compressed_tensors import LINEAR, PACKAGE, unpacked_model, why_not_packed
from lightning_gsq.export.readers.packages import not_checked
from lightning_gsq.export.registry import register
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.export.writer import ShardWriter
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.weights.ledger import Ledger
from lightning_gsq.weights.packing import pack
from lightning_gsq.weights.quantized import QuantizedTensor

SERVED_EVERYWHERE = {4, 8}
"""Bits that every vLLM and SGLang has kernels for; 2, 3 and 5 to 7 bits need a vLLM with Humming's."""


Kind = tuple[int, int | None]
"""Bits, and the group size; None for one scale a row."""


def quantization_config(targets: Mapping[str, Kind], ignore: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json.

    Args:
        targets: What is stored of every quantized layer, by its name or by a pattern for experts.
        ignore: Names and patterns of the layers that are not quantized.
    """
    groups: dict[Kind, list[str]] = {}
    for name, kind in targets.items():
        groups.setdefault(kind, []).append(name)
    return {
        "quant_method": PACKAGE,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": [LINEAR] if len(groups) == 1 else names,
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


def kind_of(weight: ExportedWeight) -> Kind:
    """What is stored of a weight. One group a row is one scale a row, but for experts whose rows are one group long:
    all matrices of an expert are read alike."""
    scheme, columns = weight.scheme, weight.site.in_features
    whole = scheme.group_size < 0 if weight.site.experts else scheme.num_groups(columns) == 1
    return linear_bits(scheme), None if whole else scheme.group_length(columns)


@register
class CompressedTensorsFormat(LinearFormat):
    """``pack-quantized`` safetensors."""

    name: ClassVar[str] = PACKAGE
    codes: ClassVar[str] = "weight_packed"
    scales: ClassVar[str] = "weight_scale"
    package: ClassVar[str] = PACKAGE
    outside: ClassVar[bool] = True
    family_names: ClassVar[bool] = True

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

    def refuse_weights(self, run: PlannedRun) -> str | None:
        """The same, and experts of a block that differ."""
        reason = super().refuse_weights(run)
        if reason is not None:
            return reason
        first: dict[str, ExportedWeight] = {}
        for weight in run.weights.values():
            for parent in parents(expert_stems(run, weight)) if weight.site.experts else ():
                other = first.setdefault(parent, weight)
                if kind_of(other) != kind_of(weight):
                    return (
                        "vLLM reads all matrices of a block's experts with the same bits and group size, "
                        f"and {other.name} is {_words(other)}, {weight.name} {_words(weight)}; give them one scheme, "
                        "or export to native"
                    )
        return None

    def refuse(self, run: PlannedRun) -> str | None:
        """The same, and models that transformers cannot load with such weights, packed or not."""
        return super().refuse(run) or self._refuse_model(run)

    def _refuse_model(self, run: PlannedRun) -> str | None:
        experts = [weight for weight in run.weights.values() if weight.site.experts]
        others = _fused_experts(run)
        if experts and others:
            return (
                f"transformers reads the experts of all blocks quantized, or of none, and {others[0]} is "
                "not; export to native or dequantized"
            )
        reason = None if experts else why_not_packed(run, self._configuration(run))
        if reason is not None and not readable(run.weights.values()):
            return (
                f"transformers loads no {type(run.network).__name__} packed ({reason}), and unpacks one "
                "scheme alone; give all weights the same bits and group size, or export to native"
            )
        return None

    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        """Writes safetensors, config and tokenizer."""
        writer = ShardWriter(folder, options.shard_size)
        self.write_layers(run, writer)
        configuration = self._configuration(run)
        if self._unpacks(run):
            configuration["dequantize"] = True  # transformers' own switch, which other readers pass over
        write_companions(run, folder, configuration, run.scale_dtype)
        return writer.finish()

    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        """Loads it with transformers and the compressed-tensors package, or with the package alone."""
        report = not_checked(PACKAGE)
        if report is not None:
            return report
        if not readable(run.weights.values()) and any(weight.site.experts for weight in run.weights.values()):
            loaded, runtime = unpacked_model(run, folder), f"{PACKAGE} {version(PACKAGE)}"
            return compare(run, loaded.eval(), runtime, nn.Module.get_parameter, run.scale_dtype)
        if self._unpacks(run):
            report = compare_model(run, folder, PACKAGE, rounded_to=run.scale_dtype, as_stored=False)
            notes = ["unpacked by transformers when it loads", report.note]
            return replace(report, note=", ".join(filter(None, notes)))
        return compare_model(run, folder, PACKAGE, _dense, as_stored=False)

    def _unpacks(self, run: PlannedRun) -> bool:
        """Whether transformers has to unpack all layers when it loads them, and can."""
        if not readable(run.weights.values()):
            return False
        experts = any(weight.site.experts for weight in run.weights.values())
        return experts or why_not_packed(run, self._configuration(run)) is not None

    def _configuration(self, run: PlannedRun) -> dict[str, Any]:
        """``quantization_config`` of a run's folder."""
        targets: dict[str, Kind] = {}
        experts: dict[str, Kind] = {}
        for weight in run.weights.values():
            if weight.site.experts:
                experts |= dict.fromkeys(parents(expert_stems(run, weight)), kind_of(weight))
            else:
                targets |= dict.fromkeys(_stems(run, weight.name), kind_of(weight))
        ignore = [stem for name in _left_alone(run) for stem in _stems(run, f"{name}.weight")]
        ignore += patterns(dict.fromkeys(_fused_experts(run)))
        return quantization_config(targets | patterns(experts), ignore)

    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        """transformers; vLLM and SGLang by the width."""
        runtimes = []
        if readable(weights):
            runtimes.append(Runtime("transformers", "exact", '{auto_class}.from_pretrained("{folder}")'))
        if {self.bits(weight.scheme) for weight in weights} <= SERVED_EVERYWHERE:
            runtimes.append(Runtime("vLLM", "exact (not run here)", "vllm serve {folder}"))
            runtimes.append(
                Runtime("SGLang", "exact (not run here)", "python -m sglang.launch_server --model-path {folder}")
            )
        else:
            runtimes.append(Runtime("vLLM with Humming kernels, GPU", "exact (not run here)", "vllm serve {folder}"))
        return runtimes


def readable(weights: Iterable[ExportedWeight]) -> bool:
    """Whether transformers knows schemes enough to unpack all of these: one for experts, one for everything else.

    Without experts it says whether it could, should it be unable to keep the layers packed.
    """
    of_experts = {kind_of(weight) for weight in weights if weight.site.experts}
    of_others = {kind_of(weight) for weight in weights if not weight.site.experts}
    return len(of_experts) <= 1 and len(of_others) <= 1


def _words(weight: ExportedWeight) -> str:
    bits, length = kind_of(weight)
    return f"{bits} bits, " + ("a scale a row" if length is None else f"groups of {length}")


def _stems(run: PlannedRun, name: str) -> list[str]:
    """A layer's name in files, by which vLLM knows it, and its name in the model, by which transformers does."""
    return list(dict.fromkeys([stem_of(run, name), name.removesuffix(".weight")]))


def _left_alone(run: PlannedRun) -> list[str]:
    """Names of modules that a reader may build as a linear layer, such as routers, and that are not quantized."""
    quantized = {weight.stem for weight in run.weights.values()}
    prefix, _ = find_blocks(run.network)
    names = []
    for name, module in run.network.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        matrix = weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
        if name not in quantized and (isinstance(module, nn.Linear) or (matrix and name.startswith(f"{prefix}."))):
            names.append(name)
    return names


def _fused_experts(run: PlannedRun) -> list[str]:
    """The parents of experts that are fused in memory, by themselves in files, and not quantized."""
    stems: list[str] = []
    for name, parameter in run.network.named_parameters():
        if parameter.ndim == 3 and name not in run.weights:
            stems += (file.removesuffix(".weight") for file in file_names(run, {name: parameter.to("meta")}))
    return sorted(parents(stems))


def _dense(model: PreTrainedModel, name: str) -> Tensor:
    """A weight as the package itself unpacks it."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    module: Any = model.get_submodule(name.removesuffix(".weight"))
    if "weight_packed" not in dict(module.named_parameters()):
        return module.weight
    state = {key: value.data for key, value in module.named_parameters()}
    return PackedQuantizationCompressor.decompress(state, module.quantization_scheme)["weight"]
