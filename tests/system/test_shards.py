"""Weight files that are written without being in memory are those of the safetensors library, byte by byte."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_gsq.system.safetensors_headers import weight_files
from lightning_gsq.system.shards import METADATA, SHARD_SIZE, SINGLE, Shards

TENSORS = {
    "b.codes": torch.arange(7, dtype=torch.int32),
    "a.scales": torch.randn(3, 5).half(),
    "b.shape": torch.tensor([3, 5]),
    "c": torch.randn(4, 6).T,  # not contiguous
    "mask": torch.tensor([True, False, True]),
    "scalar": torch.tensor(1.5),
    "nothing": torch.empty(0, 4, dtype=torch.bfloat16),
}


def test_one_file_is_that_of_the_library(tmp_path: Path) -> None:
    shards = Shards(tmp_path, SHARD_SIZE)
    for name, tensor in TENSORS.items():
        shards.add({name: tensor})
    headers = shards.finish()
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "wanted", METADATA)
    wanted = (tmp_path / "wanted").read_bytes()
    assert (tmp_path / SINGLE).read_bytes() == wanted
    assert headers == {SINGLE: len(wanted) - sum(tensor.nbytes for tensor in TENSORS.values())}
    assert sorted(file.name for file in tmp_path.iterdir()) == [SINGLE, "wanted"]


@pytest.mark.parametrize("shard_size", [1, 60])
def test_several_files_with_their_index(shard_size: int, tmp_path: Path) -> None:
    shards = Shards(tmp_path, shard_size)
    for name, tensor in TENSORS.items():
        shards.add({name: tensor})
    headers = shards.finish()
    files = weight_files(tmp_path)
    assert len(files) > 1 and sorted(headers) == sorted(file.name for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    found = {name: (file.name, value) for file in files for name, value in load_file(file).items()}
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name][1], tensor) and found[name][1].dtype == tensor.dtype
    assert not list(tmp_path.glob(".*"))
