"""Digests see every byte, name, dtype and shape."""

import pytest
import torch

from lightning_gsq.system.digests import data_digest, tensors_digest, weights_digest


@pytest.mark.parametrize("digest", [tensors_digest, weights_digest])
def test_everything_counts(digest: object) -> None:
    of = tensors_digest if digest is tensors_digest else weights_digest
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.zeros(0),
        "c": torch.tensor(1.0),
        "d": torch.ones(7).half(),
    }
    first = of(tensors)
    assert len(first) == 32 and first == of(dict(reversed(tensors.items())))
    others = [
        {**tensors, "e": torch.zeros(0)},
        {**tensors, "a": tensors["a"].view(5, 3)},
        {**tensors, "c": torch.tensor([1.0])},
        {**tensors, "d": tensors["d"].view(torch.int16)},
        {"x": tensors["a"], **{k: v for k, v in tensors.items() if k != "a"}},
    ]
    for index in range(15):
        changed = tensors["a"].clone()
        changed.view(torch.int16).view(-1)[index] ^= 1
        others.append({**tensors, "a": changed})
    assert len({first, *map(of, others)}) == 1 + len(others)


def test_plain_data() -> None:
    assert data_digest({"a": 1, "b": [1, None]}) == data_digest({"b": [1, None], "a": 1})
    assert data_digest([1]) != data_digest(["1"])
