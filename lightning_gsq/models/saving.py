"""Saving a model as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Writes an ordinary Hugging Face folder, whole or not at all.

    Args:
        model: The model with its quantized weights installed.
        tokenizer: Its tokenizer.
        folder: The folder, replaced if it is there.
        dtype: Dtype of all floating-point parameters.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # Tied parameters are converted once, so that they still share memory and are written once.
    before = model.state_dict()
    converted = {(p.data_ptr(), p.shape): p.to(dtype) for p in before.values() if p.is_floating_point()}
    state = {name: converted.get((p.data_ptr(), p.shape), p) for name, p in before.items()}
    model.save_pretrained(partial, state_dict=state)
    # save_pretrained writes the dtype of the model in memory, which is not that of the file.
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
