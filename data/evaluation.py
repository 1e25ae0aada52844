"""Text to measure perplexity on, as the papers of this field do it."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning_gsq.data.sources import PythonDocumentation, TextSource
from lightning_gsq.data.tokens import RetryingReader
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError

ByBlock = bool | Literal["auto"]


class PerplexityData(LightningDataModule):
    """Windows of an evaluation text.

    All documents are joined by a blank line and tokenised once without special tokens; the ids are cut into
    windows of equal length from the beginning, without overlap, and the rest is dropped. A window's first token is
    context only.

    Args:
        source: The text; null for the tenth of Python's documentation that calibration leaves out. For WikiText's
            raw files use ``TextFile`` with ``rows: true``.
        sequence_length: Tokens of a window.
        num_windows: Windows to use; null for all.
        by_block: Measure block by block, the device never holding more than one: true, false, or "auto" for where the
            whole model does not fit the free memory of the accelerator.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        sequence_length: int = 1024,
        num_windows: int | None = None,
        by_block: ByBlock = "auto",
    ) -> None:
        super().__init__()
        if sequence_length < 2:
            raise ConfigurationError(f"evaluation.sequence_length must be at least 2, got {sequence_length}")
        if num_windows is not None and num_windows < 1:
            raise ConfigurationError(f"evaluation.num_windows must be at least 1, or null for all, got {num_windows}")
        self.source = source or PythonDocumentation("evaluation")
        self.sequence_length, self.num_windows, self.by_block = sequence_length, num_windows, by_block
        self.ids_NT: Tensor

    def check(self, max_length: int | None) -> None:
        """Verifies what can be verified before the model is loaded."""
        if max_length is not None and self.sequence_length > max_length:
            raise ConfigurationError(
                f"evaluation.sequence_length: {self.sequence_length} tokens exceed the model's limit of {max_length}"
            )
        if self.source.needs_model:
            raise ConfigurationError("evaluation.source: a model cannot be judged by text that it writes itself")
        self.source.check()

    def tokenize(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Fills ``ids_NT`` (int64).

        Raises:
            ConfigurationError: the text has fewer windows than asked for.
        """
        documents = list(RetryingReader(self.source))
        if not all(isinstance(document, str) for document in documents):
            raise ConfigurationError("evaluation.source: perplexity needs plain text, got conversations")
        text = "\n\n".join(str(document) for document in documents)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        available = len(ids) // self.sequence_length
        wanted = self.num_windows or available
        if available < max(wanted, 1):
            raise ConfigurationError(
                f"evaluation.source: {max(wanted, 1)} windows of {self.sequence_length} tokens were asked for, the "
                f"text has {len(ids):,} tokens ({available} windows); lower evaluation.num_windows or "
                "evaluation.sequence_length"
            )
        self.ids_NT = ids[: wanted * self.sequence_length].view(wanted, self.sequence_length)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Windows of token ids, ``1 T``."""
        return DataLoader(self.ids_NT, batch_size=1)  # type: ignore[arg-type]
