"""MLX: ``mlx_lm`` on a Mac loads it, and on the CPU of any machine.

A linear layer ``x`` is stored as

    x.weight    uint32 O (I bits / 32)    the codes, counted from 0: the packing of lightning_gsq.weights.packing
    x.scales    O G                       what a step of the code is worth
    x.biases    O G                       what the code 0 is worth

so that a weight is ``scales * code + biases``. With a group's scale ``s``, both are ``s`` times a power of two: ``s``
and ``-2^(bits - 1) s``, at 1 bit ``2 s`` and ``-s``; a scheme with offsets has them as biases. Nothing is rounded.
``quantization`` in config.json names bits and group size of most layers, and by name those of the others. A quantized
embedding is such a layer too: its rows are unpacked as they are looked up, and a head that is tied to it multiplies
with it.

Layers compute in the dtype of their scales, and what is not quantized is stored in that dtype too: mixed with another
one of 16 bits, MLX would compute everything in fp32.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.check import PERPLEXITY_TOKENS, compare
from lightning_gsq.export.companions import write_companions, written_config
from lightning_gsq.export.contract import CheckReport, ExportOptions, Runtime
from lightning_gsq.export.formats.linear import LinearFormat
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.readers import mlx
from lightning_gsq.export.readers.packages import missing, not_checked
from lightning_gsq.export.registry import register
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.export.writer import ShardWriter
from lightning_gsq.models.config import sliding_windows
from lightning_gsq.weights.layout import OFFSETS
from lightning_gsq.weights.ledger import Ledger
from lightning_gsq.weights.packing import pack
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


@register
class MLXFormat(LinearFormat):
    """MLX safetensors."""

    name: ClassVar[str] = "mlx"
    codes: ClassVar[str] = "weight"
    scales: ClassVar[str] = "scales"
    levels: ClassVar[str] = "evenly spaced levels with a scale, or a scale and an offset,"
    outer: ClassVar[bool] = True
    package: ClassVar[str] = mlx.PACKAGE

    def bits(self, scheme: QuantScheme) -> int:
        """Those of the packed code; ternary takes two."""
        return scheme.storage_bits

    def encode(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """``weight``, ``scales`` and ``biases`` of one layer.

        Raises:
            ConfigurationError: a bias does not fit the dtype of the scales.
        """
        grid, scales_OG = tensor.scheme.grid, tensor.scales_OG.cpu().contiguous()
        offsets_OG = tensor.others.get(OFFSETS)
        biases_OG = grid.origin * scales_OG if offsets_OG is None else offsets_OG.cpu().contiguous()
        if not bool(torch.isfinite(biases_OG).all()):
            raise ConfigurationError(
                f"mlx: a scale of {float(scales_OG.abs().max()):.3g} times {grid.origin} is more than "
                f"{scales_OG.dtype} holds; quantize with --model.scale_dtype bfloat16"
            )
        return {
            "weight": pack(grid.store(tensor.codes_OI), grid.storage_bits).view(torch.uint32),
            "scales": grid.step * scales_OG,
            "biases": biases_OG,
        }

    def holds(self, scheme: QuantScheme) -> bool:
        """Evenly spaced levels with floats a group: a scale, or a scale and an offset to codes from 0 on."""
        layout, grid = scheme.layout, scheme.grid
        return layout.sub_scales is None and grid.table is None and not (layout.offset and grid.origin)

    def refuse_weight(self, weight: ExportedWeight) -> str | None:
        """Refuses 7 bits, and groups that MLX has no kernels for."""
        bits, length = self.bits(weight.scheme), weight.group_length
        if bits not in BITS:
            return f"mlx has no kernels for {bits} bits ({weight.name}); it holds 1 to 6 and 8 bits{_way(weight)}"
        if length not in GROUPS:
            return (
                f"mlx holds groups of 32, 64 and 128 weights, and {weight.name} has groups of {length}, for which it "
                "computes wrong numbers without an error; choose --model.scheme.group_size 32, 64 or 128"
                f"{_way(weight)}"
            )
        if weight.shape[1] % length:
            return (
                f"mlx needs rows of whole groups of {length}, and {weight.name} has {weight.shape[1]} weights a row"
                f"{_way(weight)}"
            )
        return None

    def refuse(self, run: PlannedRun) -> str | None:
        """Refuses what layers cannot hold, and models that ``mlx_lm`` does not know, build or compute."""
        return super().refuse(run) or mlx.refuse_architecture(run.config.model_type) or self._refuse_model(run)

    def _refuse_model(self, run: PlannedRun) -> str | None:
        if missing(mlx.PACKAGE):
            return None
        layers = {
            weight.stem: mlx.Layer(weight.shape, self.bits(weight.scheme), weight.group_length)
            for weight in run.weights.values()
        }
        others = {name: tuple(run.values[name].shape) for name in run.other_names()}
        reason = mlx.why_not_built(self._config(run), layers, others)
        if reason:
            return f"{reason}; use native, or dequantized"
        window = self._window_left_out(run)
        if window is None or window >= PERPLEXITY_TOKENS:
            return None
        # Where blocks are of kinds, transformers takes a null for a window that is lacking.
        way = (
            ""
            if getattr(run.config, "layer_types", None)
            else ', or quantize a copy of the model without a window ("sliding_window": null in its config.json)'
        )
        return (
            f"mlx_lm computes a {run.config.model_type} without its sliding window, and so other numbers after "
            f"{window:,} tokens, too few to check the file; use native or dequantized{way}"
        )

    def _window_left_out(self, run: PlannedRun) -> int | None:
        """Tokens after which ``mlx_lm`` attends to more than the model does; None if never, or if it is not there."""
        windows = [window for window in sliding_windows(run.config) if window is not None]
        if not windows or missing(mlx.PACKAGE):
            return None
        return None if Counter(windows) <= Counter(mlx.windows_of(self._config(run))) else min(windows)

    def _config(self, run: PlannedRun) -> dict[str, Any]:
        """config.json, but for what only other programs read."""
        written: dict[str, Any] = json.loads(written_config(run, None, self.compute_dtype(run)).to_json_string())
        return written | legacy_rotary(run.config)

    def stored_bits(self, weight: ExportedWeight, run: PlannedRun) -> float:
        """Codes, and a scale and a bias a group."""
        return self.bits(weight.scheme) + 16 * run.scale_dtype.itemsize / weight.group_length

    def plain(self, name: str, run: FinishedRun) -> Tensor:
        """In the dtype of the scales."""
        value = super().plain(name, run)
        return value.to(self.compute_dtype(run)) if value.is_floating_point() else value

    def remarks(self, run: PlannedRun) -> list[str]:
        """Says what MLX computes in, and how far without the model's window."""
        remarks = []
        if run.scale_dtype == torch.float16:
            remarks.append(
                "computes in float16, the dtype of the scales; for a model whose hidden states exceed 65504 (Gemma 3), "
                "quantize with --model.scale_dtype bfloat16"
            )
        if (window := self._window_left_out(run)) is not None:
            remarks.append(
                f"mlx_lm computes a {run.config.model_type} without its sliding window: the same for texts of up to "
                f"{window:,} tokens; after that it attends to more, and gives other numbers"
            )
        return remarks

    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        """Writes safetensors, config and tokenizer."""
        writer = ShardWriter(folder, options.shard_size)
        self.write_layers(run, writer)
        quantization = quantization_config({weight.stem: weight.scheme for weight in run.weights.values()}, self.bits)
        more = {"quantization": quantization, **legacy_rotary(run.config)}
        named = {"quant_method": "mlx", **quantization}  # for programs that look there; mlx_lm does not
        write_companions(run, folder, named, self.compute_dtype(run), more)
        return writer.finish()

    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        """Loads it with ``mlx_lm`` on the CPU, compared in fp32: 16-bit scales become that unchanged."""
        report = not_checked(mlx.PACKAGE)
        if report is not None:
            return report
        loaded = mlx.load(folder)
        return compare(run, loaded, f"{mlx.PACKAGE} {mlx.version()}", mlx.LoadedModel.dense)

    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        """MLX."""
        return [
            Runtime("mlx_lm", "exact", "mlx_lm.chat --model {folder}"),
            Runtime("mlx_lm server", "exact", "mlx_lm.server --model {folder}"),
        ]


def _way(weight: ExportedWeight) -> str:
    """What else to do about a weight outside of the blocks, whose scheme has an option of its own."""
    return "" if weight.block is not None else "; for this one: --model.embedding (or head) w8g32, or null"


def quantization_config(layers: Mapping[str, QuantScheme], bits: Any) -> dict[str, Any]:
    """``quantization`` of config.json.

    Args:
        layers: Scheme of every quantized layer, by its name.
        bits: Gives the bits of a scheme's stored codes.
    """
    kinds = {name: {"group_size": scheme.group_size, "bits": bits(scheme)} for name, scheme in layers.items()}
    (usual, _), *_ = Counter(tuple(kind.items()) for kind in kinds.values()).most_common(1)
    others = {name: kind for name, kind in kinds.items() if tuple(kind.items()) != usual}
    return {**dict(usual), "mode": "affine", **others}


def legacy_rotary(config: PretrainedConfig) -> dict[str, Any]:
    """Rotary settings under the names from before transformers 5, by which most of ``mlx_lm``'s models read them.

    Without them such a model would rotate by a default base, and write nonsense.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    layers = rope if "rope_theta" not in rope and all(isinstance(part, dict) for part in rope.values()) else {}
    whole = layers.get("full_attention", rope)
    fields: dict[str, Any] = {"rope_theta": whole["rope_theta"]} if "rope_theta" in whole else {}
    if "sliding_attention" in layers:
        fields["rope_local_base_freq"] = layers["sliding_attention"]["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {key: value for key, value in whole.items() if key != "rope_theta"}
    return fields
