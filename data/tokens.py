"""The tokens of a text source, read as far as anyone asked, kept in a file, and continued from there.

What is kept is the stream itself, not the windows cut from it: all tokens in order, where each document ends, and the
source's position after the last one. So a file serves every number and length of sequences, with a start token or
without, is extended when more is asked for, and a reader that was interrupted goes on where the file ends. Asking for
fewer tokens than the file has gives what a new reader would have given, because the stream is cut at the same document.

A document longer than ``encoding.PIECE`` characters is tokenised in pieces, each of which counts as a document here,
and no further than is asked for: the position is then that of the document, and how many of its characters are done.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_gsq.data.documents import Document
from lightning_gsq.data.encoding import next_cut
from lightning_gsq.data.retrying import RetryingReader, SourceFailedError
from lightning_gsq.data.sources import END, Position, TextSource
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.files import write_atomically

SAVE_EVERY_SECONDS = 60.0
"""How much reading a kill can cost."""
FORMAT = 2
"""Of a token file. Those before it had no number; null ended their text, and their checksum left the position out."""


class _Whole(NamedTuple):
    """How far a stream is: one value, which an interrupt cannot split.

    Args:
        tokens: Tokens up to there.
        ends: Ends up to there.
        position: Where the source goes on.
        characters: How many characters of the document there are done already.
    """

    tokens: int = 0
    ends: int = 0
    position: Position | None = None
    characters: int = 0


class TokenStream:
    """The tokens of a source under one tokenizer.

    Args:
        source: Where the text comes from.
        prepare: Makes a document the text that is tokenised; the second argument says where it stands, for messages.
        encode: Tokenises a text; the second argument as above.
        key: Names source, tokenizer and settings; None if the source cannot say what its text depends on.
        vocabulary: Number of tokens there are, to check a file against.
        file: Where the stream is kept; None keeps it in memory only.
    """

    def __init__(
        self,
        source: TextSource,
        prepare: Callable[[Document, str], str],
        encode: Callable[[str, str], list[int]],
        key: str | None,
        vocabulary: int,
        file: Path | None = None,
    ) -> None:
        self.source, self.prepare, self.encode, self.key, self.vocabulary = source, prepare, encode, key, vocabulary
        self.file = file if key is not None else None
        self.tokens, self.ends = array("i"), array("q")
        self.exhausted = False
        self._whole = _Whole()

    def read(self, goal: int, retries: int, pause: float) -> None:
        """Reads documents until there are ``goal`` tokens or the source ends; keeps what it has whatever happens.

        Raises:
            ConfigurationError: the source failed for good, or a document cannot be tokenised.
        """
        before = self._whole
        del self.tokens[before.tokens :], self.ends[before.ends :]
        if self.has(goal):
            return
        reader, saved = RetryingReader(self.source, before.position, retries, pause), time.monotonic()
        try:
            while len(self.tokens) < goal:
                position, begin = self._whole.position, self._whole.characters
                document = next(reader, END)
                if document is END:
                    self.exhausted = True
                    break
                text = self.prepare(document, reader.place)
                while len(self.tokens) < goal and begin < len(text):
                    cut = next_cut(text, begin)
                    self._append(self.encode(text[begin:cut], reader.place), position, cut)
                    begin = cut
                    if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                        self._save()
                        saved = time.monotonic()
                if begin >= len(text):
                    self._whole = self._whole._replace(position=reader.position, characters=0)
        except SourceFailedError as error:
            if self.file is None or len(self.ends) == 0:
                raise
            raise SourceFailedError(
                f"{error}. The {len(self.tokens):,} tokens of the {len(self.ends):,} documents before are kept in "
                f"{self.file}; the same command goes on from there"
            ) from error
        finally:
            if self._whole.ends > before.ends or self.exhausted:
                self._save()

    def _append(self, ids: list[int], position: Position | None, characters: int) -> None:
        self.tokens.extend(ids)
        self.ends.append(len(self.tokens))
        self._whole = _Whole(len(self.tokens), len(self.ends), position, characters)

    def has(self, goal: int) -> bool:
        """Whether there are ``goal`` tokens already, or the source has no more."""
        return self.exhausted or self._whole.tokens >= goal

    def ids(self, goal: int) -> Tensor:
        """The tokens (int64) of the documents up to the one that reaches ``goal``, or all there are."""
        ends = _tensor(self.ends, len(self.ends))
        last = min(int(torch.searchsorted(ends, goal)), len(ends) - 1)
        return _tensor(self.tokens, int(ends[last]) if len(ends) else 0).long()

    def state_dict(self) -> dict[str, Any]:
        """Tokens so far (int32), ends of documents (int64), and where to go on, as plain data."""
        whole = self._whole
        return {
            "tokens": _tensor(self.tokens, whole.tokens),
            "ends": _tensor(self.ends, whole.ends),
            "position": whole.position,
            "characters": whole.characters,
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
        if (int(ends[-1]) if len(ends) else 0) != len(tokens) or bool((ends.diff(prepend=ends.new_zeros(1)) < 0).any()):
            raise ValueError("the documents' ends do not fit the tokens")
        self.tokens, self.ends = array("i", tokens.numpy().tobytes()), array("q", ends.numpy().tobytes())
        self.exhausted = bool(state["exhausted"])
        characters = int(state.get("characters", 0))  # states of earlier versions have none
        if not (state["position"] is None or isinstance(state["position"], dict)) or characters < 0:
            raise ValueError("it does not say where the source goes on")
        self._whole = _Whole(len(tokens), len(ends), state["position"], characters)

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
            if state.get("format") is None and state["exhausted"]:
                return  # its text may have ended at a null
            if state.pop("digest") != _digest(state):
                raise ValueError("its checksum does not fit")
            self.load_state_dict(state)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, OSError) as error:
            raise ConfigurationError(
                f"data: the tokens in {self.file} cannot be used: {error}. Delete the file to have the text tokenised "
                "again"
            ) from error

    def _save(self) -> None:
        if self.file is None:
            return
        state = {**self.state_dict(), "format": FORMAT}
        digest = _digest(state)
        tensors = {name: state.pop(name) for name in ("tokens", "ends")}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"data.cache_folder: cannot make the folder {self.file.parent}: {error.strerror}"
            ) from error
        write_atomically(self.file, save(tensors, {"state": json.dumps({**state, "digest": digest})}))


def _tensor(values: array[int], count: int) -> Tensor:
    """A copy of the first ``count`` values."""
    return torch.from_numpy(np.array(memoryview(values)[:count], dtype=values.typecode))


def _digest(state: dict[str, Any]) -> str:
    """A checksum of the tensors, and from format 2 on of everything else in a file."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("tokens", "ends"):
        digest.update(state[name].numpy().tobytes())
    if state.get("format") is not None:
        rest = {name: value for name, value in state.items() if name not in ("tokens", "ends")}
        digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for plain data."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of everything that a tokenizer does to text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint([type(tokenizer).__name__, content, tokenizer.chat_template])
