"""Every architecture that is written from a folder: the same numbers in llama.cpp, or a refusal before training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

from lightning_gsq.export.contract import CheckReport, ExportOptions
from lightning_gsq.export.formats.gguf import FILE, GGUFFormat
from lightning_gsq.export.formats.gguf_layout import layout_of
from lightning_gsq.gguf.fields import real, text, uint
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.metadata import FILE_TYPE
from lightning_gsq.gguf.names import Names
from lightning_gsq.gguf.tokenizers.byte_level import SPLITS
from lightning_gsq.gguf.tokenizers.derive import tokenizer_fields
from lightning_gsq.gguf.types.codec import dequantize
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.gguf.write import NewTensor, write_gguf
from lightning_gsq.models.config import sliding_windows
from tests.support.exported import SHAPE, quantize, save_model
from tests.support.tiny import random_model
from tests.support.tokenizers import sentencepiece_tokenizer, split_tokenizer, unigram_tokenizer

FORMAT = GGUFFormat()
SIZES = {**SHAPE, "vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
GEMMA = {**SIZES, "num_hidden_layers": 3, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
TWO_ROTATIONS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 90000.0, "factor": 4.0},
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0 + i / 4 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
EXPERTS = {
    **SIZES,
    "head_dim": 32,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return sentencepiece_tokenizer(prefix=False)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return split_tokenizer(SPLITS["qwen2"], pad_token="</s>")


CASES: dict[str, tuple[Callable[[], PretrainedConfig], Callable[[], PreTrainedTokenizerFast]]] = {
    "llama-biases": (
        lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        lambda: sentencepiece_tokenizer(prefix=True),
    ),
    "llama-unigram": (lambda: LlamaConfig(**SIZES), unigram_tokenizer),
    "smollm3": (
        lambda: SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}, tie_word_embeddings=True),
        lambda: sentencepiece_tokenizer(prefix=True),
    ),
    "gemma": (lambda: GemmaConfig(**SIZES, head_dim=32, hidden_act="gelu_pytorch_tanh"), gemma_tokenizer),
    "gemma2": (lambda: Gemma2Config(**GEMMA), gemma_tokenizer),
    "gemma3": (
        lambda: Gemma3TextConfig(**GEMMA, sliding_window_pattern=3, rope_parameters=TWO_ROTATIONS),
        gemma_tokenizer,
    ),
    "phi3": (lambda: Phi3Config(**SIZES, sliding_window=100), lambda: sentencepiece_tokenizer(prefix=True)),
    "phi3-long": (
        lambda: Phi3Config(
            **{**SIZES, "max_position_embeddings": 2048},
            original_max_position_embeddings=1024,
            rope_parameters=LONG,
        ),
        lambda: sentencepiece_tokenizer(prefix=True),
    ),
    "qwen3-moe": (lambda: Qwen3MoeConfig(**EXPERTS), lambda: sentencepiece_tokenizer(prefix=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_run_computes(case: str, tmp_path: Path) -> None:
    config, tokenizer = (make() for make in CASES[case])
    run = quantize(save_model(tmp_path / "model", config, tokenizer), tmp_path / "run", 4, 32)  # type: ignore[arg-type]
    assert FORMAT.refuse(run) is None
    FORMAT.write(run, tmp_path, ExportOptions())
    report = FORMAT.check(run, tmp_path)
    assert report.weights == (len(run.weights), len(run.weights))
    assert logprob_difference(report) < 0.15  # of a token; activations are rounded to 8 bits


@pytest.mark.parametrize(("family", "window"), [("mistral", 8), ("mistral", 48), ("phi3", 8)])
def test_a_window_that_llama_cpp_has_not(family: str, window: int, tmp_path: Path) -> None:
    """It is said before the run, and the check compares texts no longer than that."""
    config = (Phi3Config if family == "phi3" else MistralConfig)(**SIZES, sliding_window=window)
    tokenizer = sentencepiece_tokenizer(prefix=True)
    run = quantize(save_model(tmp_path / "model", config, tokenizer), tmp_path / "run", 4, 32)
    assert FORMAT.refuse(run) is None
    assert f"for texts of up to {window} tokens, the model's window" in FORMAT.remarks(run)[0]
    FORMAT.write(run, tmp_path, ExportOptions())
    fields = GGUFFile(tmp_path / FILE).fields
    assert fields["phi3.context_length" if family == "phi3" else "llama.context_length"].value == window
    report = FORMAT.check(run, tmp_path)
    assert report.weights == (len(run.weights), len(run.weights))
    if window == 8:
        assert "all prompts are longer than the model's window" in report.note
    else:
        assert logprob_difference(report) < 0.15


def test_a_window_beyond_the_longest_text_is_none() -> None:
    assert sliding_windows(MistralConfig(**SIZES, sliding_window=SIZES["max_position_embeddings"])) == [None, None]
    assert sliding_windows(MistralConfig(**SIZES, sliding_window=8)) == [8, 8]
    assert sliding_windows(Qwen2Config(**SIZES, sliding_window=8)) == [None, None]
    assert sliding_windows(Gemma3TextConfig(**GEMMA, sliding_window_pattern=3)) == [8, 8, None]


def logprob_difference(report: CheckReport) -> float:
    found = re.search(r"next token differ by up to ([\d.e-]+)", report.note)
    assert found is not None
    return float(found.group(1))


FROM_FILE: dict[str, tuple[Callable[[], PretrainedConfig], Callable[[], PreTrainedTokenizerFast]]] = {
    "qwen2-biases": (lambda: Qwen2Config(**SIZES), qwen_tokenizer),
    # transformers' reader takes the widths of heads and experts from its defaults
    "gemma3": (
        lambda: Gemma3TextConfig(**{**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=256),
        gemma_tokenizer,
    ),
    "phi3": (lambda: Phi3Config(**SIZES), qwen_tokenizer),
    "qwen3-moe": (lambda: Qwen3MoeConfig(**{**EXPERTS, "moe_intermediate_size": 768}), qwen_tokenizer),
}


@pytest.mark.parametrize("case", FROM_FILE)
def test_a_run_from_a_file_keeps_the_rest_of_it(case: str, tmp_path: Path) -> None:
    config, tokenizer = (make() for make in FROM_FILE[case])
    first = quantize(save_model(tmp_path / "model", config, tokenizer), tmp_path / "first", 8, 32)  # type: ignore[arg-type]
    (tmp_path / "start").mkdir()
    FORMAT.write(first, tmp_path / "start", ExportOptions(gguf_embedding="Q8_0"))
    again_keeps_the_rest(tmp_path / "start" / FILE, tmp_path)


def again_keeps_the_rest(start: Path, folder: Path) -> None:
    """A run from a file, exported: everything that it did not quantize is the file's."""
    run = quantize(start, folder / "again", 4, 32, exclude=["*.1.*"])
    assert FORMAT.refuse(run) is None
    (folder / "out").mkdir()
    FORMAT.write(run, folder / "out", ExportOptions())
    old, new = GGUFFile(start), GGUFFile(folder / "out" / FILE)
    assert [name for name in new.fields if name in old.fields] == list(old.fields)
    assert [k for k, v in old.fields.items() if new.fields[k] != v] == ([FILE_TYPE] if FILE_TYPE in old.fields else [])
    assert list(new.tensors) == list(old.tensors)
    changed = {name for name in old.tensors if old.raw(name).tobytes() != new.raw(name).tobytes()}
    assert changed == {name for name in layout_of(run).parameters if name.startswith("blk.0.")}
    assert {new.tensors[name].number for name in changed} == {TYPES["Q4_0"].number}
    report = FORMAT.check(run, folder / "out")
    assert report.weights == (len(run.weights), len(run.weights)) and "logits differ" in report.note
    assert logprob_difference(report) < 0.15


def test_a_norm_that_trained_goes_into_the_file_plus_one(tmp_path: Path) -> None:
    config, tokenizer = (make() for make in FROM_FILE["gemma3"])
    first = quantize(save_model(tmp_path / "model", config, tokenizer), tmp_path / "first", 8, 32)  # type: ignore[arg-type]
    (tmp_path / "start").mkdir()
    FORMAT.write(first, tmp_path / "start", ExportOptions())
    run = quantize(tmp_path / "start" / FILE, tmp_path / "again", 4, 32)
    name, stored = "model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight"
    run.trained = {name: run.values[name] * 1.5 + 0.25}
    run.values = {**run.values, **run.trained}
    FORMAT.write(run, tmp_path, ExportOptions())
    old, new = GGUFFile(tmp_path / "start" / FILE), GGUFFile(tmp_path / FILE)
    assert new.tensors[stored].number == TYPES["F32"].number
    assert torch.equal(dequantize(new.raw(stored), 0)[0], run.parameter(name).float() + 1)
    assert new.raw("blk.0.attn_norm.weight").tobytes() == old.raw("blk.0.attn_norm.weight").tobytes()
    assert FORMAT.check(run, tmp_path).weights == (14, 14)


def test_gpt2_from_a_file(tmp_path: Path) -> None:
    """An architecture that is not in the table, whose matrices transformers holds transposed."""
    config = GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=2, n_positions=1024)
    model, names = random_model(config), Names("gpt2", 2)
    fields = {
        "general.architecture": text("gpt2"),
        "gpt2.block_count": uint(2),
        "gpt2.context_length": uint(1024),
        "gpt2.embedding_length": uint(64),
        "gpt2.feed_forward_length": uint(256),
        "gpt2.attention.head_count": uint(2),
        "gpt2.attention.layer_norm_epsilon": real(config.layer_norm_epsilon),
        **{f"tokenizer.{key}": value for key, value in tokenizer_fields(384, qwen_tokenizer()).items()},
    }
    tensors = []
    for name, value in model.named_parameters():
        (stored,) = names.of(name)
        transposed = value.ndim == 2 and any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        own = value.T.contiguous() if transposed else value
        tensors.append(NewTensor(stored, tuple(own.shape), TYPES["F32"].number, own.detach().numpy))
    write_gguf(tmp_path / "gpt2.gguf", fields, tensors)
    again_keeps_the_rest(tmp_path / "gpt2.gguf", tmp_path)


REFUSED: dict[str, tuple[PretrainedConfig, PreTrainedTokenizerFast, str]] = {
    "norm_topk_prob": (
        Qwen3MoeConfig(**{**EXPERTS, "norm_topk_prob": False}),
        qwen_tokenizer(),
        "norm_topk_prob is false",
    ),
    "dense-blocks": (Qwen3MoeConfig(**EXPERTS, mlp_only_layers=[0]), qwen_tokenizer(), r"mlp_only_layers \[0\]"),
    "query-scale": (
        Gemma2Config(**{**GEMMA, "query_pre_attn_scalar": 64}),
        gemma_tokenizer(),
        "by the root of 32, the model .* by that of 64",
    ),
    "no-cap": (Gemma2Config(**GEMMA, attn_logit_softcapping=None), gemma_tokenizer(), "has no attn_logit_softcapping"),
    "window-order": (
        Gemma3TextConfig(**GEMMA, layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
        gemma_tokenizer(),
        "no period that llama.cpp knows",
    ),
    "rotated-blocks": (
        SmolLM3Config(**SIZES, no_rope_layers=[0, 1]),
        qwen_tokenizer(),
        r"no_rope_layers are \[0, 1\]",
    ),
    "biases": (Qwen3Config(**SIZES, head_dim=32, attention_bias=True), qwen_tokenizer(), r"reads no attn_q\.bias"),
    "head": (
        Gemma2Config(**{**GEMMA, "tie_word_embeddings": False}),
        gemma_tokenizer(),
        "takes the embedding for the head of every gemma2 model",
    ),
    "activation": (LlamaConfig(**SIZES, hidden_act="gelu"), qwen_tokenizer(), "computes silu .* the model gelu"),
    "architecture": (
        StableLmConfig(**SIZES),
        qwen_tokenizer(),
        "written from a folder for llama, .*, phi3 models, not for stablelm",
    ),
    "bytes": (LlamaConfig(**SIZES), unigram_tokenizer(byte_fallback=True), "unigram model that falls back to bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused_before_training(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tokenizer, reason = REFUSED[case]
    save_model(tmp_path / "model", config, tokenizer)
    with pytest.raises(AssertionError):
        quantize(tmp_path / "model", tmp_path / "run", 4, 32, export=["gguf"])
    assert re.search(reason, " ".join(capsys.readouterr().err.split()))
    assert not list((tmp_path / "run").rglob("*.safetensors"))
