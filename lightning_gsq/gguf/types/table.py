"""Every ggml type that holds weights: number, block, bits, and what llama.cpp takes instead for rows it cannot hold."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lightning_gsq.errors import ConfigurationError


@dataclass(frozen=True)
class GgmlType:
    """A ggml type.

    Args:
        name: As llama.cpp calls it.
        number: As it stands in a file.
        length: Weights in a block.
        num_bytes: Bytes of a block.
        needs_importance: Whether llama.cpp's quantizer ends the process when it is given no importance.
    """

    name: str
    number: int
    length: int
    num_bytes: int
    needs_importance: bool = False

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.num_bytes / self.length

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights.

        Raises:
            ConfigurationError: the row is no whole blocks.
        """
        if columns % self.length:
            raise ConfigurationError(
                f"{self.name} holds rows of whole blocks of {self.length} weights, got rows of {columns}"
            )
        return columns // self.length * self.num_bytes


TYPES = {
    kind.name: kind
    for kind in (
        GgmlType("F32", 0, 1, 4),
        GgmlType("F16", 1, 1, 2),
        GgmlType("BF16", 30, 1, 2),
        GgmlType("Q4_0", 2, 32, 18),
        GgmlType("Q4_1", 3, 32, 20),
        GgmlType("Q5_0", 6, 32, 22),
        GgmlType("Q5_1", 7, 32, 24),
        GgmlType("Q8_0", 8, 32, 34),
        GgmlType("Q2_K", 10, 256, 84),
        GgmlType("Q3_K", 11, 256, 110),
        GgmlType("Q4_K", 12, 256, 144),
        GgmlType("Q5_K", 13, 256, 176),
        GgmlType("Q6_K", 14, 256, 210),
        GgmlType("IQ2_XXS", 16, 256, 66, needs_importance=True),
        GgmlType("IQ2_XS", 17, 256, 74, needs_importance=True),
        GgmlType("IQ3_XXS", 18, 256, 98),
        GgmlType("IQ1_S", 19, 256, 50, needs_importance=True),
        GgmlType("IQ4_NL", 20, 32, 18),
        GgmlType("IQ3_S", 21, 256, 110),
        GgmlType("IQ2_S", 22, 256, 82),
        GgmlType("IQ4_XS", 23, 256, 136),
        GgmlType("IQ1_M", 29, 256, 56),
        GgmlType("TQ1_0", 34, 256, 54),
        GgmlType("TQ2_0", 35, 256, 66),
        GgmlType("Q1_0", 41, 128, 18),
        GgmlType("Q2_0", 42, 64, 18),
    )
}
"""By name, in the order of their families."""
BY_NUMBER = {kind.number: kind for kind in TYPES.values()}

_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def type_named(name: str) -> GgmlType:
    """The type of a name, in capitals or not.

    Raises:
        ConfigurationError: there is none; the nearest is named.
    """
    kind = TYPES.get(name.upper())
    if kind is None:
        near = difflib.get_close_matches(name.upper(), TYPES, n=1, cutoff=0.0)[0]
        raise ConfigurationError(f"{name} is no ggml type; the nearest is {near}, and all are {', '.join(TYPES)}")
    return kind


def fallback_type(kind: GgmlType, columns: int) -> GgmlType:
    """The type in which llama.cpp stores rows of a length that the wanted type cannot hold.

    The rule is that of ``tensor_type_fallback`` in llama.cpp's ``src/llama-quant.cpp``: where rows are no whole blocks,
    IQ1, IQ2, IQ3 and IQ4_XS become IQ4_NL, Q2_0, Q2_K, Q3_K, TQ1_0 and TQ2_0 become Q4_0, Q4_K becomes Q5_0, Q5_K
    becomes Q5_1 and Q6_K becomes Q8_0; rows that are no multiple of 32 either become F16.

    Args:
        kind: The wanted type.
        columns: Weights of a row.

    Returns:
        ``kind`` itself where it holds such rows.

    Raises:
        ConfigurationError: llama.cpp names no other type for this one (Q1_0, and the types with blocks of 32).
    """
    if columns % kind.length == 0:
        return kind
    other = _FALLBACKS.get(kind.name)
    if other is None:
        raise ConfigurationError(
            f"{kind.name} holds rows of whole blocks of {kind.length} weights, got rows of {columns}, and llama.cpp "
            "names no other type for it; choose F16 for these weights"
        )
    return TYPES["F16"] if columns % TYPES[other].length else TYPES[other]
