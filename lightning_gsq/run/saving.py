"""The folder ``model/`` of a run: the quantized model as an ordinary Hugging Face folder, marked as the run's own."""

from __future__ import annotations

import functools
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.address import ModelSource
from lightning_gsq.models.classes import outside_of_text
from lightning_gsq.models.saving import copy_processor, save_tokenizer, write_dense
from lightning_gsq.run.substitution import Substitution
from lightning_gsq.system.owned_folders import growing, obstacle, out_of_date, publish, write_mark

MARK = "lightning-gsq.json"
"""File in the folder that says what it was made from, and names the others with their digests."""


def check_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Verifies, before any long work, that everything beside the weights can be written.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: A folder that can be written.

    Raises:
        ConfigurationError: transformers refuses to write the configuration or the tokenizer.
    """
    with growing(folder / "trial") as trial:
        generation = model.generation_config
        for what, write in (
            ("config.json", model.config.save_pretrained),
            ("generation_config.json", None if generation is None else generation.save_pretrained),
            ("tokenizer", functools.partial(save_tokenizer, tokenizer)),
        ):
            try:
                if write is not None:
                    write(trial)
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigurationError(
                    f"model.pretrained: its {what} can be read and not be written again ({error}); mend it in the "
                    "model's folder"
                ) from error


def save_model(weights: Substitution, folder: Path, made_from: str, source: ModelSource) -> bool:
    """Writes the model's folder, whole or not at all, unless it is there, whole and made from the same.

    Args:
        weights: The model and its weights: those outside of the blocks installed, those of a block for its turn.
        folder: The folder; replaced if an earlier save made it.
        made_from: Digest of what the weights follow from.
        source: Where the original model is.

    Returns:
        Whether anything was written.

    Raises:
        ConfigurationError: it cannot be written, or something else is there.
    """
    network, dtype = weights.model.network, weights.model.storage.output_dtype
    content = {"made_from": made_from, "dtype": str(dtype)}
    if out_of_date(folder, MARK, content) is None:
        return False
    reason = obstacle(folder, MARK)
    if reason is not None:
        raise ConfigurationError(f"trainer.default_root_dir: {reason}; move it away, and the same command goes on")
    try:
        with growing(folder) as partial:
            write_dense(network, weights.model.tokenizer, partial, dtype, weights.block)
            if outside_of_text(network):
                copy_processor(source, partial)
            write_mark(partial, MARK, content)
            publish(partial, folder, MARK)
    except (OSError, SafetensorError) as error:
        text = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"trainer.default_root_dir: cannot write {folder}: {text}. The same command goes on from here"
        ) from error
    return True
