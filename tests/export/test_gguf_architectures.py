"""Every architecture that is written from a folder: the same numbers in llama.cpp, or a refusal before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.gguf import GGUFFormat
from tests.support.exported import SHAPE, quantize, save_model
from tests.support.tokenizers import sentencepiece_tokenizer, unigram_tokenizer

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
    "phi3": (lambda: Phi3Config(**SIZES, sliding_window=16), lambda: sentencepiece_tokenizer(prefix=True)),
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
    print(case, report.describe())
