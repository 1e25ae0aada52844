"""Sizes and rules are those of llama.cpp."""

import gguf
import pytest

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.types import levels
from lightning_gsq.gguf.types.table import TYPES, GgmlType, fallback_type, type_named
from lightning_gsq.weights.code_vectors import VECTORS
from tests.gguf.llama_cpp import library


@pytest.mark.parametrize("kind", TYPES.values(), ids=str)
def test_sizes_agree_with_llama_cpp_and_the_gguf_package(kind: GgmlType) -> None:
    assert library().ggml_type_name(kind.number).decode().upper() == kind.name
    assert library().ggml_blck_size(kind.number) == kind.length
    assert library().ggml_row_size(kind.number, kind.length) == kind.num_bytes
    assert library().ggml_quantize_requires_imatrix(kind.number) == kind.needs_importance
    if kind.name != "Q2_0":  # which the package does not know
        number = gguf.GGMLQuantizationType(kind.number)
        assert (number.name, gguf.GGML_QUANT_SIZES[number]) == (kind.name, (kind.length, kind.num_bytes))


def test_every_type_is_levels_vectors_or_floats() -> None:
    assert not set(levels.GRIDS) & set(VECTORS)
    assert set(TYPES) == {*levels.GRIDS, *VECTORS, "F32", "F16", "BF16"}


def test_bits_and_rows() -> None:
    assert {name: TYPES[name].bits for name in ("Q4_K", "Q2_K", "IQ1_S", "TQ1_0", "Q6_K", "BF16")} == {
        "Q4_K": 4.5,
        "Q2_K": 2.625,
        "IQ1_S": 1.5625,
        "TQ1_0": 1.6875,
        "Q6_K": 6.5625,
        "BF16": 16.0,
    }
    assert TYPES["Q4_K"].row_bytes(512) == 288
    with pytest.raises(ConfigurationError, match="Q4_K holds rows of whole blocks of 256 weights, got rows of 576"):
        TYPES["Q4_K"].row_bytes(576)


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("Q4_K", 1536, "Q4_K"),
        *((name, 576, "IQ4_NL") for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")),
        ("IQ4_XS", 576, "IQ4_NL"),
        *((name, 576, "Q4_0") for name in ("Q2_K", "Q3_K", "TQ1_0", "TQ2_0")),
        ("Q2_0", 576, "Q2_0"),
        ("Q2_0", 96, "Q4_0"),
        ("Q4_K", 576, "Q5_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q6_K", 576, "Q8_0"),
        ("Q6_K", 80, "F16"),
        ("IQ2_S", 80, "F16"),
        ("F16", 7, "F16"),
    ],
)
def test_fallback(name: str, columns: int, expected: str) -> None:
    assert fallback_type(TYPES[name], columns).name == expected


@pytest.mark.parametrize("name", ["Q1_0", "Q4_0", "Q8_0", "IQ4_NL"])
def test_types_without_a_fallback(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} holds rows .* got rows of 80, .* choose F16"):
        fallback_type(TYPES[name], 80)


def test_names() -> None:
    assert type_named("q4_k") is TYPES["Q4_K"]
    with pytest.raises(ConfigurationError, match="Q4K is no ggml type; the nearest is Q4_K, and all are F32, F16"):
        type_named("Q4K")
