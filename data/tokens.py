"""The tokens of a text source, read as far as anyone asked, kept in a file, and continued from there.

What is kept is the stream itself, not the windows cut from it: all tokens in order, where each document ends, and the
source's position after the last one. So a file serves every number and length of sequences, is extended when more is
asked for, and a reader that was interrupted goes on where the file ends. Asking for fewer tokens than the file has
gives what a new reader would have given, because the stream is cut at the same document.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_gsq.data.sources import Document, DocumentReader, Position, TextSource
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.files import write_atomically

SAVE_EVERY_SECONDS = 60.0
"""How much reading a kill can cost."""
LONGEST_PAUSE = 60.0
NETWORK_CLIENTS = {"aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib"}
"""Packages whose errors say that a connection failed; a digit may end their names."""

_log = logging.getLogger(__name__)


class RetryingReader(DocumentReader):
    """Reads a source; after a passing failure it waits, and goes on at the position where it stopped.

    Args:
        source: What to read.
        position: Where to begin; None for the beginning.
        retries: Attempts after the first one at the same document.
        pause: Seconds before the first of them; doubled for each further one, up to a minute.

    Raises:
        ConfigurationError: from ``next``, when every attempt failed, or the failure is none that passes.
    """

    def __init__(
        self, source: TextSource, position: Position | None = None, retries: int = 5, pause: float = 1.0
    ) -> None:
        self._source, self._retries, self._pause = source, retries, pause
        self._position = position
        self._reader: DocumentReader | None = None

    def __next__(self) -> Document:
        failures = 0
        while True:
            try:
                if self._reader is None:
                    self._reader = self._source.reader(self._position)
                return next(self._reader)
            except (FileNotFoundError, PermissionError) as error:
                raise ConfigurationError(f"data.source: cannot read on: {error}") from error
            except Exception as error:
                if isinstance(error, StopIteration) or not passes(error):
                    raise
                if failures == self._retries:
                    raise ConfigurationError(
                        f"data.source: failed {failures + 1} times in a row at the same place, the last time with "
                        f"{type(error).__name__}: {error}"
                    ) from error
                if self._reader is not None:
                    self._position, self._reader = self._reader.position, None
                wait = min(self._pause * 2**failures, LONGEST_PAUSE)
                failures += 1
                _log.warning(
                    "reading the text failed (%s: %s); attempt %d of %d in %.0f s",
                    type(error).__name__,
                    error,
                    failures,
                    self._retries,
                    wait,
                )
                time.sleep(wait)

    @property
    def position(self) -> Position | None:  # type: ignore[override]
        """See :class:`DocumentReader`; None before anything was read."""
        return self._position if self._reader is None else self._reader.position


def passes(error: Exception) -> bool:
    """Whether a later attempt may not meet this error: those of networks and file systems.

    The clients that datasets are read through (whichever are installed) have errors of their own beside ``OSError``.
    """
    roots = {kind.__module__.partition(".")[0].rstrip("0123456789") for kind in type(error).__mro__}
    return isinstance(error, (OSError, EOFError)) or bool(roots & NETWORK_CLIENTS)


class TokenStream:
    """The tokens of a source under one tokenizer.

    Args:
        source: Where the text comes from.
        encode: Tokenises a document.
        key: Names source, tokenizer and settings; None if the source cannot say what its text depends on.
        vocabulary: Number of tokens there are, to check a file against.
        file: Where the stream is kept; None keeps it in memory only.
    """

    def __init__(
        self,
        source: TextSource,
        encode: Callable[[Document], list[int]],
        key: str | None,
        vocabulary: int,
        file: Path | None = None,
    ) -> None:
        self.source, self.encode, self.key, self.vocabulary = source, encode, key, vocabulary
        self.file = file if key is not None else None
        self.tokens, self.ends = array("i"), array("q")
        self.exhausted = False
        self._whole: tuple[int, int, Position | None] = (0, 0, None)
        """Tokens, documents and position after the last whole document: one value, which an interrupt cannot split."""

    def read(self, goal: int, retries: int, pause: float) -> None:
        """Reads documents until there are ``goal`` tokens or the source ends; keeps what it has whatever happens.

        Raises:
            ConfigurationError: the source failed for good.
        """
        tokens, documents, position = self._whole
        del self.tokens[tokens:], self.ends[documents:]
        if self.has(goal):
            return
        reader, saved = RetryingReader(self.source, position, retries, pause), time.monotonic()
        try:
            while len(self.tokens) < goal:
                document = next(reader, None)
                if document is None:
                    self.exhausted = True
                    break
                self.tokens.extend(self.encode(document))
                self.ends.append(len(self.tokens))
                self._whole = len(self.tokens), len(self.ends), reader.position
                if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                    self._save()
                    saved = time.monotonic()
        except ConfigurationError as error:
            if self.file is None or len(self.ends) == 0:
                raise
            raise ConfigurationError(
                f"{error}. The {len(self.tokens):,} tokens of the {len(self.ends):,} documents before are kept in "
                f"{self.file}; the same command goes on from there"
            ) from error
        finally:
            if self._whole[1] > documents or self.exhausted:
                self._save()

    def has(self, goal: int) -> bool:
        """Whether there are ``goal`` tokens already, or the source has no more."""
        return self.exhausted or self._whole[0] >= goal

    def ids(self, goal: int) -> Tensor:
        """The tokens (int64) of the documents up to the one that reaches ``goal``, or all there are."""
        ends = _tensor(self.ends, len(self.ends))
        last = min(int(torch.searchsorted(ends, goal)), len(ends) - 1)
        return _tensor(self.tokens, int(ends[last]) if len(ends) else 0).long()

    def state_dict(self) -> dict[str, Any]:
        """Tokens so far (int32), ends of documents (int64), and where to go on, as plain data."""
        tokens, documents, position = self._whole
        return {
            "tokens": _tensor(self.tokens, tokens),
            "ends": _tensor(self.ends, documents),
            "position": position,
            "exhausted": self.exhausted,
            "key": self.key,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: it belongs to another text or tokenizer, or contradicts itself.
        """
        if state["key"] != self.key:
            raise ValueError("it belongs to another text source or tokenizer")
        tokens, ends = state["tokens"], state["ends"]
        if tokens.dtype != torch.int32 or ends.dtype != torch.int64 or tokens.ndim != 1 or ends.ndim != 1:
            raise ValueError("expected int32 tokens and int64 ends in one dimension each")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise ValueError(f"a token lies outside the vocabulary of {self.vocabulary}")
        if (int(ends[-1]) if len(ends) else 0) != len(tokens) or bool((ends.diff() < 0).any()):
            raise ValueError("the documents' ends do not fit the tokens")
        self.tokens, self.ends = array("i", tokens.numpy().tobytes()), array("q", ends.numpy().tobytes())
        self.exhausted = bool(state["exhausted"])
        self._whole = len(tokens), len(ends), state["position"]

    def load(self) -> None:
        """Goes on from the file, if there is one.

        Raises:
            ConfigurationError: it is damaged.
        """
        if self.file is None or not self.file.exists():
            return
        try:
            with safe_open(self.file, framework="pt") as content:
                state = json.loads((content.metadata() or {})["state"])
                state |= {name: content.get_tensor(name) for name in ("tokens", "ends")}
            if state.pop("digest") != _digest(state["tokens"], state["ends"]):
                raise ValueError("its checksum does not fit")
            self.load_state_dict(state)
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigurationError(
                f"data: the tokens in {self.file} cannot be used: {error}. Delete the file to have the text tokenised "
                "again"
            ) from error

    def _save(self) -> None:
        if self.file is None:
            return
        state = self.state_dict()
        tensors = {name: state.pop(name) for name in ("tokens", "ends")}
        metadata = {"state": json.dumps({**state, "digest": _digest(*tensors.values())})}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, save(tensors, metadata))


def _tensor(values: array[int], count: int) -> Tensor:
    """A copy of the first ``count`` values."""
    return torch.from_numpy(np.array(memoryview(values)[:count], dtype=values.typecode))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for plain data."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of everything that a tokenizer does to text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint([type(tokenizer).__name__, content, tokenizer.chat_template])
