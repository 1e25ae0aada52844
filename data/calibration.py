"""Calibration sequences as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule
from lightning_gsq.data.sources import Mixture, ModelSamples, PythonDocumentation, TextSource
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.noise import generator_of

READ_AHEAD = 4
"""Windows read for each window used, so that a random choice is spread over more than the beginning of a source."""


class CalibrationDataModule(LightningDataModule):
    """Cuts text into windows of equal length and splits them into training and validation sequences.

    Documents are tokenised without special tokens, joined by a blank line and cut into windows that do not overlap;
    a seeded choice of windows goes to training, another to validation.

    Args:
        source: Where the text comes from.
        sequence_length: Tokens of one sequence.
        num_sequences: Training sequences. Blocks overfit: prefer fresh sequences to repeated ones, so one pass.
        num_validation_sequences: Held-out sequences on which each block's error is measured.
        batch_size: Sequences of one step, on one device.
        chat_template: Pass every document through the tokenizer's chat template, plain text as a user's message.
        seed: Seed of the choice and order of the sequences.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        sequence_length: int = 512,
        num_sequences: int = 240,
        num_validation_sequences: int = 16,
        batch_size: int = 2,
        chat_template: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("sequence_length", sequence_length),
            ("num_sequences", num_sequences),
            ("num_validation_sequences", num_validation_sequences),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ConfigurationError(f"data.{name} must be at least 1, got {value}")
        self.source = source or PythonDocumentation()
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.num_sequences, self.num_validation_sequences = num_sequences, num_validation_sequences
        self.chat_template, self.seed = chat_template, seed
        self.train_ids_NT: Tensor
        self.validation_ids_NT: Tensor

    def check(self, max_length: int | None) -> None:
        """Verifies what can be verified before the model is loaded.

        Args:
            max_length: The longest sequence the model takes, in tokens; None if it has no limit.
        """
        if max_length is not None and self.sequence_length > max_length:
            raise ConfigurationError(
                f"data.sequence_length: {self.sequence_length} tokens exceed the model's limit of {max_length}"
            )
        self.source.check()

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Reads, tokenises, cuts and splits; fills ``train_ids_NT`` and ``validation_ids_NT`` (int64).

        Raises:
            ConfigurationError: the source holds too little text.
        """
        if isinstance(self.source, (ModelSamples, Mixture)) and self.source.needs_model:
            self.source.attach(model, tokenizer)
        wanted = self.num_sequences + self.num_validation_sequences
        parts: list[list[int]] = []
        tokens = 0
        for text in self._texts(tokenizer):
            parts.append(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            tokens += len(parts[-1])
            if tokens >= READ_AHEAD * wanted * self.sequence_length:
                break
        windows = tokens // self.sequence_length
        if windows < wanted:
            raise ConfigurationError(
                f"data.source: {self.num_sequences} training and {self.num_validation_sequences} validation sequences "
                f"of {self.sequence_length} tokens take {wanted * self.sequence_length:,} tokens, the source has "
                f"{tokens:,} ({windows} sequences); lower data.num_sequences or data.sequence_length, or add text"
            )
        ids = torch.tensor([token for part in parts for token in part][: windows * self.sequence_length])
        order = torch.randperm(windows, generator=generator_of("calibration", self.seed))[:wanted]
        chosen_NT = ids.view(windows, self.sequence_length)[order]
        self.train_ids_NT = chosen_NT[: self.num_sequences]
        self.validation_ids_NT = chosen_NT[self.num_sequences :]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of token ids ``B T``."""
        return DataLoader(TensorDataset(self.train_ids_NT), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of held-out token ids ``B T``."""
        return DataLoader(TensorDataset(self.validation_ids_NT), batch_size=self.batch_size)

    def _texts(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        for document in self.source.documents():
            if isinstance(document, str) and not self.chat_template:
                yield document + "\n\n"
                continue
            if tokenizer.chat_template is None:
                raise ConfigurationError("data.chat_template: the tokenizer has no chat template; use plain text")
            messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
            yield str(tokenizer.apply_chat_template(messages, tokenize=False))
