"""Finished runs of tiny models for the tests of formats: warm starts alone, two seconds each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from lightning_gsq.cli import main
from lightning_gsq.export import FinishedRun, open_run
from tests.support.tiny import COMMON, random_model

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "i")]
SHAPE = {**COMMON, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 272}


def bpe_tokenizer(**ends: str) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, digits one by one: the rules of SmolLM's tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **ends)


def save_model(
    folder: Path, config: PretrainedConfig | None = None, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """A random model of two blocks whose rows are multiples of 128, with that tokenizer or another."""
    model = random_model(config or LlamaConfig(**SHAPE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    (tokenizer or bpe_tokenizer()).save_pretrained(folder)
    return folder


def quantize(model: Path, folder: Path, bits: object, group_size: int, **settings: Any) -> FinishedRun:
    """A run of the warm start alone, opened."""
    text = folder.with_suffix(".txt")
    text.write_text("".join(f"In line {i} the square of the number is {i * i}.\n" for i in range(200)))
    source = {"class_path": "lightning_gsq.data.TextFile", "init_args": {"path": str(text)}}
    content = {
        "export": settings.pop("export", []),
        "trainer": {"default_root_dir": str(folder), "accelerator": "cpu", "precision": "32-true"},
        "model": {
            "pretrained": str(model),
            "embedding": "auto" if "size" in settings else None,
            "scheme": {"bits": bits, "group_size": group_size},
            "warm_start": {"class_path": "lightning_gsq.quantizers.RTN", "init_args": {"weighted": False}},
            "compile_blocks": False,
            "phases": ["init"],
            **settings,
        },
        "data": {"source": source, "sequence_length": 32, "num_sequences": 2, "num_validation_sequences": 1},
        "evaluation": {"source": source, "sequence_length": 32, "num_windows": 1},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(file)]) == 0
    return open_run(folder)


def with_own_code(folder: Path, leaves: Path) -> None:
    """Makes a saved Llama one that only its own Python code can load; that code leaves a file when it runs."""
    edit_config(
        folder,
        model_type="own_llama",
        architectures=["OwnLlama"],
        auto_map={"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnLlama"},
    )
    (folder / "own_llama.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        f"Path({str(leaves)!r}).touch()\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n\n\n"
        "class OwnLlama(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )


def edit_config(folder: Path, **changes: Any) -> None:
    """Replaces entries of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
