"""From the last hidden states to logits."""

import pytest
import torch
from transformers import CohereConfig, GraniteConfig

from lightning_gsq.models.head import body, find_head, last_hidden
from tests.support.decoders import DECODERS
from tests.support.tiny import COMMON, FAMILIES, random_model

SCALED = {
    "cohere": lambda: random_model(CohereConfig(**COMMON, logit_scale=0.25)),
    "granite": lambda: random_model(GraniteConfig(**COMMON, logits_scaling=4.0)),
}
"""Models that multiply or divide their logits by a number."""


@pytest.mark.parametrize(
    "name", [*SCALED, "llama", "gemma2", "gpt2", "llama4", "gemma3n", "bloom", "openai_gpt", "xglm"]
)
def test_the_head_of_what_the_body_returns(name: str) -> None:
    model = {**FAMILIES, **DECODERS, **SCALED}[name]()
    ids = torch.arange(20)[None]
    logits = find_head(model).logits(last_hidden(model, ids))
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCALED)
def test_a_factor_on_the_logits(name: str) -> None:
    assert find_head(SCALED[name]()).scale == pytest.approx(0.25, rel=1e-3)


def test_a_body_that_its_class_does_not_name() -> None:
    model = DECODERS["llama4"]()
    assert model.base_model is model and body(model) is model.model
