"""What a document is, and what may stand for one in a file or in a source of one's own."""

from __future__ import annotations

import re
from typing import Any

from lightning_gsq.errors import ConfigurationError

Document = str | list[dict[str, str]]
"""Plain text, or chat messages."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def accept(value: Any, option: str, place: str) -> Document | None:
    """What a row or a source holds, as a document; None where it holds none (a null).

    Half surrogate pairs, which JSON can spell and no encoding has, become U+FFFD.

    Args:
        value: What is there.
        option: Name of the option that leads there, for messages.
        place: Where that is, for messages.

    Raises:
        ConfigurationError: it is neither text nor chat messages with role and content.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return _messages(value, option, place)
    raise ConfigurationError(f"{option}: {place} holds {type(value).__name__}, not text or chat messages")


def without_surrogates(text: str) -> str:
    """Text in which pairs of surrogates are the characters they mean, and halves U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _messages(messages: list[Any], option: str, place: str) -> list[dict[str, str]]:
    if not messages:
        raise ConfigurationError(f"{option}: {place} holds an empty list of messages; leave it out")
    return [_message(message, option, f"message {n} of {place}") for n, message in enumerate(messages, start=1)]


def _message(message: Any, option: str, place: str) -> dict[str, Any]:
    """A message whose role and content are text; a call of tools may have no content."""
    if not isinstance(message, dict):
        raise ConfigurationError(
            f"{option}: {place} is {type(message).__name__}; expected text, or a list of messages with role and content"
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""  # templates would write the word None
    elif not {"role", "content"} <= message.keys():
        raise ConfigurationError(
            f"{option}: {place}: expected role and content, it has {' and '.join(map(str, message)) or 'no key'}; "
            "rename the keys"
        )
    role = message.get("role")
    for key, value in (("role", role), ("content", content)):
        if not isinstance(value, str):
            kind = "null" if value is None else f"of type {type(value).__name__}"
            raise ConfigurationError(f"{option}: {place}: its {key} is {kind}, not text; leave the conversation out")
    return {**message, "role": without_surrogates(str(role)), "content": without_surrogates(str(content))}
