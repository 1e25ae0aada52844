"""What each format says of a model before anything is trained or written."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from lightning_gsq.export import all_formats, format_of, preflight
from lightning_gsq.export.readers import packages
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.exported import SHAPE, save_model
from tests.support.planned import planned
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("preflight") / "llama")


def test_every_format_holds_a_plain_llama(llama: Path, tmp_path: Path) -> None:
    formats = list(all_formats().values())
    assert preflight.obstacles(formats, planned(llama), tmp_path / "out", overwrite=False) == {}
    assert not (tmp_path / "out").exists()
    sizes = {format_.name: preflight.num_bytes(format_, planned(llama)) for format_ in formats}
    assert min(sizes, key=lambda name: sizes[name]) == "gguf" or sizes["gguf"] == sizes["native"]
    assert max(sizes, key=lambda name: sizes[name]) == "dequantized"


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("opt", "gguf", "not for opt; start the run from a GGUF file"),
        ("qwen3_moe", "gptq", "fuses several experts; compressed-tensors, native and dequantized hold it"),
        ("qwen3_moe", "gguf", "norm_topk_prob is false; start the run from a GGUF file"),
        ("gpt2", "gptq", "is stored transposed"),
        ("gpt2", "gguf", "not for gpt2; start the run from a GGUF file"),
        ("llama", "gguf", "the tokenizer has no merges"),
    ],
)
def test_architectures_and_tokenizers(tmp_path: Path, family: str, name: str, message: str) -> None:
    run = planned(save_tiny_model(family, tmp_path / family), 4, -1)
    assert message in (format_of(name).refuse(run) or "")
    assert format_of("native").refuse(run) is None and format_of("dequantized").refuse(run) is None


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({"bits": 6}, "gptq", "holds 2, 3, 4 and 8 bits"),
        ({"scale_dtype": "float32"}, "gptq", "--model.scale_dtype float16"),
        ({"scale_dtype": "float32"}, "gguf", "--model.scale_dtype float16"),
        ({"scale_dtype": "float32"}, "compressed-tensors", None),
        ({"group_size": 48}, "compressed-tensors", "native holds it"),
    ],
)
def test_grids_and_scales(llama: Path, settings: dict[str, object], name: str, message: str | None) -> None:
    reason = format_of(name).refuse(planned(llama, **settings))  # type: ignore[arg-type]
    assert reason is None if message is None else message in (reason or "")


@pytest.mark.parametrize(
    ("preset", "holding"),
    [
        ("mlx4g64", {"native", "dequantized", "mlx", "gguf"}),
        ("iq4_nl", {"native", "dequantized", "gguf"}),
        ("q4_k", {"native", "dequantized", "gguf"}),
        ("q4_0", {"native", "dequantized", "mlx", "gguf", "compressed-tensors", "gptq"}),
    ],
)
def test_layouts_of_scales_that_a_format_does_not_know(tmp_path: Path, preset: str, holding: set[str]) -> None:
    folder = save_model(tmp_path / "llama", LlamaConfig(**{**SHAPE, "hidden_size": 256}))
    run = planned(folder, scheme=QuantScheme(preset=preset))
    reasons = {name: format_.refuse(run) for name, format_ in all_formats().items()}
    assert {name for name, reason in reasons.items() if reason is None} == holding
    refusals = [reason for reason in reasons.values() if reason is not None]
    assert all(f"is {preset}; native holds it" in reason for reason in refusals)
    weights = list(run.weights.values())
    exact = format_of("gguf").runtimes(weights)[0].exactness.startswith("exact")
    assert exact  # offsets of groups of 64 in Q4_1, the others in the types of their names


def test_salient_weights(llama: Path) -> None:
    run = planned(llama, scheme=QuantScheme(1, 64, SalientPart(ratio=0.1)))
    reasons = {name: preflight.model_obstacle(format_, run) for name, format_ in all_formats().items()}
    assert {name for name, reason in reasons.items() if reason is None} == {"native", "dequantized"}
    assert "has salient weights of other bits, which gguf cannot hold" in str(reasons["gguf"])
    assert next(iter(run.weights.values())).bits(16) == pytest.approx(1 + 16 / 64 + 0.1 * 3)


def test_values_that_overflow_where_they_are_loaded(llama: Path) -> None:
    run = planned(llama)
    run.network.get_parameter("model.norm.weight").data[0] = 1e6
    for name in ("gptq", "compressed-tensors"):
        assert "model.norm.weight reaches 9.99e+05" in (format_of(name).refuse(run) or "")
    assert format_of("compressed-tensors").refuse(planned(llama, scale_dtype="bfloat16")) is None


def test_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", LlamaConfig(**{**SHAPE, "vocab_size": 260}))
    assert "the embedding 260 rows" in (format_of("gguf").refuse(planned(folder)) or "")


def test_a_long_name_and_a_file_in_the_way(llama: Path, tmp_path: Path) -> None:
    run, native = planned(llama), [format_of("native")]
    assert "cannot be used" in preflight.obstacles(native, run, tmp_path / ("x" * 300), False)["native"]
    (tmp_path / "file").write_text("")
    assert "is not a folder" in preflight.obstacles(native, run, tmp_path / "file", False)["native"]


def test_the_original_is_never_inside_what_is_replaced(llama: Path) -> None:
    reason = preflight.folder_obstacle(llama, overwrite=True, inputs=preflight.inputs_of(planned(llama)))
    assert reason is not None and "which the export reads: give another --output" in reason


@pytest.mark.parametrize(
    ("bits", "names"),
    [(4, ["transformers", "vLLM", "SGLang"]), (3, ["transformers", "vLLM with Humming kernels, GPU"])],
)
def test_which_servers_have_kernels_depends_on_the_width(llama: Path, bits: int, names: list[str]) -> None:
    weights = list(planned(llama, bits).weights.values())
    assert [runtime.name for runtime in format_of("compressed-tensors").runtimes(weights)] == names


def test_a_block_type_that_is_filled_badly_is_said(llama: Path) -> None:
    assert format_of("gguf").remarks(planned(llama, 3, 64)) == [
        "3 bit, groups of 64: held as Q4_0, 4.5 bits a weight instead of 3.25; these fit a block type: "
        "2 bit, groups of 64 (Q2_0, 2.25 bits), 4 bit, groups of 32 (Q4_0, 4.5 bits)"
    ]
    assert format_of("gguf").remarks(planned(llama, 4, 32)) == []
    assert format_of("gguf").stored_bits(next(iter(planned(llama, 2, 64).weights.values())), planned(llama)) == 2.25


def test_a_missing_reader_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    note = packages.missing("gptqmodel")
    assert note == "NOT CHECKED with gptqmodel, which is not installed (pip install gptqmodel)"
    report = packages.not_checked("gptqmodel")
    assert report is not None and report.describe() == note


@pytest.mark.parametrize(
    ("family", "formats"),
    [
        ("llama", ["native", "dequantized"]),  # its tokenizer has no merges, groups of 5 end inside of rows
        ("gpt2", ["native", "dequantized"]),
        ("gemma3", ["native", "compressed-tensors"]),
    ],
)
def test_formats_that_are_suggested_take_the_run(family: str, formats: list[str], tmp_path: Path) -> None:
    run = planned(save_tiny_model(family, tmp_path / family), group_size=5 if family == "llama" else 16)
    assert preflight.suggested_formats(run) == formats


def test_gguf_is_suggested_where_it_takes_the_run(llama: Path) -> None:
    assert preflight.suggested_formats(planned(llama)) == ["native", "gguf"]
