"""Which vectors are norms."""

import torch
from torch import nn
from transformers import GptOssConfig, Mamba2Config, PreTrainedModel

from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.norms import norm_names
from tests.support.tiny import COMMON, FAMILIES, random_model


def _names(model: PreTrainedModel) -> set[str]:
    return set(norm_names(find_blocks(model)[1][0]))


def test_norms_of_llama_and_gpt2() -> None:
    assert _names(FAMILIES["llama"]()) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert _names(FAMILIES["gpt2"]()) == {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"}


def test_attention_sinks_are_none() -> None:
    config = GptOssConfig(**{**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8})
    names = _names(random_model(config))
    assert names == {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_time_steps_and_decays_are_none() -> None:
    config = Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=1, vocab_size=64
    )
    assert _names(random_model(config)) == {"norm.weight", "mixer.norm.weight"}


def test_a_scale_of_a_layer_is_none() -> None:
    class LayerScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    assert norm_names(nn.ModuleDict({"scale": LayerScale(), "ln": nn.LayerNorm(4)})) == ["ln.weight", "ln.bias"]
