"""Code vectors as codes: every one comes back from its number and signs, and from packed words; others are refused."""

import pytest
import torch
from torch import Tensor

from lightning_gsq.ops.packed_linear import unpack_values
from lightning_gsq.weights.code_vectors import SIGN_GROUP, VECTORS
from lightning_gsq.weights.packing import pack, unpack
from lightning_gsq.weights.presets import VECTOR_TYPES
from lightning_gsq.weights.quantized import BitsLedger, QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.stored import unpack_weight
from lightning_gsq.weights.vector_grid import VectorGrid
from tests.support.vectors import grid_named, random_codes

COLUMNS = 512
BITS = {"iq2_xxs": 2.0625, "iq2_xs": 2.3125, "iq2_s": 2.5625, "iq3_xxs": 3.0625, "iq3_s": 3.4375, "iq1_m": 1.75}


@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_every_code_vector_comes_back(name: str) -> None:
    grid = grid_named(name)
    codes_OI = random_codes(grid, 9, COLUMNS)
    index_OV, marks = grid.split(codes_OI)
    assert torch.equal(grid.join(index_OV, marks), codes_OI)
    packed = grid.pack(codes_OI)
    assert {part: words.shape[1] for part, words in packed.items()} == grid.words(COLUMNS)
    for unpacker in (unpack, unpack_values):  # of files, and of packed layers
        assert torch.equal(grid.unpack(packed, COLUMNS, unpacker), codes_OI)
    assert set(codes_OI.unique().tolist()) <= set(grid.levels) and grid.levels[0] == -grid.levels[-1] == grid.low
    every = torch.arange(VECTORS[name.upper()].count, dtype=torch.int16)[None]
    no_marks = torch.zeros(1, grid.fields(every.numel() * grid.vectors.length).get("shifts", (0, 0))[0] or 1).bool()
    again, _ = grid.split(grid.join(every, no_marks))
    assert torch.equal(again, every)


@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_a_weight_is_what_its_packed_tensors_say(name: str) -> None:
    scheme = QuantScheme(preset=name)
    tensor = random_tensor(scheme, 5)
    packed = tensor.pack()
    again = unpack_weight(packed, scheme, tensor.shape)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    ledger = BitsLedger.of(tensor)
    assert ledger.total_bits == 8 * sum(part.nbytes for part in packed.values())
    if name in BITS:  # the rows of IQ1_S fill no whole words
        assert ledger.per_weight()["total"] == BITS[name]
    with pytest.raises(ValueError, match="expected"):
        unpack_weight({part: value for part, value in packed.items() if part != "codes"}, scheme, tensor.shape)
    with pytest.raises(ValueError, match="rows"):
        unpack_weight({**packed, "codes": packed["codes"][:-1]}, scheme, tensor.shape)


def random_tensor(scheme: QuantScheme, rows: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(1)
    assert isinstance(scheme.grid, VectorGrid)
    high = scheme.grid.vectors.high
    d_OB = torch.randn(rows, COLUMNS // 256, generator=generator).half()
    s_OG = torch.randint(0, high + 1, (rows, scheme.num_groups(COLUMNS)), generator=generator, dtype=torch.int16)
    return QuantizedTensor(random_codes(scheme.grid, rows, COLUMNS), d_OB, scheme, {"sub_scales": s_OG})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("iq2_xxs", lambda codes: codes.clone().fill_(8) * torch.tensor([-1] + [1] * 7).repeat(64), "an even number"),
        ("iq2_s", lambda codes: codes.clone().fill_(9), "none of the 1024 vectors"),
        ("iq3_s", lambda codes: codes.clone().fill_(0), "entries of 1 ... 15"),
        ("iq1_s", lambda codes: codes * torch.tensor([1] * 8 + [-1] * 8).repeat(32), "different shifts"),
        ("iq1_m", lambda codes: codes.clone().fill_(0), "different shifts, or none"),
    ],
)
def test_what_is_no_code_vector_is_refused(name: str, change: object, message: str) -> None:
    grid = grid_named(name)
    changed: Tensor = change(
        random_codes(grid, 1, COLUMNS).abs() if name == "iq1_s" else random_codes(grid, 1, COLUMNS)
    )  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        grid.split(changed)
    with pytest.raises(TypeError, match="not rounded one by one"):
        grid.nearest(changed.float())


@pytest.mark.parametrize("bits", [9, 11, 16])
def test_numbers_of_more_than_eight_bits(bits: int) -> None:
    values = torch.randint(0, 2**bits, (3, 37), generator=torch.Generator().manual_seed(0))
    values[0, 0] = 2**bits - 1
    assert torch.equal(unpack(pack(values, bits), bits, 37).long(), values)
    with pytest.raises(ValueError, match="to be packed in"):
        pack(values + 1, bits)


def test_eight_weights_share_their_signs() -> None:
    assert {name: grid_named(name).unit for name in VECTOR_TYPES} == {
        **dict.fromkeys(VECTOR_TYPES, SIGN_GROUP),
        "iq3_s": 4,
    }
