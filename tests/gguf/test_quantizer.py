"""llama.cpp's quantizers run in a process of their own, whose end ends nothing else."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec

import gguf
import numpy as np
import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf import quantizer
from lightning_gsq.gguf.quantizer import QuantizerProcess, library_path, quantize_with_llama_cpp
from lightning_gsq.gguf.types.codec import decode, dequantize, encode
from lightning_gsq.gguf.types.table import TYPES, GgmlType

COLUMNS = 512
ERRORS = {
    "F32": 0.0,
    "F16": 0.00021,
    "BF16": 0.0017,
    "Q8_0": 0.0053,
    "Q6_K": 0.0176,
    "Q5_K": 0.0357,
    "Q5_1": 0.0343,
    "Q5_0": 0.0408,
    "Q4_1": 0.0709,
    "Q4_K": 0.0717,
    "IQ4_NL": 0.0756,
    "IQ4_XS": 0.0762,
    "Q4_0": 0.0823,
    "IQ3_S": 0.141,
    "Q3_K": 0.146,
    "IQ3_XXS": 0.189,
    "IQ2_S": 0.255,
    "Q2_K": 0.274,
    "IQ2_XS": 0.309,
    "IQ2_XXS": 0.352,
    "IQ1_M": 0.473,
    "IQ1_S": 0.503,
    "Q1_0": 0.6,
    "Q2_0": 0.718,
    "TQ1_0": 0.808,
    "TQ2_0": 0.808,
}
"""Of normal weights, as a share of their size: the last four scale by the largest weight of a block."""


@pytest.fixture(scope="module", autouse=True)
def end_of_process() -> Iterator[None]:
    yield
    quantizer.close()


@pytest.fixture(scope="module")
def w_OI() -> torch.Tensor:
    return torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def importance_I() -> torch.Tensor:
    return torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.1


@pytest.mark.parametrize("kind", TYPES.values(), ids=list(TYPES))
def test_every_type(kind: GgmlType, w_OI: torch.Tensor, importance_I: torch.Tensor) -> None:
    raw = quantize_with_llama_cpp(w_OI, kind, importance_I)
    assert raw.shape == (4, kind.row_bytes(COLUMNS))
    assert np.array_equal(encode(decode(raw, kind)), raw)
    error = float((dequantize(raw, kind.number) - w_OI).norm() / w_OI.norm())
    assert error == pytest.approx(ERRORS[kind.name], rel=0.15)


def test_rounding_without_importance_is_that_of_the_gguf_package(w_OI: torch.Tensor) -> None:
    for name in ("Q4_0", "Q5_0", "Q8_0", "Q4_1"):
        theirs = gguf.quants.quantize(w_OI.numpy(), gguf.GGMLQuantizationType[name])
        assert np.array_equal(quantize_with_llama_cpp(w_OI, TYPES[name]), theirs)


def test_importance_moves_error_to_columns_that_count_less(w_OI: torch.Tensor) -> None:
    importance_I = torch.ones(COLUMNS)
    importance_I[::2] = 100.0
    errors = {
        name: (dequantize(quantize_with_llama_cpp(w_OI, TYPES["Q2_K"], given), TYPES["Q2_K"].number) - w_OI)[
            :, ::2
        ].norm()
        for name, given in (("without", None), ("with", importance_I))
    }
    assert errors["with"] < 0.9 * errors["without"]


def test_threads_change_nothing(w_OI: torch.Tensor, importance_I: torch.Tensor) -> None:
    kind = TYPES["IQ3_XXS"]
    expected = quantize_with_llama_cpp(w_OI, kind, importance_I)
    for threads in (1, 3, 8):
        process = QuantizerProcess(library_path(), threads)
        assert np.array_equal(process.quantize(w_OI, kind, importance_I).reshape(expected.shape), expected)
        process.close()


def test_one_process_for_many_matrices(w_OI: torch.Tensor) -> None:
    quantize_with_llama_cpp(w_OI, TYPES["Q8_0"])
    process = quantizer._process()
    quantize_with_llama_cpp(w_OI.double().t().contiguous().t(), TYPES["Q4_K"])
    assert quantizer._process() is process


def test_what_cannot_be_made_is_refused_before(w_OI: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("started a process")

    monkeypatch.setattr(quantizer, "_process", fail)
    nan = w_OI.clone()
    nan[0, 0] = float("nan")
    ones = torch.ones(COLUMNS)
    for arguments, message in (
        ((w_OI[:, :300], TYPES["Q4_K"]), "whole blocks of 256 weights, got rows of 300"),
        ((w_OI[:0], TYPES["Q4_K"]), "no weights to quantize"),
        ((nan, TYPES["Q4_0"]), "Q4_0: the weights to quantize are not all finite"),
        ((w_OI, TYPES["IQ1_S"]), "IQ1_S cannot be made without an importance"),
        ((w_OI, TYPES["IQ1_S"], ones[:5]), r"an importance for each of 512 columns, got \(5,\)"),
        ((w_OI, TYPES["IQ1_S"], -ones), "negative or not finite"),
        ((w_OI, TYPES["IQ1_S"], ones / 0), "negative or not finite"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            quantize_with_llama_cpp(*arguments)


def test_weights_beyond_fp16_scales_are_refused(w_OI: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"Q4_K does not reach weights as large as .*e\+08: .* BF16"):
        quantize_with_llama_cpp(w_OI * 1e8, TYPES["Q4_K"])


def test_zeros_and_equal_weights(importance_I: torch.Tensor) -> None:
    for kind in (TYPES[name] for name in ("Q4_K", "IQ2_XXS", "IQ3_S", "IQ4_XS", "Q6_K")):
        raw = quantize_with_llama_cpp(torch.zeros(2, COLUMNS), kind, importance_I)
        assert not bool(dequantize(raw, kind.number).any())
        quantize_with_llama_cpp(torch.full((2, COLUMNS), 0.5), kind, torch.zeros(COLUMNS))


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (None, ModuleSpec("xllamacpp", None)):
        monkeypatch.setattr(quantizer, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(ConfigurationError, match=r"not installed; .* 'lightning-gsq\[export\]'"):
            library_path()


def test_its_end_is_an_error_with_what_it_said_and_the_next_matrix_starts_another(w_OI: torch.Tensor) -> None:
    unaware = replace(TYPES["IQ2_XXS"], needs_importance=False)
    with pytest.raises(
        ConfigurationError,
        match=r"quantizer to IQ2_XXS ended with status -6 .* \(4, 512\): .*GGML_ASSERT.* failed; choose",
    ):
        quantize_with_llama_cpp(w_OI, unaware)
    assert quantize_with_llama_cpp(w_OI, TYPES["Q8_0"]).shape == (4, 544)
