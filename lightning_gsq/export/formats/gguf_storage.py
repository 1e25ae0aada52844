"""The type in which each matrix of a run lies in a GGUF file, and the file that the run came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import torch
from gguf import GGMLQuantizationType
from transformers import PretrainedConfig

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.gguf.blocks import BLOCK_TYPES, exact_type
from lightning_gsq.gguf.file import Field, GGUFFile
from lightning_gsq.gguf.types.table import GgmlType
from lightning_gsq.models.config import sliding_windows
from lightning_gsq.quantizers.from_file import SCHEMES
from lightning_gsq.weights.scheme import QuantScheme

FILE = "model.gguf"
WINDOW = ".attention.sliding_window"
NAMED_ALONE = {f"phi3{WINDOW}"}
"""Windows that a file names and llama.cpp does not apply."""
F32, F16 = int(GGMLQuantizationType.F32), int(GGMLQuantizationType.F16)
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
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return 8 * torch.float16.itemsize if self.kind is None else 8 * self.kind.num_bytes / self.kind.length

    @property
    def name(self) -> str:
        """llama.cpp's name of the type."""
        return "F16" if self.kind is None else self.kind.name

    @property
    def number(self) -> int:
        """ggml's number of the type."""
        return F16 if self.kind is None else self.kind.number


def fitting_schemes(in_features: int) -> list[tuple[QuantScheme, float, str]]:
    """Schemes that fill a block type for rows of this length, with its bits a weight and its name, smallest first."""
    return [
        (scheme, 8 * kind.num_bytes / kind.length, kind.name)
        for kind in BLOCK_TYPES.values()
        for scheme in [SCHEMES[kind.number]]
        if exact_type(scheme, in_features) is kind
    ]


def source_file(run: PlannedRun) -> GGUFFile | None:
    """The GGUF file whose remaining contents an export keeps; None for a run that has none.

    That is the file whose codes the run started from (``FromFile``), or the one that holds its original model.

    Raises:
        ConfigurationError: the file is not there or cannot be read.
    """
    if run.start_file is not None:
        return GGUFFile(run.start_file)
    source = run.model.address.source()
    if source.gguf_file is None:
        return None
    if not source.files:
        raise ConfigurationError(
            f"format: gguf: download {run.address} first and start the run from the local file, whose key-values are "
            "copied"
        )
    return GGUFFile(source.files[0])


def same_up_to(config: PretrainedConfig, fields: Mapping[str, Field]) -> int | None:
    """Tokens after which llama.cpp attends to more than the model does, for lack of a sliding window; None if never.

    Args:
        config: The model's configuration.
        fields: The key-values of its file.
    """
    windows = [window for window in sliding_windows(config) if window is not None]
    applied = any(key.endswith(WINDOW) and key not in NAMED_ALONE for key in fields)
    return min(windows) if windows and not applied else None
