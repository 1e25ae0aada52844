"""The parser: an error is a line, not two pages of usage."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo
from lightning.pytorch.cli import LightningArgumentParser

from lightning_gsq.cli.defaults import EXIT_USAGE

PROGRAM = "python -m lightning_gsq"


class GSQArgumentParser(LightningArgumentParser):
    """Prints an error alone, without two pages of usage, and names the nearest option to one that does not exist."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2."""
        options = {
            name.removeprefix("--") for parser in [self, *self._parsers()] for name in parser._option_string_actions
        }
        unknown = (
            re.findall(r"option '([^']+)'|--([\w.]+)", message)
            if "not accept" in message or "nrecognized" in message
            else []
        )
        for name in ("".join(parts) for parts in unknown):
            nearest = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            if nearest:
                message += f"\ndid you mean {nearest[0]!r}?"
        self.exit(EXIT_USAGE, f"error: {message}\n(every option: {self.prog} --help)\n")

    def accept_name(self, option: str, settings: Mapping[str, Any], name: str) -> None:
        """Lets a group of settings be given as one name as well, on the command line and in configurations.

        Args:
            option: The group.
            settings: All of its settings with their defaults, which a name sets back.
            name: The setting that takes the name.
        """
        group: Any = self._option_string_actions[f"--{option}"]
        otherwise = group.resolve_subclass_spec

        def resolve(value: Any) -> Any:
            if isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value) and not Path(value).is_file():
                return {**settings, name: value}
            return otherwise(value)

        group.resolve_subclass_spec = resolve

    def _parsers(self) -> list[LightningArgumentParser]:
        subcommands = getattr(self, "_subcommands_action", None)
        return list(subcommands._name_parser_map.values()) if subcommands is not None else []

    def add_signature(
        self, function: Callable[..., Any], skip: set[str], repeated: tuple[str, ...] = (), flags: tuple[str, ...] = ()
    ) -> None:
        """Adds a function's arguments, explained by its docstring.

        Args:
            function: The function.
            skip: Arguments that are no options.
            repeated: Options that can be given several times, with several values each.
            flags: Options that can be given without a value.
        """
        self.add_function_arguments(function, skip={*skip, *repeated, *flags})
        explained = {p.arg_name: p.description for p in parse_docstring(function.__doc__ or "").params}
        for name in repeated:
            required = inspect.signature(function).parameters[name].default is inspect.Parameter.empty
            settings: dict[str, Any] = {"type": str, "nargs": "+", "action": "extend", "required": required}
            self.add_argument(f"--{name}", **settings, help=explained[name])
        for name in flags:
            self.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=False, help=explained[name])
