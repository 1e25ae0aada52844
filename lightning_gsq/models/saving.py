"""Writing a model as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Writes an ordinary Hugging Face folder.

    Args:
        model: The model with its quantized weights installed.
        tokenizer: Its tokenizer.
        folder: The folder.
        dtype: Dtype of all floating-point parameters.
    """
    # Tied parameters are converted once, so that they still share memory and are written once.
    before = model.state_dict()
    converted = {(p.data_ptr(), p.shape): p.to(dtype) for p in before.values() if p.is_floating_point()}
    state = {name: converted.get((p.data_ptr(), p.shape), p) for name, p in before.items()}
    model.save_pretrained(folder, state_dict=state)
    # save_pretrained writes the dtype of the model in memory, which is not that of the file.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer's files.

    Raises:
        OSError: the disk fails; the library that writes them raises bare exceptions then.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
