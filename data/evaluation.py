"""Text to measure perplexity on, as the papers of this field do it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning_gsq.data.encoding import (
    StartToken,
    check_ids,
    check_start_token,
    cut_windows,
    encode,
    next_cut,
    num_tokens,
    start_token,
)
from lightning_gsq.data.retrying import RetryingReader
from lightning_gsq.data.sources import END, PythonDocumentation, TextSource, check_sources, names_option
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.digests import tensors_digest

ByBlock = bool | Literal["auto"]
CHARACTERS = 16
"""Characters read for each token that is needed, at first: more than almost any text takes."""
MARGIN = 64
"""Tokens before the end of what was read that the text behind it might still have changed."""


class PerplexityData(LightningDataModule):
    """Windows of an evaluation text.

    All documents are joined by a blank line and tokenised once without special tokens; the ids are cut into
    windows of equal length from the beginning, without overlap, and the rest is dropped. Where the tokenizer starts a
    text with the BOS token, each window is that token and as much less text. A window's first token is context only.

    Args:
        source: The text; null for the tenth of Python's documentation that calibration leaves out. For WikiText's
            raw files use ``TextFile`` with ``rows: true``.
        sequence_length: Tokens of a window.
        num_windows: Windows to use; null for all.
        bos: Let every window start with the BOS token, within its length: true, false, or "auto" for where the
            tokenizer starts a text with it.
        by_block: Measure block by block, the device never holding more than one: true, false, or "auto" for where the
            whole model does not fit the free memory of the accelerator.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        sequence_length: int = 1024,
        num_windows: int | None = None,
        bos: StartToken = "auto",
        by_block: ByBlock = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(sequence_length, int) or sequence_length < 2:
            raise ConfigurationError(f"evaluation.sequence_length must be at least 2, got {sequence_length!r}")
        if num_windows is not None and (not isinstance(num_windows, int) or num_windows < 1):
            raise ConfigurationError(f"evaluation.num_windows must be at least 1, or null for all, got {num_windows!r}")
        check_start_token("evaluation.bos", bos)
        self.source = PythonDocumentation("evaluation") if source is None else source
        check_sources("evaluation.source", self.source)
        self.sequence_length, self.num_windows, self.by_block = sequence_length, num_windows, by_block
        self.bos = bos
        self.start: int | None = None
        """The token that every window starts with, once tokenised; None for none."""
        self.ids_NT: Tensor

    @names_option("evaluation.source")
    def check(self, max_length: int | None) -> None:
        """Verifies what can be verified before the model is loaded."""
        if max_length is not None and self.sequence_length > max_length:
            raise ConfigurationError(
                f"evaluation.sequence_length: {self.sequence_length} tokens exceed the model's limit of {max_length}; "
                "choose at most that"
            )
        if self.source.needs_model:
            raise ConfigurationError("evaluation.source: a model cannot be judged by text that it writes itself")
        self.source.check()

    @names_option("evaluation.source")
    def tokenize(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Fills ``ids_NT`` (int64).

        Raises:
            ConfigurationError: the text has fewer windows than asked for, or does not go with the model.
        """
        self.start = start_token(tokenizer, self.bos, "evaluation.bos")
        ids = self._ids(tokenizer)
        windows_NT = cut_windows(ids, self.sequence_length, self.start)
        wanted = self.num_windows or max(len(windows_NT), 1)
        if len(windows_NT) < wanted:
            raise ConfigurationError(
                f"evaluation.source: {wanted} windows of {self.sequence_length} tokens were asked for, the "
                f"text has {len(ids):,} tokens ({len(windows_NT)} windows); lower evaluation.num_windows or "
                "evaluation.sequence_length"
            )
        self.ids_NT = windows_NT[:wanted]
        check_ids(self.ids_NT.flatten(), tokenizer, model, "evaluation.source: the text")

    def _ids(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """The tokens of the text: all, or a beginning that is long enough, as all would have it."""
        needed = None
        if self.num_windows is not None:
            needed = num_tokens(self.num_windows, self.sequence_length, self.start)
        reader, documents = RetryingReader(self.source), list[str]()
        characters = math.inf if needed is None else CHARACTERS * needed
        length, ended = 0, False
        while True:
            while length < characters and not ended:
                document = next(reader, END)
                if document is END:
                    ended = True
                elif isinstance(document, str):
                    documents.append(document)
                    length += len(document)
                else:
                    raise ConfigurationError(
                        f"evaluation.source: perplexity needs plain text, got conversations ({reader.place})"
                    )
            text = "\n\n".join(documents)
            cut = len(text) if characters >= len(text) else next_cut(text, 0, int(characters))
            ids = torch.tensor(encode(tokenizer, text[:cut], "evaluation.source"), dtype=torch.long)
            if (ended and cut == len(text)) or (needed is not None and len(ids) >= needed + MARGIN):
                return ids
            characters *= 4

    def about(self, precision: str) -> dict[str, Any]:
        """What a perplexity of these windows is one of, as plain data.

        Args:
            precision: Of the arithmetic, as a Trainer names it.
        """
        windows, tokens = self.ids_NT.shape
        return {
            "text": self.source.label,
            "windows": windows,
            "tokens": tokens,
            "starts_with_bos": self.start is not None,
            "precision": precision,
            "digest": tensors_digest({"ids": self.ids_NT}),
        }

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Windows of token ids, ``1 T``."""
        if not hasattr(self, "ids_NT"):
            raise ConfigurationError("PerplexityData: there are no windows yet; call tokenize first")
        return DataLoader(self.ids_NT, batch_size=1)  # type: ignore[arg-type]
