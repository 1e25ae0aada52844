"""Every type: the values are llama.cpp's bit for bit, and the structure gives the bytes back."""

import gguf
import numpy as np
import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.types import levels
from lightning_gsq.gguf.types.codec import decode, dequantize, encode, type_of, values, verify_finite
from lightning_gsq.gguf.types.levels import LevelBlocks
from lightning_gsq.gguf.types.table import TYPES, GgmlType
from lightning_gsq.gguf.types.vectors import VectorBlocks
from lightning_gsq.weights.code_vectors import VECTORS, codebook
from tests.gguf import llama_cpp

NOT_IN_THE_PACKAGE = {"Q1_0", "Q2_0"}
every_type = pytest.mark.parametrize("kind", TYPES.values(), ids=list(TYPES))


def random_bytes(kind: GgmlType, rows: int = 5, blocks: int = 4) -> np.ndarray:
    """Any bits at all: scales of both signs, subnormal, infinite, NaN; of TQ1_0, bytes that are written."""
    raw = np.random.default_rng(kind.number).integers(0, 256, (rows, blocks, kind.num_bytes), dtype=np.uint8)
    if kind.name == "TQ1_0":
        raw[..., :48] = (np.arange(243) * 256 + 242)[raw[..., :48] % 243] // 243
        raw[..., 48:52] = (np.arange(0, 243, 3) * 256 + 242)[raw[..., 48:52] % 81] // 243
    return raw.reshape(rows, -1)


@every_type
def test_values_are_those_of_llama_cpp(kind: GgmlType) -> None:
    raw = random_bytes(kind)
    own = dequantize(raw, kind.number).numpy()
    assert own.dtype == np.float32
    assert np.array_equal(own, llama_cpp.dequantize(raw, kind), equal_nan=True)
    assert np.array_equal(np.signbit(own)[own == 0], np.signbit(llama_cpp.dequantize(raw, kind))[own == 0])


@every_type
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_values_are_those_of_the_gguf_package(kind: GgmlType) -> None:
    if kind.name in NOT_IN_THE_PACKAGE:
        with pytest.raises((NotImplementedError, ValueError)):
            gguf.quants.dequantize(random_bytes(kind), gguf.GGMLQuantizationType(kind.number))
        return
    raw = random_bytes(kind)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.number))
    assert np.array_equal(dequantize(raw, kind.number).numpy(), theirs, equal_nan=True)


@every_type
def test_the_structure_gives_the_bytes_back(kind: GgmlType) -> None:
    raw = random_bytes(kind)
    stored = decode(raw, kind)
    assert type_of(stored) is kind
    assert np.array_equal(encode(stored), raw)


def test_bytes_of_ternary_blocks_that_nobody_writes_mean_the_same_as_one_that_is_written() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (3, 108), dtype=np.uint8)
    raw[:, [53, 107]] &= 0x3F  # finite scales
    written = encode(decode(raw, TYPES["TQ1_0"]))
    assert not np.array_equal(written, raw)
    assert np.array_equal(llama_cpp.dequantize(written, TYPES["TQ1_0"]), llama_cpp.dequantize(raw, TYPES["TQ1_0"]))
    assert np.array_equal(encode(decode(written, TYPES["TQ1_0"])), written)


@pytest.mark.parametrize("name", levels.GRIDS)
def test_any_levels_and_scales_come_back(name: str) -> None:
    kind, grid = TYPES[name], levels.GRIDS[name]
    generator = torch.Generator().manual_seed(kind.number)
    count, columns = 3, 3 * kind.length

    def whole(limits: tuple[int, int] | None) -> torch.Tensor | None:
        if limits is None:
            return None
        return torch.randint(limits[0], limits[1] + 1, (4, columns // grid.group), generator=generator).to(torch.int8)

    codes = torch.randint(len(grid.levels), (4, columns), generator=generator).to(torch.uint8)
    d, dmin = (torch.randn(4, count, generator=generator).half() for _ in range(2))
    offset = "min" in grid.parts.split()
    blocks = LevelBlocks(kind, codes, d, whole(grid.sc), dmin if offset else None, whole(grid.m))
    raw = encode(blocks)
    again = decode(raw, kind)
    assert isinstance(again, LevelBlocks)
    for field in ("codes_OI", "d_OB", "sc_OG", "dmin_OB", "m_OG"):
        one, other = getattr(blocks, field), getattr(again, field)
        assert (one is None and other is None) or torch.equal(one, other)
    expected = llama_cpp.dequantize(raw, kind)
    assert np.array_equal(blocks.values().numpy(), expected)


@pytest.mark.parametrize("name", VECTORS)
def test_any_vectors_signs_and_scales_come_back(name: str) -> None:
    kind, grid = TYPES[name], VECTORS[name]
    generator = torch.Generator().manual_seed(kind.number)
    columns = 2 * kind.length

    def flags(width: int) -> torch.Tensor:
        return torch.randint(2, (4, width), generator=generator).bool()

    negative = None if grid.signs == "none" else flags(columns)
    if negative is not None and grid.signs == "even":
        eights = negative.view(4, -1, 8)
        eights[..., 7] ^= eights.sum(-1) % 2 == 1
    blocks = VectorBlocks(
        kind,
        torch.randint(grid.count, (4, columns // grid.length), generator=generator).to(torch.int16),
        torch.randn(4, 2, generator=generator).half(),
        torch.randint(grid.high + 1, (4, columns // grid.group), generator=generator).to(torch.int8),
        negative,
        flags(columns // grid.shift_group) if grid.shift_group else None,
    )
    raw = encode(blocks)
    again = decode(raw, kind)
    assert isinstance(again, VectorBlocks)
    for field in ("index_OV", "d_OB", "s_OG", "negative_OI", "down_OS"):
        one, other = getattr(blocks, field), getattr(again, field)
        assert (one is None and other is None) or torch.equal(one, other)
    assert np.array_equal(blocks.values().numpy(), llama_cpp.dequantize(raw, kind))
    assert codebook(name).unique(dim=0).shape == (grid.count, grid.length)


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "Q4_1"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_scales_that_are_no_numbers_are_kept_and_can_be_refused(name: str, value: float) -> None:
    kind = TYPES[name]
    raw = np.zeros((1, 2 * kind.num_bytes), np.uint8)
    raw[0, :2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    stored = decode(raw, kind)
    assert np.array_equal(encode(stored), raw)
    dense = values(stored)
    assert not bool(torch.isfinite(dense[0, : kind.length]).any()) or name == "Q4_1"
    assert bool(torch.isfinite(dense[0, kind.length :]).all())
    with pytest.raises(ConfigurationError, match=rf"blk\.0\.x \({name}\) has 1 infinite or NaN scales"):
        verify_finite(stored, "blk.0.x")


def test_finite_scales_are_not_refused() -> None:
    for kind in TYPES.values():
        verify_finite(decode(np.zeros((2, kind.num_bytes), np.uint8), kind), "x")
    with pytest.raises(ConfigurationError, match=r"x \(F16\) has 2 infinite or NaN numbers"):
        verify_finite(torch.tensor([[1, float("nan"), float("inf")]]).half(), "x")


def test_what_a_type_does_not_hold_is_refused() -> None:
    blocks = decode(np.zeros((2, 144), np.uint8), TYPES["Q4_K"])
    assert isinstance(blocks, LevelBlocks)
    for change, message in (
        ({"codes_OI": torch.full((2, 256), 16)}, r"code has to lie in 0 \.\.\. 15, got 16 \.\.\. 16"),
        ({"codes_OI": torch.full((2, 256), 65536)}, r"code has to lie in 0 \.\.\. 15, got 65536"),
        ({"codes_OI": torch.zeros(2, 255, dtype=torch.uint8)}, "whole blocks of 256 weights, got 255"),
        ({"codes_OI": torch.zeros(2, 256)}, r"code has to be whole numbers of shape \(2, 256\), got torch.float32"),
        ({"sc_OG": torch.full((2, 8), 64)}, r"sc has to lie in 0 \.\.\. 63"),
        ({"m_OG": torch.full((2, 8), -1)}, r"m has to lie in 0 \.\.\. 63"),
        ({"m_OG": None}, r"m has to be whole numbers of shape \(2, 8\), got nothing"),
        ({"d_OB": torch.ones(2, 1)}, r"d has to be float16 of shape \(2, 1\), got torch.float32"),
        ({"dmin_OB": None}, "dmin has to be float16"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(LevelBlocks(**{**vars(blocks), **change}))
    signed = decode(np.zeros((1, 66), np.uint8), TYPES["IQ2_XXS"])
    assert isinstance(signed, VectorBlocks) and signed.negative_OI is not None
    signed.negative_OI[0, 3] = True
    with pytest.raises(ValueError, match="IQ2_XXS holds an even number of minus signs among eight weights"):
        encode(signed)
    with pytest.raises(ValueError, match=r"no ggml type of weights holds torch\.int64 numbers"):
        encode(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows of 144-byte Q4_K blocks, got uint8 of shape"):
        decode(np.zeros((1, 143), np.uint8), TYPES["Q4_K"])
    with pytest.raises(ValueError, match="rows of 144-byte Q4_K blocks, got uint8 of shape"):
        decode(np.zeros((0, 144), np.uint8), TYPES["Q4_K"])


def test_types_that_hold_no_weights() -> None:
    with pytest.raises(ConfigurationError, match="type 26 holds no weights that can be read; those that can are F32"):
        dequantize(np.zeros((1, 4), np.uint8), 26)
    with pytest.raises(ConfigurationError, match="type 99 holds no weights"):
        dequantize(np.zeros((1, 4), np.uint8), 99)
    # a type of weights that the package reads and that has no structure here
    assert torch.equal(dequantize(np.zeros((1, 17), np.uint8), 39), torch.zeros(1, 32))


def test_stored_form_trains() -> None:
    """Gradients reach the scales and the integers: d value / d sc = d * level."""
    d, sc, dmin, m = (torch.tensor([[x] * n], requires_grad=True) for x, n in ((0.5, 1), (3.0, 2), (0.25, 1), (2.0, 2)))
    level = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    value = levels.level_values(level, d, sc, dmin, m)
    assert value.tolist() == [[1.0, 2.5, 4.0, 5.5]]
    value.sum().backward()
    assert (d.grad.tolist(), sc.grad.tolist()) == ([[30.0]], [[1.5, 3.5]])  # type: ignore[union-attr]
    assert (dmin.grad.tolist(), m.grad.tolist()) == ([[-8.0]], [[-0.5, -0.5]])  # type: ignore[union-attr]


def test_a_two_bit_grid_in_q2_k_by_hand() -> None:
    """The grid -2 ... 1 is exact with dmin = 2 d and m = sc."""
    codes = torch.arange(4, dtype=torch.uint8).repeat(1, 64)
    sc = torch.arange(16, dtype=torch.int8)[None]
    blocks = LevelBlocks(TYPES["Q2_K"], codes, torch.tensor([[0.5]]).half(), sc, torch.tensor([[1.0]]).half(), sc)
    raw = encode(blocks)
    assert raw[0, :16].tolist() == [17 * n for n in range(16)]  # sc in the low half, m in the high one
    assert raw[0, 16:18].tolist() == [0, 0b01010101]  # weights 0, 32, 64 and 96; 1, 33, 65 and 97
    assert raw[0, 80:].tobytes() == np.array([0.5, 1.0], "<f2").tobytes()
    expected = 0.5 * (codes.float() - 2) * sc.float().repeat_interleave(16, 1)
    assert torch.equal(blocks.values(), expected)


def test_six_bit_scales_of_q4_k_by_hand() -> None:
    sc = torch.tensor([[1, 2, 3, 4, 0b110101, 6, 7, 8]], dtype=torch.int8)
    m = torch.tensor([[9, 10, 11, 12, 0b101110, 14, 15, 16]], dtype=torch.int8)
    one = torch.ones(1, 1).half()
    raw = encode(LevelBlocks(TYPES["Q4_K"], torch.zeros(1, 256, dtype=torch.uint8), one, sc, one, m))
    assert raw[0, 4:16].tolist() == [0b11000001, 2, 3, 4, 0b10001001, 10, 11, 12 | 1 << 6, 0xE5, 0xE6, 0xF7, 0x08]


@pytest.mark.parametrize("seed", range(3))
def test_random_rows_never_fail(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for kind in TYPES.values():
        for _ in range(10):
            shape = (int(generator.integers(1, 4)), int(generator.integers(1, 4)) * kind.num_bytes)
            raw = generator.integers(0, 256, shape, dtype=np.uint8)
            dense = dequantize(raw, kind.number)
            assert dense.shape == (shape[0], shape[1] // kind.num_bytes * kind.length)
            again = encode(decode(raw, kind))
            assert np.array_equal(dequantize(again, kind.number), dense, equal_nan=True)
