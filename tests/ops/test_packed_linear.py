"""The packed ops against the dense weight, in float64; every form, every width, ragged shapes.

Without a GPU the Triton kernels run in Triton's interpreter. Memory that a form does not write shows as NaN.
"""

from collections.abc import Iterator

import pytest
import torch

from lightning_gsq.ops.packed_linear import (
    cpu,
    dequantize_packed,
    dispatch,
    kernels,
    op,
    packed_linear,
    tuning,
)
from lightning_gsq.ops.packed_linear.reference import dequantize_packed_reference, packed_linear_reference
from lightning_gsq.ops.packed_linear.tuning import Tile
from lightning_gsq.weights.grid import Bits
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS: tuple[Bits, ...] = (1, "ternary", 2, 3, 4, 5, 6, 7, 8)
SHAPES = [(5, 64, 32), (3, 100, 32), (4, 352, 128), (2, 70, -1), (3, 33, 64)]
"""Rows, columns, group size: whole, ragged in words, ragged in groups, one scale a row, less than a group."""
KERNEL_SHAPES = SHAPES[1:4]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative to the largest value; 16-bit tensor-core forms round the weight too."""
needs_compiler = pytest.mark.skipif(cpu.library(2) is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(bits: Bits, rows: int, columns: int, group_size: int) -> QuantizedTensor:
    scheme = QuantScheme(bits, group_size)
    levels = torch.tensor(scheme.grid.levels, dtype=torch.int8)
    codes = levels[torch.randint(len(levels), (rows, columns))]
    return QuantizedTensor(codes, torch.randn(rows, scheme.num_groups(columns)), scheme)


def settings(weight: QuantizedTensor) -> dict:
    columns = weight.shape[1]
    return {"bits": weight.scheme.bits, "in_features": columns, "group_length": weight.scheme.group_length(columns)}


def expected(weight: QuantizedTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = (
        x.double().cpu()
        @ (
            weight.codes_OI
            * weight.scales_OG.double().repeat_interleave(weight.scheme.group_length(weight.shape[1]), dim=1)[
                :, : weight.shape[1]
            ]
        ).T
    )
    return y if bias is None else y + bias.double().cpu()


def assert_near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.isfinite().all()
    error = (got.double().cpu() - wanted).abs().max() / wanted.abs().max()
    assert error < TOLERANCE[got.dtype]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(bits: Bits, shape: tuple[int, int, int]) -> None:
    weight = make(bits, *shape)
    packed = weight.pack()
    stored = {**settings(weight), "bits": weight.scheme.storage_bits}
    dense = dequantize_packed_reference(packed["codes"], packed["scales"], dtype=torch.float32, **stored)
    assert torch.equal(dense, weight.dequantize())
    x, bias = torch.randn(3, shape[1]), torch.randn(shape[0])
    assert_near(
        packed_linear_reference(x, packed["codes"], packed["scales"], bias, **stored), expected(weight, x, bias)
    )


@needs_compiler
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 1000, 128), (9, 1024, 64), (4, 520, 32)], ids=str)
def test_cpu(bits: Bits, shape: tuple[int, int, int]) -> None:
    weight = make(bits, *shape)
    for scale_dtype in TOLERANCE:
        packed = QuantizedTensor(weight.codes_OI, weight.scales_OG.to(scale_dtype), weight.scheme).pack()
        rounded = QuantizedTensor(weight.codes_OI, packed["scales"].float(), weight.scheme)
        for dtype in TOLERANCE:
            dense = dequantize_packed(packed["codes"], packed["scales"], dtype=dtype, **settings(weight))
            assert torch.equal(dense, rounded.dequantize(dtype))
            for tokens in (1, 7):
                x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0])
                y = packed_linear(x, packed["codes"], packed["scales"], bias, form="cpu", **settings(weight))
                assert_near(y, expected(rounded, x, bias))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernels_dequantize_exactly(bits: Bits, shape: tuple[int, int, int]) -> None:
    weight = make(bits, *shape)
    packed = {key: value.to(DEVICE) for key, value in weight.pack().items()}
    stored = {**settings(weight), "bits": weight.scheme.storage_bits}
    dense = kernels.dequantize(packed["codes"], packed["scales"], dtype=torch.float32, **stored)
    assert torch.equal(dense.cpu(), weight.dequantize())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "tile", "dtype"),
    [
        (2, Tile(2, 4, 1, 1), torch.float32),
        (1, Tile(2, 4, 1, 1), torch.float16),
        (3, Tile(4, 16, 16, 1), torch.bfloat16),
    ],
    ids=["gemv", "gemv16", "batch"],
)
def test_kernels(bits: Bits, shape: tuple[int, int, int], tokens: int, tile: Tile, dtype: torch.dtype) -> None:
    if DEVICE == "cuda":
        tile = Tile(max(16, tile.rows), max(16, tile.units), tile.tokens, 4)
    weight = make(bits, *shape)
    packed = {key: value.to(DEVICE) for key, value in weight.pack().items()}
    x, bias = torch.randn(tokens, shape[1]).to(DEVICE, dtype), torch.randn(shape[0], device=DEVICE)
    stored = {"bits": weight.scheme.storage_bits, "group_length": weight.scheme.group_length(shape[1])}
    y = kernels.linear(x, packed["codes"], packed["scales"], bias, tile=tile, **stored)
    assert_near(y, expected(weight, x, bias))


@pytest.mark.parametrize("tile", [Tile(2, 8, 1, 1), Tile(4, 16, 16, 1)], ids=["gemv", "batch"])
def test_kernels_read_a_transposed_stream(tile: Tile) -> None:
    """GPTQ's qweight is the same stream along the input dimension."""
    weight = make(3, 6, 256, 64)
    qweight = weight.pack()["codes"].T.contiguous()
    scales = weight.scales_OG.T.contiguous()
    x = torch.randn(2, 256)
    y = kernels.linear(x, qweight.T, scales.T, None, bits=3, group_length=64, tile=tile)
    assert_near(y, expected(weight, x))
    dense = kernels.dequantize(qweight.T, scales.T, bits=3, in_features=256, group_length=64, dtype=torch.float32)
    assert torch.equal(dense, weight.dequantize())
    y = packed_linear(x, qweight.T, scales.T, **settings(weight))
    assert_near(y, expected(weight, x))


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's view of a virtual allocation")
@pytest.mark.parametrize("tile", [Tile(2, 8, 1, 1), Tile(2, 16, 16, 1)], ids=["gemv", "batch"])
def test_kernels_reach_beyond_two_to_the_31(tile: Tile) -> None:
    """Rows 2^31 words apart; the memory between them is never touched."""
    weight = make(2, 2, 64, 32)
    packed = weight.pack()
    storage = torch.UntypedStorage(4 * (2**31 + 4))
    words = torch.tensor([], dtype=torch.int32).set_(storage, 0, (2, 4), (2**31, 1))  # type: ignore[call-overload]
    words.copy_(packed["codes"])
    x = torch.randn(1, 64)
    y = kernels.linear(x, words, packed["scales"], None, bits=2, group_length=32, tile=tile)
    assert_near(y, expected(weight, x))
    dense = kernels.dequantize(words, packed["scales"], bits=2, in_features=64, group_length=32, dtype=torch.float32)
    assert torch.equal(dense, weight.dequantize())


@needs_compiler
def test_dispatch_follows_the_table(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    x = torch.randn(2, 20, 64)
    assert dispatch.choose(x[0, :1], 2, 32) == "cpu"
    assert dispatch.choose(x, 2, 32) == "dense"
    assert dispatch.choose(x.double(), 2, 32) == "reference"
    with caplog.at_level("WARNING"):
        assert dispatch.choose(x[0, :1], 2, 20) == dispatch.choose(x[1, :1], 2, 20) == "dense"
    assert caplog.text.count("no multiple of 32") == 1


@pytest.mark.parametrize("form", ["dense", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forms_for_many_tokens(form: dispatch.Form, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PANEL_ELEMENTS", 1)
    weight = make(3, 40, 100, 20)
    packed = weight.pack()
    x, bias = torch.randn(2, 3, 100).to(dtype), torch.randn(40)
    y = packed_linear(x, packed["codes"], packed["scales"], bias, form=form, **settings(weight))
    assert_near(y, expected(weight, x, bias))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda bits: None)
    weight = make(2, 6, 96, 32)
    packed = weight.pack()
    x = torch.randn(1, 96)
    y = packed_linear(x, packed["codes"], packed["scales"], **settings(weight))
    assert_near(y, expected(weight, x))


def test_compiler_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu, "FLAGS", ("-no-such-flag",))
    monkeypatch.setattr(cpu, "cxx", lambda: "false")
    with caplog.at_level("WARNING"):
        assert cpu.library.__wrapped__(2) is None
    assert "cannot be compiled" in caplog.text


def test_gradients() -> None:
    weight = make(3, 6, 100, 32)
    packed = weight.pack()
    x = torch.randn(2, 3, 100, dtype=torch.double, requires_grad=True)
    scales = packed["scales"].double().requires_grad_()
    bias = torch.randn(6, dtype=torch.double, requires_grad=True)

    def linear(x: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, packed["codes"], scales, bias, **settings(weight))

    assert torch.autograd.gradcheck(linear, (x, scales, bias))


def test_operator_is_well_registered() -> None:
    weight = make(2, 6, 96, 32)
    packed = weight.pack()
    x, scales = torch.randn(3, 96, requires_grad=True), packed["scales"].requires_grad_()
    torch.library.opcheck(op.packed_linear, (x, packed["codes"], scales, torch.randn(6), 2, 32, "dense"))


def test_wrong_arguments_are_refused() -> None:
    packed = make(2, 6, 96, 32).pack()
    arguments = {"bits": 2, "in_features": 96, "group_length": 32}
    x = torch.randn(1, 96)
    with pytest.raises(ValueError, match="expected int32 words of shape"):
        packed_linear(x, packed["codes"][:, 1:], packed["scales"], **arguments)
    with pytest.raises(ValueError, match="expected floating-point scales"):
        packed_linear(x, packed["codes"], packed["scales"][:, 1:], **arguments)
    with pytest.raises(ValueError, match="expected x with 96 features"):
        packed_linear(x[:, 1:], packed["codes"], packed["scales"], **arguments)


def test_every_tile_of_the_table_is_possible() -> None:
    for entries in tuning._table().values():
        assert {"gemv", "batch"} <= set(entries)
        for name, entry in entries.items():
            assert all(entry[key] & (entry[key] - 1) == 0 for key in ("rows", "units", "warps"))
            assert entry["units"] >= 16 or name.startswith("gemv")
    assert tuning.tile_for(torch.device("cpu"), 2, 20).tokens == 32


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1024, 4096, 128), (333, 1000, 64)], ids=str)
def test_on_a_gpu(bits: Bits, shape: tuple[int, int, int]) -> None:
    weight = make(bits, *shape)
    packed = {key: value.cuda() for key, value in weight.pack().items()}
    for tokens in (1, 2, 16, 33, 200):
        for dtype in TOLERANCE:
            x, bias = torch.randn(tokens, shape[1], dtype=dtype, device="cuda"), torch.randn(shape[0], device="cuda")
            y = packed_linear(x, packed["codes"], packed["scales"], bias, **settings(weight))
            assert_near(y, expected(weight, x, bias))
