"""Writing a model as an ordinary Hugging Face folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import cached_file

from lightning_gsq.models.address import ModelSource
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.classes import is_outside, outside_of_text
from lightning_gsq.system.hub import without_waiting
from lightning_gsq.system.shards import SINGLE, Shards

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""How a model for more than text makes its input; beside the tokenizer's files."""


def write_dense(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    turn_of: Callable[[int], AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
) -> None:
    """Writes an ordinary Hugging Face folder, in memory for what is outside of the blocks and for one block.

    Args:
        model: The model; outside of its blocks it has the weights to write.
        tokenizer: Its tokenizer.
        folder: The folder.
        dtype: Dtype of all floating-point parameters but those outside of the text decoder, which stay as they are.
        turn_of: A context in which the block of a number has the weights to write.
    """
    model.save_pretrained(folder, state_dict={})  # everything but the weights
    (folder / SINGLE).unlink(missing_ok=True)
    shards, towers = Shards(folder), outside_of_text(model)

    def write(names: list[str]) -> None:
        state = model.state_dict()
        values = {name: state[name] if is_outside(name, towers) else _in(dtype, state[name]) for name in names}
        for name, value in revert_weight_conversion(model, values).items():
            shards.add({name: value})

    outside, blocks = _stored_names(model)
    write(outside)
    for index, names in enumerate(blocks):
        with turn_of(index):
            write(names)
    shards.finish()
    # save_pretrained writes the dtype of the model in memory, which is not that of the file.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder)


def _in(dtype: torch.dtype, value: Tensor) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _stored_names(model: PreTrainedModel) -> tuple[list[str], list[list[str]]]:
    """Names of what is stored outside of the blocks, and of each block; of tied ones, that which transformers keeps."""
    prefix, blocks = find_blocks(model)
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    outside, inside = list[str](), [list[str]() for _ in blocks]
    for name in remove_tied_weights_from_state_dict(state, model):
        number = name.removeprefix(f"{prefix}.").partition(".")[0]
        (inside[int(number)] if name.startswith(f"{prefix}.") else outside).append(name)
    return outside, inside


def copy_processor(source: ModelSource, folder: Path) -> None:
    """Copies what makes the input of a model for more than text, as far as it is there and not written yet."""
    with without_waiting():
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
