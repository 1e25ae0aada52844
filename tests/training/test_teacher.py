"""The teacher's stored tokens: what is whole stays, what is damaged or another's is computed again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_gsq.training.teacher import SEQUENCES_A_FILE, StoredTeacher

IDS_NT = torch.arange((SEQUENCES_A_FILE + 3) * 5).view(-1, 5)
KEY = {"model": "1", "temperature": "1.0"}


def _top(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.stack([ids_BT, ids_BT + 1], dim=-1)
    return tokens, -tokens.float() / 1000


def _stored(folder: Path, key: dict[str, str] = KEY) -> StoredTeacher:
    return StoredTeacher(folder, IDS_NT, 2, key)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stored = _stored(tmp_path)
    assert stored.missing() == [0, 1] and stored.missing(rank=1, world=2) == [1]
    stored.compute([0, 1], _top, size=8)
    return tmp_path


def test_every_sequence_has_its_own(folder: Path) -> None:
    stored = _stored(folder)
    assert not stored.missing() and len(stored) == len(IDS_NT)
    for index in (0, SEQUENCES_A_FILE - 1, SEQUENCES_A_FILE, len(IDS_NT) - 1):
        ids_T, tokens_TK, log_probs_TK = stored[index]
        assert torch.equal(ids_T, IDS_NT[index])
        assert torch.equal(tokens_TK.long(), _top(ids_T[None])[0][0])
        assert torch.equal(log_probs_TK, _top(ids_T[None])[1][0].half())


def test_what_another_model_left_does_not_count(folder: Path) -> None:
    assert _stored(folder, {**KEY, "model": "2"}).missing() == [0, 1]
    assert StoredTeacher(folder, IDS_NT, 3, KEY).missing() == [0, 1]
    assert StoredTeacher(folder, IDS_NT[:-1], 2, KEY).missing() == [1]


def test_damage_is_computed_again(folder: Path) -> None:
    file = folder / "top_k-00001.safetensors"
    content = file.read_bytes()
    for place in (0, 9, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        assert _stored(folder).missing() == [1], f"byte {place}"
    file.write_bytes(content[:-1])
    assert _stored(folder).missing() == [1]
    file.write_bytes(content)
    tensors = load_file(file)
    save_file(tensors, file)  # without what the file says of itself
    assert _stored(folder).missing() == [1]
