"""Calibration sequences as a LightningDataModule."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning_gsq.data.documents import Document
from lightning_gsq.data.encoding import (
    StartToken,
    check_ids,
    check_start_token,
    cut_windows,
    embedding_rows,
    encode,
    num_tokens,
    render,
    start_token,
)
from lightning_gsq.data.files import local_path
from lightning_gsq.data.sources import PythonDocumentation, TextSource, check_sources, names_option
from lightning_gsq.data.tokens import TokenStream, fingerprint, tokenizer_identity
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.seeding import generator_of

READ_AHEAD = 4
"""Windows read for each window used, so that a random choice is spread over more than the beginning of a source."""


class CalibrationDataModule(LightningDataModule):
    """Cuts text into windows of equal length and splits them into training and validation sequences.

    Documents are tokenised without special tokens, joined by a blank line and cut into windows that do not overlap,
    each after the BOS token where the model knows text so; a seeded choice of windows goes to training, another to
    validation. Tokens are kept in a file named after text,
    tokenizer and settings: a later run reads them instead of the source, one that was interrupted goes on there.

    Args:
        source: Where the text comes from.
        sequence_length: Tokens of one sequence.
        num_sequences: Training sequences. Blocks overfit: prefer fresh sequences to repeated ones, so one pass.
        num_validation_sequences: Held-out sequences on which each block's error is measured.
        batch_size: Sequences of one step, on one device.
        chat_template: Pass every document through the tokenizer's chat template, plain text as a user's message.
        bos: Let every sequence start with the BOS token, within its length: true, false, or "auto" for where the
            tokenizer starts a text with it.
        seed: Seed of the choice and order of the sequences.
        cache_folder: Where tokens are kept, to be shared by several runs; null for the run folder, where those of text
            that the model writes itself always are.
        retries: Attempts to go on reading where a source failed, before giving up.
        retry_pause: Seconds before the first of them; doubled each time, up to a minute.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        sequence_length: int = 512,
        num_sequences: int = 240,
        num_validation_sequences: int = 16,
        batch_size: int = 2,
        chat_template: bool = False,
        bos: StartToken = "auto",
        seed: int = 0,
        cache_folder: str | None = None,
        retries: int = 5,
        retry_pause: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("sequence_length", sequence_length),
            ("num_sequences", num_sequences),
            ("num_validation_sequences", num_validation_sequences),
            ("batch_size", batch_size),
        ):
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"data.{name} must be at least 1, got {value!r}")
        for name, number in (("retries", retries), ("retry_pause", retry_pause)):
            if not isinstance(number, (int, float)) or not 0 <= number < math.inf:
                raise ConfigurationError(f"data.{name} must not be negative, got {number!r}")
        check_start_token("data.bos", bos)
        self.source = PythonDocumentation() if source is None else source
        check_sources("data.source", self.source)
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.num_sequences, self.num_validation_sequences = num_sequences, num_validation_sequences
        self.chat_template, self.bos, self.seed = chat_template, bos, seed
        self.cache_folder = None if cache_folder is None else local_path(cache_folder, "data.cache_folder")
        self.run_folder: Path | None = None
        """Where tokens are kept that no other run shares; None for nowhere."""
        self.retries, self.retry_pause = retries, retry_pause
        self.num_spare_sequences = 0
        """Sequences beyond these, for experts that few tokens reach; as many of them as the text has."""
        self.train_ids_NT: Tensor
        self.validation_ids_NT: Tensor
        self.spare_ids_NT: Tensor = torch.empty(0, sequence_length, dtype=torch.int64)
        self._stream: TokenStream | None = None
        self._state: dict[str, Any] | None = None

    @property
    def wanted(self) -> int:
        """Sequences in all."""
        return self.num_sequences + self.num_validation_sequences

    @names_option("data.source")
    def check(self, max_length: int | None) -> None:
        """Verifies what can be verified before the model is loaded; a source whose tokens are there is not asked.

        Args:
            max_length: The longest sequence the model takes, in tokens; None if it has no limit.
        """
        if max_length is not None and self.sequence_length > max_length:
            raise ConfigurationError(
                f"data.sequence_length: {self.sequence_length} tokens exceed the model's limit of {max_length}; "
                "choose at most that"
            )
        if self.cache_folder is not None:
            _check_folder(self.cache_folder)
        name, folder = self._source_name(), self._folder
        if folder is None or name is None or not self._has_tokens(folder, name):
            self.source.check()

    @names_option("data.source")
    def tokenize(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Reads, tokenises, cuts and splits; fills ``train_ids_NT``, ``validation_ids_NT``, ``spare_ids_NT`` (int64).

        Raises:
            ConfigurationError: the source holds too little text or failed for good, or its text and the model do not
                go together.
        """
        start = start_token(tokenizer, self.bos, "data.bos")
        self._stream = stream = self._open_stream(tokenizer, model)

        def read(goal: int) -> Tensor:
            if self.source.needs_model and not stream.has(goal):
                self.source.attach(model, tokenizer)
            stream.read(goal, self.retries, self.retry_pause)
            ids = stream.ids(goal)
            check_ids(ids, tokenizer, model, "data.source: the text")  # kept in a file, it may be another model's
            return ids

        goal = READ_AHEAD * self.wanted * self.sequence_length
        ids = read(goal)
        windows_NT = cut_windows(ids, self.sequence_length, start)
        if len(windows_NT) < self.wanted:
            raise ConfigurationError(
                f"data.source: {self.num_sequences} training and {self.num_validation_sequences} validation sequences "
                f"of {self.sequence_length} tokens take {num_tokens(self.wanted, self.sequence_length, start):,} "
                f"tokens, the source has {len(ids):,} ({len(windows_NT)} sequences); lower data.num_sequences or "
                "data.sequence_length, or add text"
            )
        order = torch.randperm(len(windows_NT), generator=generator_of("calibration", self.seed))
        chosen_NT = windows_NT[order[: self.wanted]]
        self.train_ids_NT = chosen_NT[: self.num_sequences]
        self.validation_ids_NT = chosen_NT[self.num_sequences :]
        spare_NT, lack = windows_NT[order[self.wanted :]], self.wanted + self.num_spare_sequences - len(windows_NT)
        if lack > 0:  # what was read for a choice does not suffice: the text goes on behind it
            ids = read(len(ids) + lack * self.sequence_length)
            spare_NT = torch.cat([spare_NT, cut_windows(ids, self.sequence_length, start)[len(windows_NT) :]])
        self.spare_ids_NT = spare_NT[: self.num_spare_sequences]

    def state_dict(self) -> dict[str, Any]:
        """The tokens read so far and the source's position; empty before :meth:`tokenize`."""
        if self._stream is not None:
            return self._stream.state_dict()
        return self._state or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets :meth:`tokenize` go on where the state ends instead of at the beginning of the source."""
        self._state, self._stream = state_dict or None, None

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of token ids ``B T``."""
        self._check_tokenized()
        return DataLoader(TensorDataset(self.train_ids_NT), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of held-out token ids ``B T``."""
        self._check_tokenized()
        return DataLoader(TensorDataset(self.validation_ids_NT), batch_size=self.batch_size)

    def _open_stream(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> TokenStream:
        """The stream as far as a state or a file has it."""

        def prepare(document: Document, place: str) -> str:
            return self._text(document, tokenizer, place)

        def ids_of(text: str, place: str) -> list[int]:
            ids = encode(tokenizer, text, f"data.source: {place}")
            check_ids(ids, tokenizer, model, f"data.source: {place}")
            return ids

        name = self._source_name()
        key = None if name is None else f"{name}-{tokenizer_identity(tokenizer)}"
        folder = self._folder
        file = None if folder is None or key is None else folder / f"{key}.safetensors"
        # More than the model has: what a file holds beyond is named as such.
        vocabulary = max(len(tokenizer), embedding_rows(model))
        stream = TokenStream(self.source, prepare, ids_of, key, vocabulary, file)
        if self._state is None:
            stream.load()
            return stream
        try:
            stream.load_state_dict(self._state)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"data: the state to go on from cannot be used: {error}") from error
        return stream

    @property
    def _folder(self) -> Path | None:
        """Where the tokens of this source are kept."""
        return self.run_folder if self.source.needs_model else self.cache_folder or self.run_folder

    def _has_tokens(self, folder: Path, name: str) -> bool:
        """Whether there is a file of this source's tokens, of whichever tokenizer."""
        try:
            return any(folder.glob(f"{name}-*.safetensors"))
        except OSError as error:
            option = "trainer.default_root_dir" if self.cache_folder is None else "data.cache_folder"
            raise ConfigurationError(f"{option}: {folder} cannot be read: {error.strerror}") from error

    def _check_tokenized(self) -> None:
        if not hasattr(self, "train_ids_NT"):
            raise ConfigurationError("CalibrationDataModule: there are no sequences yet; call tokenize first")

    def _source_name(self) -> str | None:
        """Stands for the text and how it is prepared; None if the source cannot say what its text depends on."""
        identity = self.source.identity()
        if identity is None and self.source.needs_model:
            identity = {"text of the run": True}  # its recipe says the rest
        return None if identity is None else f"tokens-{fingerprint([identity, self.chat_template])}"

    def _text(self, document: Document, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
        if isinstance(document, str) and not self.chat_template:
            return document + "\n\n"
        return render(tokenizer, document, "data.chat_template", place)


def _check_folder(folder: Path) -> None:
    """Refuses a folder that can neither be made nor written, before any work; makes nothing."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "cannot be written" if nearest.is_dir() else "is no folder"
        raise ConfigurationError(f"data.cache_folder: {nearest} {reason}; choose another")
