"""Byte-level BPE. llama.cpp splits text by a rule that it knows by name; one that is not known here is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.fields import array, flag, text
from lightning_gsq.gguf.file import Field

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES,
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES,
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES,
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES,
}
"""Regular expressions that split text in tokenizer.json, by llama.cpp's name of the rule."""


def byte_level_fields(content: Mapping[str, Any], split: str) -> dict[str, Field]:
    """Merges and the rule of splitting.

    Raises:
        ConfigurationError: there are no merges.
    """
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    if not merges:
        raise ConfigurationError("format: gguf: the tokenizer has no merges, without which llama.cpp loads no file")
    return {
        "ggml.model": text("gpt2"),
        "ggml.pre": text(split),
        "ggml.merges": array(merges, GGUFValueType.STRING),
        "ggml.add_space_prefix": flag(False),
    }


def split_name(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the rule by which a tokenizer.json splits text, None if it has none of those known."""
    if content.get("model", {}).get("type") != "BPE" or content.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    steps = content.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex"):
        rules = {pattern: name for name, pattern in SPLITS.items()}
        return rules.get(steps[0]["pattern"].get("Regex")) if steps[0].get("behavior") == "Isolated" else None
    return None
