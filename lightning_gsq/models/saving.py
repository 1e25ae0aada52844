"""Writing a model as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lightning_gsq.models.address import ModelSource
from lightning_gsq.models.classes import is_outside, outside_of_text

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""How a model for more than text makes its input; beside the tokenizer's files."""


def write_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Writes an ordinary Hugging Face folder.

    Args:
        model: The model with its quantized weights installed.
        tokenizer: Its tokenizer.
        folder: The folder.
        dtype: Dtype of all floating-point parameters but those outside of the text decoder, which stay as they are.
    """
    # Tied parameters are converted once, so that they still share memory and are written once.
    before, outside = model.state_dict(), outside_of_text(model)
    converted = {
        (p.data_ptr(), p.shape): p.to(dtype)
        for name, p in before.items()
        if p.is_floating_point() and not is_outside(name, outside)
    }
    state = {name: converted.get((p.data_ptr(), p.shape), p) for name, p in before.items()}
    model.save_pretrained(folder, state_dict=state)
    # save_pretrained writes the dtype of the model in memory, which is not that of the file.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder)


def copy_processor(source: ModelSource, folder: Path) -> None:
    """Copies what makes the input of a model for more than text, as far as it is there and not written yet."""
    for name in PROCESSOR_FILES:
        if Path(source.path).is_dir():
            file: str | None = str(Path(source.path) / name)
        else:
            file = cached_file(
                source.path, name, revision=source.revision or "main", _raise_exceptions_for_missing_entries=False
            )
        if file is not None and Path(file).is_file() and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


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
