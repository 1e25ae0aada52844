"""Run folders: atomic files, block files that are checked before use."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.system.files import write_atomically
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

SCHEME = QuantScheme(3, 8)
EXPECTED = {"mlp.weight": (SCHEME, (4, 20)), "attn.weight": (QuantScheme(2, -1), (3, 7))}


def _tensors() -> dict[str, QuantizedTensor]:
    tensors = {}
    for name, (scheme, (rows, columns)) in EXPECTED.items():
        codes = torch.randint(scheme.low, scheme.high + 1, (rows, columns), dtype=torch.int8)
        tensors[name] = QuantizedTensor(codes, torch.rand(rows, scheme.num_groups(columns)).half(), scheme)
    return tensors


def test_blocks_round_trip(tmp_path: Path) -> None:
    folder, tensors = RunFolder(tmp_path), _tensors()
    folder.write_block("block", 3, tensors)
    again = folder.read_block("block", 3, EXPECTED)
    for name, tensor in tensors.items():
        assert torch.equal(again[name].dequantize(), tensor.dequantize())


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_block(tmp_path: Path, keep: int) -> None:
    folder = RunFolder(tmp_path)
    folder.write_block("block", 0, _tensors())
    file = folder.block_file("block", 0)
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(ConfigurationError, match=r"block-000.safetensors cannot be used: .* makes it again"):
        folder.read_block("block", 0, EXPECTED)


def test_block_of_another_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_block("block", 0, _tensors())
    other = {name: (QuantScheme(4, 8), shape) for name, (_, shape) in EXPECTED.items()}
    with pytest.raises(ConfigurationError, match="is stored as"):
        folder.read_block("block", 0, other)
    with pytest.raises(ConfigurationError, match="it holds"):
        folder.read_block("block", 0, {"mlp.weight": EXPECTED["mlp.weight"]})


def test_block_with_damaged_contents(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_block("block", 0, _tensors())
    file = folder.block_file("block", 0)
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    for name, value in (
        ("mlp.weight.scales", torch.full((4, 3), torch.nan).half()),
        ("mlp.weight.scales", torch.ones(4, 2).half()),
        ("mlp.weight.codes", torch.zeros(4, 9, dtype=torch.int32)),
        ("mlp.weight.codes", torch.zeros(4, 2)),
    ):
        save_file({**load_file(file), name: value}, tmp_path / "damaged.safetensors", metadata)
        (tmp_path / "damaged.safetensors").replace(folder.block_file("block", 1))
        with pytest.raises(ConfigurationError, match=r"block-001\.safetensors cannot be used"):
            folder.read_block("block", 1, EXPECTED)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match="cannot write to the run folder"):
        RunFolder(tmp_path / "file" / "run")


def test_too_little_room(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"needs about 1000000000\.00 GB, the disk"):
        RunFolder(tmp_path).check_room(10**18)


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "progress.json"
    write_atomically(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigurationError, match="No space left on device"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
