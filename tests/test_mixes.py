"""The mixes of llama.cpp that sizes are compared with."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.support.scripts import script


def _mix(kind: str, network: PreTrainedModel) -> dict[str, str]:
    columns = {name: p.shape[1] for name, p in network.named_parameters() if p.ndim == 2}
    widths: dict[str, str] = script("llama_cpp_mixes").mix(kind, network, columns)
    return widths


def test_a_published_mix() -> None:
    """The types in the published Q4_K_M of Gemma 3 270M, whose rows of 640 hold no blocks of 256."""
    shape = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "head_dim": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144}
    with torch.device("meta"):
        network = Gemma3ForCausalLM(Gemma3TextConfig(**shape, **heads))
    widths = _mix("Q4_K_M", network)
    assert Counter(widths.values()) == {"q5_0": 81, "q4_k": 27, "q8_0": 10, "q6_k": 9}
    assert widths["model.embed_tokens.weight"] == "q8_0"
    more = [index for index in range(18) if widths[f"model.layers.{index}.mlp.down_proj.weight"] == "q6_k"]
    assert more == [0, 1, 4, 7, 10, 13, 15, 16, 17]


def test_rows_of_whole_blocks_take_the_types_of_the_name() -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16, "vocab_size": 512}
    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=1))
    widths = _mix("Q2_K", network)
    kinds = {name.split(".")[-2]: width for name, width in widths.items()}
    narrow = dict.fromkeys(("embed_tokens", "q_proj", "k_proj", "gate_proj", "up_proj"), "q2_k")
    assert kinds == narrow | {"v_proj": "q4_k", "o_proj": "q3_k", "down_proj": "q3_k", "lm_head": "q6_k"}
    values = [_mix("Q3_K_M", network)[f"model.layers.{index}.self_attn.v_proj.weight"] for index in range(16)]
    assert values == ["q5_k"] * 2 + ["q4_k"] * 14
