"""Random models of a few thousand weights, one a family, and a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 258
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this configuration whose blocks do more than the identity; always the same weights."""
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 leaves a random model's blocks close to the identity
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: random_model(LlamaConfig(**COMMON)),
    "qwen2": lambda: random_model(Qwen2Config(**COMMON)),
    "qwen3": lambda: random_model(Qwen3Config(**COMMON, head_dim=8)),
    "gemma2": lambda: random_model(Gemma2Config(**COMMON, head_dim=8, sliding_window=4)),
    "gemma3": lambda: random_model(Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=4, sliding_window_pattern=2)),
    "mistral": lambda: random_model(MistralConfig(**COMMON, sliding_window=4)),
    "opt": lambda: random_model(OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32)),
    "gpt2": lambda: random_model(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=256)
    ),
    "gpt_neox": lambda: random_model(GPTNeoXConfig(**COMMON)),
    "phi3": lambda: random_model(Phi3Config(**COMMON)),
    "qwen3_moe": lambda: random_model(
        Qwen3MoeConfig(**COMMON, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    ),
}
LINEAR_WEIGHTS = {
    "llama": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma2": 7,
    "gemma3": 7,
    "mistral": 7,
    "opt": 6,
    "gpt2": 4,
    "gpt_neox": 4,
    "phi3": 4,
    "qwen3_moe": 6,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, a start and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def deep_llama() -> PreTrainedModel:
    """A Llama of five blocks."""
    return random_model(LlamaConfig(**{**COMMON, "num_hidden_layers": 5}))


def save_tiny_model(family: str, folder: Path) -> Path:
    """Writes model and tokenizer as a Hugging Face folder."""
    (deep_llama if family == "deep_llama" else FAMILIES[family])().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
