"""``progress.json`` and ``summary.json``: what is done and what was found, of any shape that a file may have taken.

Everything in them can be measured or written anew, so what cannot be read is left out and comes back by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ABOUT = ("text", "windows", "tokens", "starts_with_bos", "precision", "digest")
"""What a summary says of its perplexities."""
KINDS = ("warm_start", "block", "end_to_end")
"""Whose result a file holds."""


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file is damaged, an empty one where there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def whole_progress(content: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of a progress file that have their shape."""
    return _whole(content, _PROGRESS)


def whole_summary(content: Mapping[str, Any] | None) -> dict[str, Any]:
    """A summary whose parts have their shape; empty if one has not."""
    whole = _whole(content, _SUMMARY)
    return dict(content) if content is not None and set(whole) == set(_SUMMARY) & set(content) else {}


def _whole(content: Mapping[str, Any] | None, shapes: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    return {key: value for key, value in (content or {}).items() if key in shapes and shapes[key](value)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


_PROGRESS: dict[str, Callable[[Any], bool]] = {
    "perplexity": lambda value: isinstance(value, dict) and all(map(_numbers, value.values())),
    "perplexity_error": lambda value: isinstance(value, dict) and all(map(_numbers, value.values())),
    "seconds": _numbers,
    "init_seconds": _numbers,
    "model": lambda value: value in KINDS,
    "peak_memory_bytes": _number,
    "imatrix": lambda value: isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values()),
}
_SUMMARY: dict[str, Callable[[Any], bool]] = {
    "perplexity": _numbers,
    "perplexity_error": _numbers,
    "evaluation": lambda value: isinstance(value, dict) and set(ABOUT) <= set(value),
    "exports": lambda value: isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values()),
    "zero_shot": lambda value: isinstance(value, dict) and isinstance(value.get("tasks"), dict),
}
