"""GGUF files of tiny models: exact bytes, and llama.cpp and transformers load them."""

import functools
import math
from pathlib import Path

import pytest
from transformers import LlamaConfig, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import CheckFailedError, ExportOptions
from lightning_gsq.export.formats import gguf_check
from lightning_gsq.export.formats.gguf import FILE, GGUFFormat
from lightning_gsq.export.formats.gguf_layout import layout_of
from lightning_gsq.export.formats.gguf_storage import source_file
from lightning_gsq.export.readers import packages
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.architectures.table import architecture_of
from lightning_gsq.gguf.blocks import BLOCK_TYPES
from lightning_gsq.gguf.fields import uint
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.metadata import FILE_TYPE, fields_of_model
from lightning_gsq.gguf.write import NewTensor, write_gguf
from tests.support.exported import SHAPE, bpe_tokenizer, quantize, save_model
from tests.support.tiny import byte_tokenizer

FORMAT = GGUFFormat()
NAMES = {kind.number: kind.name for kind in BLOCK_TYPES.values()} | {0: "F32", 1: "F16"}


def kinds(folder: Path) -> dict[str, str]:
    return {name: NAMES[stored.number] for name, stored in GGUFFile(folder / FILE).tensors.items()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """1 bit, ternary, 2, 4 and 8 bits in one untied Llama, a layer left alone, and one that no block type holds."""
    root = tmp_path_factory.mktemp("gguf")
    overrides = {
        "*.down_proj": {"bits": 1, "group_size": 128},
        "*.o_proj": {"bits": "ternary"},
        "*.k_proj": {"bits": 4, "group_size": 32},
        "*.v_proj": {"bits": 8},
        "*.gate_proj": {"bits": 3, "group_size": 16},
    }
    run = quantize(save_model(root / "model"), root / "run", 2, 64, overrides=overrides, exclude=["*.0.mlp.up_proj"])
    (root / "out").mkdir()
    ledger = FORMAT.write(run, root / "out", ExportOptions())
    return run, root / "out", ledger


def test_each_matrix_gets_the_smallest_type_that_holds_it(mixed) -> None:  # type: ignore[no-untyped-def]
    run, folder, ledger = mixed
    found = kinds(folder)
    assert {name.removeprefix("blk.0."): kind for name, kind in found.items() if name.startswith("blk.0.")} == {
        "attn_q.weight": "Q2_0",
        "attn_k.weight": "Q4_0",
        "attn_v.weight": "Q8_0",
        "attn_output.weight": "Q2_0",
        "ffn_gate.weight": "Q8_0",
        "ffn_up.weight": "F16",
        "ffn_down.weight": "Q1_0",
        "attn_norm.weight": "F32",
        "ffn_norm.weight": "F32",
    }
    assert found["token_embd.weight"] == found["output.weight"] == "F16"
    assert ledger.num_bytes == (folder / FILE).stat().st_size
    (runtime,) = FORMAT.runtimes(list(run.weights.values()))
    assert runtime.exactness == "a projection (Q1_0, Q2_0, Q4_0, Q8_0)"


def test_llama_cpp_computes_what_the_run_computes(mixed) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    report = FORMAT.check(run, folder)
    assert report.weights == (13, 11)
    assert report.perplexity is not None
    assert abs(math.log(report.perplexity[0] / report.perplexity[1])) < 0.1
    assert "a projection" in report.note and "transformers cannot read" in report.note


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Qwen2Config(**SHAPE, tie_word_embeddings=True), ExportOptions(gguf_embedding="Q8_0")),
        # transformers' reader takes every Qwen3 head for 128 wide
        (Qwen3Config(**{**SHAPE, "num_attention_heads": 2}, head_dim=128), ExportOptions(gguf_embedding="Q8_0")),
        (MistralConfig(**SHAPE, sliding_window=None), ExportOptions()),
        (
            LlamaConfig(
                **SHAPE,
                tie_word_embeddings=True,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            ),
            ExportOptions(),
        ),
    ],
    ids=["qwen2", "qwen3", "mistral", "llama3-rope"],
)
def test_families(tmp_path: Path, config, options) -> None:  # type: ignore[no-untyped-def]
    """Tied and untied heads, biases, norms of heads, scaled rotary embeddings: the same numbers in llama.cpp."""
    run = quantize(save_model(tmp_path / "model", config), tmp_path / "run", 4, 32)
    FORMAT.write(run, tmp_path, options)
    assert ("output.weight" in kinds(tmp_path)) != config.tie_word_embeddings
    report = FORMAT.check(run, tmp_path)
    assert report.weights == (14, 14)


def test_a_run_in_the_types_of_its_file_keeps_the_name_of_their_mixture(mixed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, _, _ = mixed
    first = quantize(Path(run.address), tmp_path / "first", 8, 32)
    FORMAT.write(first, tmp_path, ExportOptions(gguf_embedding="Q8_0"))
    plain, start = GGUFFile(tmp_path / FILE), tmp_path / "start.gguf"
    tensors = [
        NewTensor(name, tensor.shape, tensor.number, functools.partial(plain.raw, name))
        for name, tensor in plain.tensors.items()
    ]
    write_gguf(start, {FILE_TYPE: uint(15)} | {k: v for k, v in plain.fields.items() if k != FILE_TYPE}, tensors)
    again = quantize(start, tmp_path / "again", 8, 32)
    FORMAT.write(again, tmp_path, ExportOptions())
    new, length = (tmp_path / FILE).read_bytes(), GGUFFile(start).tensors["blk.0.attn_q.weight"].offset
    assert new[:length] == start.read_bytes()[:length]


def test_a_run_from_a_gguf_file_keeps_what_it_did_not_quantize(mixed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, _, _ = mixed
    first = quantize(Path(run.address), tmp_path / "first", 8, 32, exclude=["*.1.*"])
    (tmp_path / "start").mkdir()
    FORMAT.write(first, tmp_path / "start", ExportOptions(gguf_embedding="Q8_0"))
    start = tmp_path / "start" / FILE
    again = quantize(start, tmp_path / "again", 2, 64, exclude=["*.1.*"])
    assert source_file(again) is not None
    (tmp_path / "out").mkdir()
    FORMAT.write(again, tmp_path / "out", ExportOptions())
    old, new = GGUFFile(start), GGUFFile(tmp_path / "out" / FILE)
    assert [k for k in new.fields if k != FILE_TYPE] == [k for k in old.fields if k != FILE_TYPE]
    assert {k: v for k, v in new.fields.items() if k != FILE_TYPE} == {
        k: v for k, v in old.fields.items() if k != FILE_TYPE
    }
    assert old.fields[FILE_TYPE] != new.fields.get(FILE_TYPE)
    assert list(new.tensors) == list(old.tensors)
    for name in ("token_embd.weight", "blk.1.ffn_down.weight", "output_norm.weight"):
        assert new.raw(name).tobytes() == old.raw(name).tobytes()
    assert new.tensors["blk.0.ffn_down.weight"].number == BLOCK_TYPES["Q2_0"].number
    weights = sum(weight.count * FORMAT.stored_bits(weight, again) for weight in again.weights.values()) / 8
    assert weights + FORMAT.other_bytes(again, 0) == sum(tensor.num_bytes for tensor in new.tensors.values())
    FORMAT.check(again, tmp_path / "out")


def test_a_wrong_value_fails_the_check(mixed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    content = bytearray((folder / FILE).read_bytes())
    content[GGUFFile(folder / FILE).tensors["blk.1.attn_q.weight"].offset + 5] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckFailedError, match=r"blk\.1\.attn_q\.weight differs"):
        FORMAT.check(run, tmp_path)


def test_a_file_that_llama_cpp_refuses_fails_the_check(mixed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from lightning_gsq.export.readers.llama_cpp import ask

    _, folder, _ = mixed
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes()[:-4096])
    with pytest.raises(CheckFailedError, match=r"llama\.cpp does not run"):
        ask(tmp_path / FILE, ["a"], 1, 1, [1, 2])


def test_without_llama_cpp_that_is_said(mixed, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    report = gguf_check.check_file(run, folder / FILE, layout_of(run))
    assert report.weights == (13, 11)
    assert report.describe().startswith(
        "checked with the bytes of the file: 11 of 13 quantized weights bit-identical, NOT CHECKED with xllamacpp"
    )


def test_a_file_is_checked_a_block_at_a_time(mixed, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    wanted = FORMAT.check(run, folder)
    monkeypatch.setattr(FinishedRun, "fits", lambda *_: False)
    report = FORMAT.check(run, folder)
    assert (report.weights, report.perplexity) == (wanted.weights, wanted.perplexity)
    assert "the host has no room" in report.note and "of 1 prompts" in report.note


def test_other_families_and_tokenizers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"gguf is written from a folder for llama, .* not for opt; start"):
        architecture_of(OPTConfig())
    config = LlamaConfig(**SHAPE)
    with pytest.raises(ConfigurationError, match="has no merges"):
        fields_of_model(config, byte_tokenizer(), "x")
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(ConfigurationError, match="not one of those that can be written"):
        fields_of_model(config, tokenizer, "x")
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigurationError, match="rotary embeddings of type yarn"):
        fields_of_model(config, bpe_tokenizer(), "x")
