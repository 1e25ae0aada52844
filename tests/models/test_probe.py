"""The short sequence that shows how a model calls its blocks."""

import torch
from transformers import LlamaConfig, PreTrainedModel

from lightning_gsq.models.probe import PROBE_TOKENS, probe_ids
from tests.support.tiny import COMMON, random_model


def test_all_tokens_differ(family: PreTrainedModel) -> None:
    assert probe_ids(family).tolist() == [list(range(PROBE_TOKENS))]


def test_a_small_vocabulary_repeats() -> None:
    model = random_model(
        LlamaConfig(**{**COMMON, "vocab_size": 5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    )
    assert torch.equal(probe_ids(model)[0], torch.arange(PROBE_TOKENS) % 5)
    assert model(probe_ids(model)).logits.shape == (1, PROBE_TOKENS, 5)
