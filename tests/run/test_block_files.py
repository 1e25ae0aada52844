"""Files that say what they are: swapped, renamed, changed and foreign ones are told."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.block_files import DamagedFileError
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

SCHEME = QuantScheme(3, 8)
EXPECTED = {"mlp.weight": (SCHEME, (4, 20))}


def _tensors() -> dict[str, QuantizedTensor]:
    codes = torch.randint(SCHEME.low, SCHEME.high + 1, (4, 20), dtype=torch.int8)
    return {"mlp.weight": QuantizedTensor(codes, torch.rand(4, 3).half(), SCHEME)}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Blocks 0 and 1, and a warm start of block 0."""
    folder = RunFolder(tmp_path)
    folder.recipe = "ours"
    for kind, index in (("block", 0), ("block", 1), ("warm_start", 0)):
        folder.write_block(kind, index, _tensors(), "before", {"seconds": 1.5})
    return folder


def test_the_header(folder: RunFolder) -> None:
    header = folder.header("block", 1)
    assert header is not None and (header.kind, header.index, header.recipe) == ("block", 1, "ours")
    assert header.after == "before" and header.measures == {"seconds": 1.5} and len(header.digest) == 32
    assert folder.measures() == {"0": {"seconds": 1.5}, "1": {"seconds": 1.5}}
    assert folder.header("block", 7) is None


def test_swapped_and_renamed(folder: RunFolder) -> None:
    zero, one = folder.block_file("block", 0), folder.block_file("block", 1)
    contents = zero.read_bytes(), one.read_bytes()
    zero.write_bytes(contents[1])
    with pytest.raises(DamagedFileError, match="it is block of block 1, expected block of block 0"):
        folder.read_block("block", 0, EXPECTED)
    zero.write_bytes(folder.block_file("warm_start", 0).read_bytes())
    with pytest.raises(DamagedFileError, match="it is warm_start of block 0"):
        folder.read_block("block", 0, EXPECTED)
    with pytest.raises(ConfigurationError, match=r"'\.\./x' as the kind"):
        folder.block_file("../x", 0)


def test_of_another_run(folder: RunFolder) -> None:
    folder.recipe = "another"
    with pytest.raises(DamagedFileError, match="belongs to a run with another recipe"):
        folder.read_block("block", 0, EXPECTED)
    assert folder.measures() == {}
    folder.recipe = None
    folder.read_block("block", 0, EXPECTED)


def test_any_flipped_bit(folder: RunFolder) -> None:
    file = folder.block_file("block", 0)
    content, choose = file.read_bytes(), random.Random(0)
    for _ in range(200):
        changed = bytearray(content)
        place = choose.randrange(len(content))
        changed[place] ^= 1 << choose.randrange(8)
        file.write_bytes(changed)
        try:
            tensors = folder.read_block("block", 0, EXPECTED)
        except DamagedFileError:
            continue
        # A space in the header of safetensors, or the like: nothing that anybody reads.
        file.write_bytes(content)
        assert torch.equal(
            tensors["mlp.weight"].dequantize(), folder.read_block("block", 0, EXPECTED)["mlp.weight"].dequantize()
        )


def test_a_header_that_was_changed(folder: RunFolder) -> None:
    file = folder.block_file("block", 0)
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    header = json.loads(metadata["header"])
    for changed in ({**header, "index": 1}, {**header, "measures": {}}, {"kind": "block"}, [], None, 1):
        save_file(load_file(file), file, {**metadata, "header": json.dumps(changed)})
        assert folder.header("block", 0) is None
        with pytest.raises(DamagedFileError, match="header has changed"):
            folder.read_block("block", 0, EXPECTED)
    save_file(load_file(file), file, {"layout": metadata["layout"]})
    with pytest.raises(DamagedFileError, match="no header that says what it is"):
        folder.read_block("block", 0, EXPECTED)
    folder.recipe = None  # a run of an earlier version
    folder.read_block("block", 0, EXPECTED)


def test_parameters_that_are_not_quantized(folder: RunFolder) -> None:
    tensors, report = {"model.norm.weight": torch.ones(4)}, {"start": 1.5, "rejected": False}
    folder.write_dense("end_to_end", tensors, report)
    again = folder.read_dense("end_to_end")
    assert again is not None and torch.equal(again[0]["model.norm.weight"], torch.ones(4)) and again[1] == report
    before = folder.digest("end_to_end", [])
    file = folder.dense_file("end_to_end")
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    for name, value in (("report", json.dumps({**report, "start": 0.5})), ("report", "1"), ("header", "{}")):
        save_file(load_file(file), file, {**metadata, name: value})
        with pytest.raises(DamagedFileError, match=r"end_to_end.safetensors cannot be used"):
            folder.read_dense("end_to_end")
    assert folder.digest("end_to_end", []) != before
    save_file({"model.norm.weight": torch.zeros(4)}, file, metadata)
    with pytest.raises(DamagedFileError, match="contents have changed"):
        folder.read_dense("end_to_end")
