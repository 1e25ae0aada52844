"""From text to token ids, and to windows of them: what can go wrong there is named with its place in the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jinja2 import TemplateError
from lightning_gsq.data.documents import Document
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError

StartToken = bool | Literal["auto"]
"""Whether every window starts with the BOS token; "auto" where the tokenizer starts a text with it."""
PIECE = 2_000_000
"""Characters that are tokenised at once: a longer text is cut, and only as much of it tokenised as is needed."""
SEARCH = 10_000
"""Characters before such a cut that are searched for a line's or a word's end."""
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What the expressions of a template can raise: they are the model's code, run in Jinja's sandbox."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str, place: str) -> list[int]:
    """Token ids of a text, without special tokens.

    Raises:
        ConfigurationError: the tokenizer fails on it.
    """
    with tokenizer_errors(place):
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


@contextmanager
def tokenizer_errors(place: str, way_out: str = "") -> Iterator[None]:
    """Names what a tokenizer raises inside.

    Raises:
        ConfigurationError: with the tokenizer's own words.
    """
    try:
        yield
    except Exception as error:  # the tokenizers library raises plain Exception, and a model's own code anything
        raise ConfigurationError(
            f"{place}: the tokenizer fails with {type(error).__name__}: {error}{way_out}"
        ) from error


def render(tokenizer: PreTrainedTokenizerBase, document: Document, option: str, place: str) -> str:
    """A document in the tokenizer's chat template; plain text is what a user says.

    Raises:
        ConfigurationError: there is no template, or it refuses the document.
    """
    if tokenizer.chat_template is None:
        raise ConfigurationError(f"{option}: the tokenizer has no chat template; use plain text ({place})")
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    with template_errors(option, place, "leave such conversations out, or change the template"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


@contextmanager
def template_errors(option: str, place: str, way_out: str) -> Iterator[None]:
    """Names what a chat template raises inside.

    Raises:
        ConfigurationError: with the template's own words.
    """
    try:
        yield
    except TEMPLATE_ERRORS as error:
        kind = "" if isinstance(error, (TemplateError, ValueError)) else f"{type(error).__name__}: "
        raise ConfigurationError(
            f"{option}: {place}: the chat template refuses it: {kind}{error}; {way_out}"
        ) from error


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model has an embedding for."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return int(weight.shape[0])


def check_ids(
    ids: Sequence[int] | Tensor, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, place: str
) -> None:
    """Verifies that the model has an embedding for each token.

    A tokenizer may be larger than the embedding, as long as the tokens beyond it never occur, or smaller.

    Raises:
        ConfigurationError: it has none for one of them.
    """
    if len(ids) == 0:
        return
    largest, rows = int(max(ids) if not isinstance(ids, Tensor) else ids.max()), embedding_rows(model)
    if largest >= rows:
        raise ConfigurationError(
            f"{place} has the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the model's "
            f"embedding has {rows} rows: tokenizer and model do not belong together, or the embedding has to be resized"
        )


def check_start_token(option: str, value: object) -> None:
    """Refuses what is no :data:`StartToken`.

    Raises:
        ConfigurationError: it is something else.
    """
    if not (isinstance(value, bool) or value == "auto"):
        raise ConfigurationError(f"{option} must be auto, true or false, got {value!r}")


def start_token(tokenizer: PreTrainedTokenizerBase, wanted: StartToken, option: str) -> int | None:
    """The token that every window starts with; None for no such token.

    Raises:
        ConfigurationError: it is wanted, and the tokenizer has none.
    """
    bos: int | None = tokenizer.bos_token_id
    if wanted is True and bos is None:
        raise ConfigurationError(f"{option}: the tokenizer has no BOS token; set it to auto or false")
    if wanted == "auto":
        # Asked of the tokenizer itself: its settings say it in a dozen ways, some of them without effect.
        with tokenizer_errors(option, "; set it to true or false"):
            first: list[int] = tokenizer("a", verbose=False).input_ids[:1]
        return bos if first == [bos] else None
    return bos if wanted else None


def num_tokens(windows: int, length: int, start: int | None) -> int:
    """How many tokens of text :func:`cut_windows` needs for so many windows."""
    return windows * length if start is None else windows * (length - 1) + 1


def cut_windows(ids: Tensor, length: int, start: int | None) -> Tensor:
    """Windows ``N T`` of a text, from its beginning, without overlap; what is left at the end is dropped.

    Args:
        ids: The text's tokens.
        length: Tokens of a window, T.
        start: Token that each window starts with, before T - 1 tokens of text; None for T tokens of text. A piece of
            text that starts with it already, as those of a chat template do, gets no second one, but the token that
            follows it.
    """
    if start is None:
        count = len(ids) // length
        return ids[: count * length].view(count, length)
    if len(ids) < length:
        return ids.new_empty((0, length))
    pieces_NT = ids.unfold(0, length, length - 1)
    started_NT = torch.cat([ids.new_full((len(pieces_NT), 1), start), pieces_NT[:, :-1]], 1)
    return torch.where(pieces_NT[:, :1] == start, pieces_NT, started_NT)


def next_cut(text: str, begin: int, size: int | None = None) -> int:
    """Where the piece of a long text that begins at ``begin`` ends: after a line, before a blank, or after ``size``.

    Args:
        text: The text.
        begin: First character of the piece.
        size: Characters of a piece at the most; None for :data:`PIECE`.
    """
    end = begin + (size or PIECE)
    if end >= len(text):
        return len(text)
    earliest = max(begin, end - SEARCH)
    line = text.rfind("\n", earliest, end)
    blank = text.rfind(" ", earliest, end)
    return line + 1 if line >= 0 else blank if blank > begin else end
