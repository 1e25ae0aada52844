"""The start that llama.cpp's own quantizers give: codes, scales and offsets, bit for bit what its program writes.

They search longer for scales than plain rounding does, and weigh errors by an importance of each column, as
``llama-quantize --imatrix`` does. They run in a process of their own (:mod:`lightning_gsq.gguf.quantizer`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import exact_type, tensor_of
from lightning_gsq.gguf.quantizer import library_path, quantize_with_llama_cpp
from lightning_gsq.gguf.types.codec import decode
from lightning_gsq.gguf.types.levels import LevelBlocks
from lightning_gsq.gguf.types.table import TYPES, GgmlType
from lightning_gsq.gguf.types.vectors import VectorBlocks
from lightning_gsq.quantizers.warm_start import Start, WarmStart, start_at
from lightning_gsq.weights.presets import GGML, preset_named
from lightning_gsq.weights.scheme import QuantScheme


class LlamaCpp(WarmStart):
    """What llama.cpp's quantizer makes of a weight, for schemes that are types of ggml.

    Args:
        weighted: Weigh each weight's squared error by its input's second moment, or by ``model.imatrix``; otherwise
            llama.cpp's own weights, which follow from the matrix alone.
    """

    diagonal_only = True

    def __init__(self, weighted: bool = True) -> None:
        self.needs_hessian = self.weighted = weighted

    def check(self, weights: Mapping[str, tuple[QuantScheme, tuple[int, int]]]) -> None:
        """Verifies that every scheme is a type of ggml, and that the quantizers are installed.

        Raises:
            ConfigurationError: one is not, or they are not.
        """
        library_path()
        for name, (scheme, (_, columns)) in weights.items():
            kind = _type_of(scheme, columns, name)
            if kind.needs_importance and not self.weighted:
                raise ConfigurationError(
                    f"model.warm_start.weighted: llama.cpp makes no {kind.name} ({name}) without an importance of "
                    "every input, got false; use true"
                )

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """See :meth:`WarmStart.__call__`.

        Raises:
            ConfigurationError: the scheme is no type of ggml, or llama.cpp fails.
        """
        kind = _type_of(scheme, w_OI.shape[1], "a weight")
        importance_I = None if hessian_II is None or not self.weighted else hessian_II.diagonal() / 2  # of 2 x xᵀ
        if importance_I is not None and not bool(importance_I.any()):  # no token came here
            importance_I = None
        if importance_I is None and kind.needs_importance:
            importance_I = w_OI.new_ones(w_OI.shape[1])
        blocks = decode(quantize_with_llama_cpp(w_OI, kind, importance_I), kind)
        assert isinstance(blocks, LevelBlocks | VectorBlocks)  # as every type that has a preset is
        return start_at(tensor_of(blocks), w_OI)


def _type_of(scheme: QuantScheme, columns: int, name: str) -> GgmlType:
    preset = None if scheme.preset is None else preset_named(scheme.preset)
    if preset is not None and preset.ggml is not None:
        return TYPES[preset.ggml]
    kind = None if scheme.mixed else exact_type(scheme, columns)
    nearest = "" if kind is None else f" (as --model.scheme {kind.name.lower()} is)"
    raise ConfigurationError(
        f"model.warm_start: llama.cpp quantizes to its own types, and {name} is {scheme}; choose a scheme that is one"
        f"{nearest}: {', '.join(GGML)}, or another start, such as --model.warm_start RTN"
    )
