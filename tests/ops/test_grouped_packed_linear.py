"""Products of sorted tokens with the packed weights of experts against the dense weights, in float64; every form."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from lightning_gsq.ops.packed_linear import cpu, dispatch, grouped, grouped_kernels, grouped_packed_linear
from lightning_gsq.ops.packed_linear.reference import grouped_packed_linear_reference
from lightning_gsq.ops.packed_linear.tuning import Tile
from lightning_gsq.weights.grid import Bits
from lightning_gsq.weights.quantized import QuantizedTensor
from tests.ops.test_packed_linear import (
    DEVICE,
    SHAPES,
    TOLERANCE,
    WIDTHS,
    assert_near,
    make,
    needs_compiler,
    settings,
)

COUNTS = [3, 0, 20, 1, 0]
"""Tokens of each weight: some, none, more than the C++ library is meant for."""
BEYOND = 2
"""Tokens of no weight."""


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def weights(bits: Bits, shape: tuple[int, int, int], experts: int = len(COUNTS)) -> QuantizedTensor:
    rows, columns, group_size = shape
    return make(bits, experts * rows, columns, group_size)


def offsets(counts: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(device)


def expected(weight: QuantizedTensor, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    rows = weight.shape[0] // len(counts)
    scales = weight.scales_OG.double().repeat_interleave(weight.scheme.group_length(weight.shape[1]), 1)[
        :, : weight.shape[1]
    ]
    dense = weight.codes_OI * scales
    wanted, bounds = torch.zeros(len(x), rows, dtype=torch.float64), offsets(counts).tolist()
    for expert, (first, end) in enumerate(pairwise(bounds)):
        wanted[first:end] = x[first:end].double().cpu() @ dense[expert * rows : (expert + 1) * rows].T
    return wanted


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(bits: Bits, shape: tuple[int, int, int]) -> None:
    weight = weights(bits, shape)
    packed, x = weight.pack(), torch.randn(sum(COUNTS) + BEYOND, shape[1])
    stored = {**settings(weight), "bits": weight.scheme.storage_bits}
    y = grouped_packed_linear_reference(x, packed["codes"], packed["scales"], offsets(COUNTS), **stored)
    assert_near(y, expected(weight, x, COUNTS))


@needs_compiler
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 1000, 128), (9, 1024, 64)], ids=str)
@pytest.mark.parametrize("form", ["cpu", "dense", "auto"])
def test_forms_on_a_cpu(bits: Bits, shape: tuple[int, int, int], form: dispatch.Form) -> None:
    weight = weights(bits, shape)
    for dtype in TOLERANCE:
        packed = QuantizedTensor(weight.codes_OI, weight.scales_OG.to(dtype), weight.scheme).pack()
        rounded = QuantizedTensor(weight.codes_OI, packed["scales"].float(), weight.scheme)
        x = torch.randn(sum(COUNTS) + BEYOND, shape[1]).to(dtype)
        y = grouped_packed_linear(x, packed["codes"], packed["scales"], offsets(COUNTS), form=form, **settings(weight))
        assert y.dtype == dtype and not y[sum(COUNTS) :].any()
        assert_near(y, expected(rounded, x, COUNTS))


@needs_compiler
def test_a_weight_gets_the_form_that_its_tokens_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, made = weights(3, (4, 64, 32)), []
    packed, x = weight.pack(), torch.randn(sum(COUNTS), 64)
    whole = dispatch.dequantize
    monkeypatch.setattr(
        dispatch, "dequantize", lambda words, *args, **more: made.append(words) or whole(words, *args, **more)
    )
    grouped_packed_linear(x, packed["codes"], packed["scales"], offsets(COUNTS), **settings(weight))
    assert COUNTS[2] > cpu.MOST_TOKENS and len(made) == 1
    assert torch.equal(made[0], packed["codes"][8:12])


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 100, 32), (2, 70, -1)], ids=str)
@pytest.mark.parametrize(
    ("counts", "tile", "dtype"),
    [([1, 0, 2], Tile(2, 4, 1, 1), torch.float32), ([3, 0, 20, 1, 0], Tile(4, 16, 16, 1), torch.bfloat16)],
    ids=["gemv", "batch"],
)
def test_kernels(bits: Bits, shape: tuple[int, int, int], counts: list[int], tile: Tile, dtype: torch.dtype) -> None:
    """The loops over weights are what is new here; how a width is unpacked is tested with one weight."""
    if DEVICE == "cuda":
        tile = Tile(max(16, tile.rows), max(16, tile.units), tile.tokens, 4)
    weight = weights(bits, shape, len(counts))
    packed = {key: value.to(DEVICE) for key, value in weight.pack().items()}
    x = torch.randn(sum(counts) + BEYOND, shape[1]).to(DEVICE, dtype)
    stored = {"bits": weight.scheme.storage_bits, "group_length": weight.scheme.group_length(shape[1])}
    y = grouped_kernels.linear(x, packed["codes"], packed["scales"], offsets(counts, DEVICE), tile=tile, **stored)
    assert not y[sum(counts) :].any()
    assert_near(y, expected(weight, x, counts))


@pytest.mark.parametrize("counts", [[1], [0, 0, 5], [16, 17, 0, 33], [64, 0], [1] * 40, [0, 0]], ids=str)
def test_every_token_is_in_one_tile_of_its_weight(counts: list[int]) -> None:
    tokens = sum(counts) + BEYOND
    seen = []
    for weight, first, end in zip(
        *map(torch.Tensor.tolist, grouped_kernels.tiles_of(offsets(counts), tokens, 16)), strict=True
    ):
        assert first <= end
        seen += [(weight, token) for token in range(first, min(first + 16, end))]
    assert seen == [(w, sum(counts[:w]) + i) for w, count in enumerate(counts) for i in range(count)]
    wanted = [w for w, count in enumerate(counts) for _ in range(count)] + [-1] * BEYOND
    assert grouped_kernels.weight_of_token(offsets(counts), tokens).tolist() == wanted


def test_gradients() -> None:
    counts = [2, 0, 1]
    weight = weights(3, (4, 100, 32), experts=3)
    packed = weight.pack()
    x = torch.randn(4, 100, dtype=torch.double, requires_grad=True)
    scales = packed["scales"].double().requires_grad_()

    def linear(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return grouped_packed_linear(x, packed["codes"], scales, offsets(counts), **settings(weight))

    assert torch.autograd.gradcheck(linear, (x, scales))


def test_operator_is_well_registered() -> None:
    weight = weights(2, (6, 96, 32), experts=3)
    packed = weight.pack()
    x, scales = torch.randn(3, 96, requires_grad=True), packed["scales"].requires_grad_()
    arguments = (x, packed["codes"], scales, offsets([2, 0, 1]), 2, 32, "dense")
    torch.library.opcheck(grouped.grouped_packed_linear, arguments)


def test_wrong_arguments_are_refused() -> None:
    packed = weights(2, (6, 96, 32), experts=3).pack()
    arguments = {"bits": 2, "in_features": 96, "group_length": 32}
    with pytest.raises(ValueError, match=r"expected x of shape \(S, 96\)"):
        grouped_packed_linear(torch.randn(1, 2, 96), packed["codes"], packed["scales"], offsets([1, 1, 0]), **arguments)
    for wrong in (offsets([1] * 4), offsets([1, 1, 0]).int(), offsets([])):
        with pytest.raises(ValueError, match="expected int64 offsets"):
            grouped_packed_linear(torch.randn(2, 96), packed["codes"], packed["scales"], wrong, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(512, 1024, 128), (333, 1000, 64)], ids=str)
def test_on_a_gpu(bits: Bits, shape: tuple[int, int, int]) -> None:
    for counts in ([1, 0, 0, 2], [0, 1, 17, 30], [20, 0, 100, 80], [300, 0, 1, 200]):
        weight = weights(bits, shape, experts=4)
        packed = {key: value.cuda() for key, value in weight.pack().items()}
        for dtype in TOLERANCE:
            x = torch.randn(sum(counts) + BEYOND, shape[1], dtype=dtype, device="cuda")
            y = grouped_packed_linear(x, packed["codes"], packed["scales"], offsets(counts, "cuda"), **settings(weight))
            assert_near(y, expected(weight, x, counts))
