"""Finished runs whose embedding or head is quantized, of the warm start alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig

from lightning_gsq.export import FinishedRun
from tests.support.exported import SHAPE, quantize, save_model
from tests.support.tiny import COMMON

CONFIGS: dict[str, PretrainedConfig] = {
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "scaled": Gemma3TextConfig(
        **{**COMMON, "vocab_size": 272},
        head_dim=8,
        sliding_window=4,
        sliding_window_pattern=2,
        tie_word_embeddings=True,
    ),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def outer_run(folder: Path, kind: str, bits: object = 3, **settings: Any) -> FinishedRun:
    """A run of a tiny model, opened; ``settings`` of the model."""
    return quantize(save_model(folder / "model", CONFIGS[kind]), folder / "run", bits, 32, **settings)
