"""The parser: an error is a line, help begins with what is used, an exchanged class takes its arguments with it."""

from __future__ import annotations

import inspect
import re
from argparse import HelpFormatter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, Namespace, set_loader
from jsonargparse import _typehints as typehints
from jsonargparse._loaders_dumpers import yaml_load
from lightning.pytorch.cli import LightningArgumentParser

from lightning_gsq.cli.configs import load_limited
from lightning_gsq.cli.help import common_help
from lightning_gsq.cli.messages import configuration_error, one_line
from lightning_gsq.cli.verbs import EXIT_USAGE

DEFAULTS_NOTE = re.compile(r"default config file locations:.*?(?=\n\n|\Z)", re.DOTALL)
SUBCLASSES = re.compile(r",\s+known\s+subclasses:[^)]*")
PROGRAM = "python -m lightning_gsq"


class GSQArgumentParser(LightningArgumentParser):
    """A parser that prints an error in one line."""

    common: tuple[str, ...] = ()
    """Options of the short help; none for a help of all."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2."""
        if not self.exit_on_error:  # of a class in an option: the parser of the verb says which option
            super().error(message, ex)
        nested = configuration_error(ex)
        parser = self._of_verb(message)
        if nested is None:
            options = {name.removeprefix("--") for name in parser._option_string_actions}
            message = f"{one_line(message, options)} ({parser.prog} --help)"
        self.exit(EXIT_USAGE, f"error: {nested or message}\n")

    def _of_verb(self, message: str) -> LightningArgumentParser:
        """The parser of the verb that was typed; this one where there is none."""
        subcommands = getattr(self, "_subcommands_action", None)
        verbs = {} if subcommands is None else subcommands._name_parser_map
        verb = next((argument for argument in getattr(self, "args", []) if argument in verbs), None)
        return self if verb is None else verbs[verb]

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """The options that are used first, or all of them."""
        if self.common:
            return common_help(self, self.common)
        # Lightning's own group is the longest, and comes last.
        trainer = (self.groups or {}).get("trainer")
        self._action_groups = sorted(self._action_groups, key=lambda group: group is trainer)
        # A backspace stands for "no space here", which only terminals understand.
        text = super().format_help(formatter).replace(" \b", "")
        # A path of this machine says nothing to anybody; which subclasses are known depends on what was imported.
        text = DEFAULTS_NOTE.sub("Defaults are those of the recipe in cli.yaml.", text)
        return SUBCLASSES.sub("", text)

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

    def accept_name(self, option: str, settings: Mapping[str, Any], name: str, is_known: Callable[[str], bool]) -> None:
        """Lets a group of settings be given as one name as well, on the command line and in configurations.

        Args:
            option: The group.
            settings: All of its settings with their defaults, which a name sets back.
            name: The setting that takes the name.
            is_known: Whether a name is one of the setting's; another may be that of a file.
        """
        group: Any = self._option_string_actions[f"--{option}"]
        otherwise = group.resolve_subclass_spec

        def resolve(value: Any) -> Any:
            a_name = isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value)
            if a_name and (is_known(value.lower()) or not Path(value).is_file()):
                return {**settings, name: value}
            return otherwise(value)

        group.resolve_subclass_spec = resolve


def _drop_arguments(_: Any, previous: Any, value: Any) -> None:
    """Another class starts from its own defaults; jsonargparse keeps what it happens to take too."""
    if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
        previous["init_args"] = Namespace()


def _load(text: str) -> Any:
    if "&" in text:
        load_limited(text)
    return yaml_load(text)


typehints.discard_init_args_on_class_path_change = _drop_arguments
set_loader("yaml", _load, (yaml.YAMLError,))
