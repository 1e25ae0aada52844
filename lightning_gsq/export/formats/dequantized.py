"""An ordinary Hugging Face folder at 16 bits: larger, but everything reads it.

Each weight is ``code * scale``, computed in fp32 and rounded once to the stored dtype. fp16 scales have 11 significant
bits and bf16 weights 8, so a bf16 file rounds; ``--model.output_dtype float32`` keeps every weight exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lightning_gsq.export.check import compare_model
from lightning_gsq.export.companions import file_names, write_companions
from lightning_gsq.export.contract import CheckReport, ExportFormat, ExportOptions, Runtime
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.registry import register
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.export.writer import ShardWriter
from lightning_gsq.weights.ledger import Ledger


@register
class DequantizedFormat(ExportFormat):
    """Plain safetensors."""

    name: ClassVar[str] = "dequantized"
    salient: ClassVar[bool] = True
    outer: ClassVar[bool] = True
    outside: ClassVar[bool] = True

    def refuse(self, run: PlannedRun) -> str | None:
        """Holds everything."""
        return None

    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        """Writes ``model.safetensors`` (or shards), config and tokenizer."""
        writer = ShardWriter(folder, options.shard_size)
        for names in run.units():
            values = {
                name: run.dense(name, run.dtype) if name in run.weights else run.parameter(name) for name in names
            }
            for name, value in file_names(run, values).items():
                writer.add_plain(name, value)
        write_companions(run, folder, None)
        return writer.finish()

    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        """Loads it with transformers."""
        return compare_model(run, folder, "transformers", rounded_to=run.dtype)

    def stored_bits(self, weight: ExportedWeight, run: PlannedRun) -> float:
        """Those of the stored dtype."""
        return 8.0 * run.dtype.itemsize

    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        """Everything that reads Hugging Face folders."""
        usage = '{auto_class}.from_pretrained("{folder}")'
        exactness = "rounded to the stored dtype"
        return [
            Runtime("transformers", exactness, usage),
            Runtime("vLLM", exactness, "vllm serve {folder}"),
            Runtime("SGLang", exactness, "python -m sglang.launch_server --model-path {folder}"),
        ]
