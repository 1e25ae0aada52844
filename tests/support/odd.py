"""Tokenizers and sources with one peculiarity each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_gsq.data import TextSource
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.support.tiny import byte_tokenizer

BOS, END = 256, 257
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}"
)
"""A chat template with rules, as several models have it."""


def starting_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer, which here starts every text with its start token."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def larger_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with two tokens, 258 and 259, that the models of 258 rows do not have."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>", "</tool>"])
    return tokenizer


class Listed(TextSource):
    """Documents from a list, whatever they are."""

    def __init__(self, documents: Any) -> None:
        self.items = documents

    def documents(self) -> Any:
        return self.items if not isinstance(self.items, list) else iter(self.items)


class FromTheModel(TextSource):
    """A source of one's own that needs the model: it says how many rows the embedding has."""

    needs_model = True

    def __init__(self) -> None:
        self.attached = 0

    def check(self) -> None:
        pass

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.attached = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, operator, assignment]

    def documents(self) -> Iterator[str]:
        assert self.attached
        yield from (f"{self.attached} rows, line {i}" for i in range(200))
