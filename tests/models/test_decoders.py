"""Decoders of many kinds, from a configuration to a saved model with rounded weights (scripts/sweep_decoders.py)."""

from pathlib import Path
from types import ModuleType

import pytest

from tests.support.scripts import script

KINDS = [
    "afmoe",  # gates, dense and sparse blocks
    "bamba",  # Mamba 2 and attention
    "bart",  # a decoder with cross attention that is never used
    "biogpt",
    "cohere2",  # no second norm, a factor on the logits
    "dbrx",  # experts fused along rows
    "deepseek_v3",  # latent attention, router with a bias
    "deepseek_v32",  # an indexer in every block
    "falcon_h1",  # state space and attention side by side
    "gemma3",  # vision-language: the text decoder
    "gemma3n_text",  # four streams, inputs for each block, keys of other blocks
    "gemma4_text",
    "glm4v",  # vision and text, as the six further ones of these
    "gpt_oss",  # biases of experts, attention sinks
    "hy_v4",  # an indexer whose choice other blocks use
    "internvl",
    "jamba",  # Mamba and experts
    "kimi_k25",
    "llama4_text",  # experts by bmm, a body without a name
    "longcat_flash",  # two attentions a block
    "mistral3",
    "olmo_hybrid",  # gated linear attention
    "paligemma",
    "qwen2_vl",
    "qwen3_next",
    "qwen3_vl_moe",
    "recurrent_gemma",  # gates by head
    "rwkv",
    "xglm",  # a mask that does not broadcast
    "zaya",  # a router's state that goes on to the next
]


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    """The script as a module."""
    return script("sweep_decoders")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind(kind: str, sweep: ModuleType, tmp_path: Path) -> None:
    result = sweep.examine(kind, tmp_path)
    assert result["outcome"] == "ok", result["line"]
    assert result["share"] > 0.6


def test_blocks_that_share_weights_are_refused_in_one_line(sweep: ModuleType, tmp_path: Path) -> None:
    result = sweep.examine("zamba2", tmp_path)
    assert result["outcome"] == "refused"
    assert "are the same" in result["line"]


def test_two_lists_of_blocks_are_refused_in_one_line(sweep: ModuleType, tmp_path: Path) -> None:
    result = sweep.examine("xlm", tmp_path)
    assert result["outcome"] == "refused"
    assert "has two lists of 4 blocks, transformer.ffns and transformer.attentions" in result["line"]


def test_the_table(sweep: ModuleType) -> None:
    results = [
        {"kind": "one", "outcome": "ok", "share": 0.5, "line": ""},
        {"kind": "two", "outcome": "refused", "line": "two | lists"},
    ]
    table = sweep.page(results)
    assert "2 types: 1 ok, 1 refused, 0 not built, 0 traceback" in table
    assert "| `one` | ok | 50.0% |  |" in table and "two / lists" in table
