"""Every scheme with a name: packing, bits, rows, and the bytes of ggml's own types."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import encode, exact_type, tensor_of
from lightning_gsq.gguf.types.codec import decode, dequantize
from lightning_gsq.gguf.types.table import TYPES, fallback_type
from lightning_gsq.weights.assignment import SchemeOverride, assign_schemes, fit_rows, override_of, scheme_of
from lightning_gsq.weights.ledger import LedgerEntry
from lightning_gsq.weights.presets import GGML, NAMED
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.stored import unpack_weight
from lightning_gsq.weights.vector_grid import VectorGrid
from tests.support.vectors import random_codes

IN_GGUF_PACKAGE = {kind.name for kind in gguf.quants._type_traits}


def random_tensor(name: str, seed: int, rows: int = 3, columns: int = 512) -> QuantizedTensor:
    """Every code and integer may occur; floats are what fp16 holds, negative and zero among them."""
    scheme, generator = scheme_of(name), torch.Generator().manual_seed(seed)
    levels = torch.tensor(scheme.grid.levels, dtype=scheme.grid.code_dtype)
    codes_OI = levels[torch.randint(len(levels), (rows, columns), generator=generator)]
    if isinstance(scheme.grid, VectorGrid):
        codes_OI = random_codes(scheme.grid, rows, columns, seed)
    parts = {}
    for part, kind in scheme.parts(columns).items():
        if kind.integers is None:
            value = torch.randn(rows, kind.columns, generator=generator).half()
            parts[part] = torch.where(torch.rand(value.shape, generator=generator) < 0.1, 0, value)
        else:
            low, high = kind.integers.low, kind.integers.high
            parts[part] = torch.randint(low, high + 1, (rows, kind.columns), generator=generator).to(torch.int16)
    return QuantizedTensor(codes_OI, parts.pop("scales"), scheme, parts)


@pytest.mark.parametrize("name", NAMED)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_packing_loses_nothing_and_is_counted_to_the_bit(name: str, seed: int) -> None:
    tensor = random_tensor(name, seed)
    packed = tensor.pack()
    again = unpack_weight(packed, tensor.scheme, tensor.shape)
    assert torch.equal(again.codes_OI, tensor.codes_OI)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    size = 8 * sum(part.nbytes for part in packed.values())
    assert tensor.ledger().total_bits == LedgerEntry.of("w", tensor).bits == size
    assert all(part.dtype in (torch.int32, torch.float16) for part in packed.values())


@pytest.mark.parametrize("name", GGML)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_ggml_computes_the_same_weights_from_the_same_bytes(name: str, seed: int) -> None:
    tensor = random_tensor(name, seed)
    kind = exact_type(tensor.scheme, 512)
    assert kind is TYPES[name.upper()]
    raw = encode(tensor, kind)
    assert torch.equal(dequantize(raw, kind.number), tensor.dequantize())
    if name.upper() in IN_GGUF_PACKAGE:
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name.upper()])
        assert torch.equal(torch.from_numpy(np.array(theirs)), tensor.dequantize())
    again = tensor_of(decode(raw, kind))  # type: ignore[arg-type]
    assert again.scheme == tensor.scheme and torch.equal(again.codes_OI, tensor.codes_OI)
    assert all(torch.equal(value, tensor.scale_parts[part]) for part, value in again.scale_parts.items())


@pytest.mark.parametrize("name", [name for name in GGML if name not in ("tq1_0", "iq1_s")])
def test_a_preset_costs_what_its_type_costs(name: str) -> None:
    assert random_tensor(name, 0).ledger().per_weight()["total"] == TYPES[name.upper()].bits


@pytest.mark.parametrize(("name", "kind"), [("mlx3g64", "Q4_1"), ("mlx5g32", "Q5_1"), ("mlx6g64", None)])
def test_an_offset_a_group_fits_ggml_up_to_five_bits(name: str, kind: str | None) -> None:
    tensor = random_tensor(name, 1)
    found = exact_type(tensor.scheme, 512)
    assert (found and found.name) == kind
    if found is not None:
        assert torch.equal(dequantize(encode(tensor, found), found.number), tensor.dequantize())


@pytest.mark.parametrize(
    "name", ["q2_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "tq1_0", "iq2_xxs", "iq1_m"]
)
def test_short_rows_fall_back_as_llama_cpp_does(name: str) -> None:
    fitted = fit_rows({"w": scheme_of(name)}, {"w": 96}, fallback=True)["w"]
    assert fitted.preset == fallback_type(TYPES[name.upper()], 96).name.lower()


def test_rows_that_a_type_does_not_hold_are_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r"q4_k holds rows .* 256 weights, and a\.w has rows of 576; .*q5_0"):
        fit_rows({"a.w": scheme_of("q4_k")}, {"a.w": 576})
    with pytest.raises(ConfigurationError, match=r"^model\.embedding: q6_k holds rows"):
        fit_rows({"a.w": scheme_of("q6_k")}, {"a.w": 576}, option="model.embedding")
    with pytest.raises(ConfigurationError, match=r"iq4_nl holds rows .* 32 .*--model\.exclude"):
        fit_rows({"a.w": scheme_of("iq4_nl")}, {"a.w": 48}, fallback=True)
    assert fit_rows({"w": QuantScheme(3, 64)}, {"w": 7}) == {"w": QuantScheme(3, 64)}


def test_names_of_widths_and_groups_are_plain_schemes() -> None:
    assert scheme_of("w3g64") == QuantScheme(3, 64) and scheme_of("wtg128") == QuantScheme("ternary", 128)
    assert scheme_of("Q4_K") == scheme_of("q4_k") and (scheme_of("q4_k").bits, scheme_of("q4_k").group_size) == (4, 32)
    assert scheme_of({"preset": "q6_k"}).preset == "q6_k"


@pytest.mark.parametrize(("name", "near"), [("q4k", "q4_k"), ("mlx7g64", "mlx"), ("w9g64", "w"), ("iq4nl", "iq4_nl")])
def test_a_name_that_does_not_exist_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigurationError, match=f"there is no preset '{name}'; the nearest is {near}"):
        scheme_of(name)


def test_settings_beside_a_preset() -> None:
    for settings_ in ({"bits": 5}, {"group_size": 128}):
        with pytest.raises(ConfigurationError, match="does not go with the preset q4_k"):
            QuantScheme(**settings_, preset="q4_k")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no salient weights and no budget"):
        QuantScheme(budget=5.0, preset="q4_k")
    with pytest.raises(ConfigurationError, match="bits does not go with the preset q4_k"):
        SchemeOverride(bits=3, preset="q4_k").check()


def test_overrides_mix_presets() -> None:
    names = [f"l.{i}.{part}.weight" for i in range(2) for part in ("q_proj", "down_proj")]
    overrides = {"*.down_proj": override_of("q6_k"), "l.1.*": SchemeOverride(bits=3)}
    schemes = assign_schemes(names, scheme_of("q4_0"), overrides=overrides)
    assert [str(scheme) for scheme in schemes.values()] == [
        "q4_0",
        "q6_k",
        "3 bit, groups of 32",
        "3 bit, groups of 16",
    ]


def test_a_name_that_nothing_is_near_to_gets_the_kinds() -> None:
    with pytest.raises(ConfigurationError, match=r"there is no preset 'best'\. There are w<bits>g<group size>"):
        scheme_of("best")
