"""The command line as people type it, rewritten as the parser takes it.

* The model, or the run, is the first thing after the verb: ``fit MODEL``, ``export RUN``.
* Lists: ``--export gguf,gptq`` and ``--model.exclude "*down_proj"`` for ``[gguf, gptq]`` and ``["*down_proj"]``.
* Classes by their short name in any case, text by its path or its name on the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from lightning_gsq.cli.classes import class_path, refuse_moved
from lightning_gsq.cli.configs import config_value
from lightning_gsq.cli.verbs import SUMMARIES
from lightning_gsq.errors import ConfigurationError

NAMED = {"export": "--run", "predict": "--model", "test": "--model"}
"""What the first argument without a name is; ``--model.pretrained`` for the other verbs."""

WORD = "-"
"""The name of an argument without one: no option is called so."""
SEVERAL = {"--format", "--tasks"}
LISTS = {"export", "model.include", "model.exclude", "model.phases", "end_to_end.train"}
SOURCES = {"data": "data.source", "evaluation": "evaluation.source"}
TEXT_SUFFIXES = {".txt", ".md", ".text", ".raw", ".jsonl", ".json", ".csv", ".tsv"}
SHARD_SUFFIXES = {".parquet", ".gz", ".arrow"}
SETTINGS_SUFFIXES = {".yaml", ".yml"}


def rewritten(arguments: list[str]) -> list[str]:
    """The arguments for the parser.

    Raises:
        ConfigurationError: a configuration file cannot be used, or a class has moved.
    """
    if not arguments or arguments[0] not in SUMMARIES:
        return arguments
    verb, *rest = arguments
    if verb in NAMED:
        named = [NAMED[verb]] if rest and not rest[0].startswith("-") else []
        return [verb, *named, *_apart(rest)]
    typed = list(_options(rest))
    _refuse_two_models(verb, typed)
    options = [_option(*option) for option in typed]
    # The parser lets the later one win; what was typed wins over files, wherever it stands.
    options.sort(key=lambda option: option[0] != "--config")
    return [verb, *(part for option in options for part in option)]


def _refuse_two_models(verb: str, typed: list[tuple[str, str | None]]) -> None:
    """Refuses what a later model would hide: a stray word, or the second value of a list."""
    words = [value for name, value in typed if name == WORD]
    named = [value for name, value in typed if name in ("model", "model.pretrained") and value not in (None, *words)]
    models = [value for value in [*words, *(named if words else [])] if value and not _is_settings(value)]
    if len(models) > 1:
        raise ConfigurationError(
            f"{verb} takes one model, got {models[0]} and {models[1]}; values of a list are joined by commas: "
            "--export gguf,native"
        )


def _apart(arguments: list[str]) -> Iterator[str]:
    """The values of options that take several apart: ``--format gguf,gptq`` are two."""
    several = False
    for argument in arguments:
        option, sign, value = argument.partition("=")
        if sign and option in SEVERAL:
            yield option
            argument, several = value, True
        elif argument.startswith("-"):
            several = argument in SEVERAL
        yield from filter(None, argument.strip("[]").replace(" ", "").split(",")) if several else [argument]


def _options(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Names without dashes and values, of verbs whose options take one value each; words without a name."""
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            yield WORD, argument
        elif argument in ("-h", "--help") or argument.startswith("--print_config"):
            yield argument, None
        elif "=" in argument:
            name, value = argument.split("=", 1)
            yield name.lstrip("-"), value
        else:
            yield argument.lstrip("-"), next(rest, None)


def _option(name: str, value: str | None) -> list[str]:
    if name.startswith("-") and name != WORD:  # takes no value
        return [name]
    if value is None:
        return [f"--{name}"]
    refuse_moved(value)
    if name in ("c", "config"):
        return ["--config", config_value(value)]
    if name == WORD or (name == "model" and not _is_settings(value)):
        name = "model.pretrained"
    if name in SOURCES and not _is_settings(value):
        name = SOURCES[name]
    if name in SOURCES.values():
        return _source(name, class_path(name, value))
    if name in LISTS and not value.startswith("["):
        value = json.dumps([part.strip() for part in value.split(",") if part.strip()])
    if name == "trainer.callbacks" and not value.startswith("[") and value != "null":
        name += "+"  # a list replaces those of the recipe, a single one comes to them
    return [f"--{name}={class_path(name.removesuffix('+'), value)}"]


def _is_settings(value: str) -> bool:
    """Whether a value holds several settings, or is a file of them."""
    return value.startswith("{") or Path(value).suffix in SETTINGS_SUFFIXES


def _source(option: str, value: str) -> list[str]:
    """A text source by its class, by a path or by its name on the hub."""
    suffix = Path(value).suffix.lower()
    kind = None
    if value.startswith(("{", "[")) or value == "null":
        kind = None
    elif suffix in SHARD_SUFFIXES or "*" in value:
        kind = "LocalShards"
    elif suffix in TEXT_SUFFIXES or value.startswith((".", "/", "~")) or Path(value).exists():
        kind = "TextFile"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        kind = "HuggingFaceDataset"
    if kind is None:
        return [f"--{option}={value}"]
    return [f"--{option}=lightning_gsq.data.{kind}", f"--{option}.path={value}"]
