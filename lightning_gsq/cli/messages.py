"""Errors of the parser in one line: which option, what it got, what it takes, and the nearest name."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Collection, Iterator

from lightning_gsq.cli.classes import class_names
from lightning_gsq.cli.names import nearest, no_option
from lightning_gsq.errors import ConfigurationError

TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'list'>": "a list such as [a, b]",
    "<class 'dict'>": "a mapping such as {a: 1}",
    "<class 'NoneType'>": "null",
}
UNKNOWN = re.compile(r"[Oo]ption '([^']+)'|--?([\w.+-]+)")


def configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """The project's own error behind another one, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, ConfigurationError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def one_line(message: str, options: Collection[str]) -> str:
    """What jsonargparse says in up to fifteen lines.

    Args:
        message: Its message.
        options: Names of the options that the verb takes, without dashes.
    """
    required = re.search(r"arguments are required: (?:\w+\.)?([\w.]+)", message)
    keys = list(re.finditer(r'Parser key "([^"]+)"', message))
    if required:  # where a key is named, by the class that the option takes
        return _required(f"{keys[0][1]}.{required[1]}" if keys else required[1])
    if not keys:
        unknown = "not accept" in message or "nrecognized" in message
        return _unknown(message, options) if unknown else " ".join(message.split())
    name, rest = keys[0][1], message[keys[-1].end() :].removeprefix(":")
    if keys[-1][1] != name:  # of an argument of the class that the option takes
        name, rest = f"{name}.{keys[-1][1]}", rest.split(". Got value: Namespace")[0]
    return f"{name}: {_wrong_value(name, rest)}"


def _required(name: str) -> str:
    if name in ("model", "model.pretrained", "run"):
        return f"name the {'run' if name == 'run' else 'model'}, right after the verb"
    return f"--{name} has to be given"


def _unknown(message: str, options: Collection[str]) -> str:
    words = message.split("arguments:")[-1].strip()
    names = ["".join(parts) for parts in UNKNOWN.findall(words)]
    if not names:
        return f"{words!r} is no option: these begin with --"
    name = names[0].split("=")[0]
    if "does not accept option" not in message:  # "unrecognized", of what was typed
        return no_option(name, options)
    near = nearest(name, options)
    return f"the configuration sets {name}, which is no option" + (f"; did you mean {near}?" if near else "")


def _wrong_value(key: str, message: str) -> str:
    """What was given for a key that exists, and what it takes."""
    inner = re.search(r"[Oo]ption '([^']+)' is not accepted|unrecognized arguments: --([\w.]+)", message)
    if inner is not None:
        return f"there is no argument {inner[1] or inner[2]!r}" + _arguments(message)
    problem = re.search(r"Problem with given class_path.*?:\n\s*(.*)", message)
    if problem is not None:
        return problem[1]
    given = re.search(r"(?:Given value: |Got value: |dot import path string: )(.*)", message)
    shown = _shown(given[1] if given else "")
    classes = class_names(key)
    if classes and ("dot import path" in message or "subclass" in message or "abstract" in message):
        names = ", ".join(classes)
        text = f"there is no class {shown} of this kind; choose from {names}, or give a path such as mymodule.MyClass"
        if key.endswith(".source"):
            text += "; a file or folder is given by its path, a data set of the hub as organisation/name"
        return text
    expected = list(dict.fromkeys(_expected(message)))
    if not expected:
        return " ".join(part for part in message.split() if part != "-")
    wanted = " or ".join(expected) if len(expected) < 3 else ", ".join(expected[:-1]) + f" or {expected[-1]}"
    return f"expected {wanted}, got {shown}"


def _arguments(message: str) -> str:
    """What the class that a message speaks of takes."""
    path = re.search(r"class_path[= ]'([\w.]+)'", message)
    if path is None:
        return ""
    names = [name for name in inspect.signature(pkgutil.resolve_name(path[1])).parameters if name != "params"]
    return f"; {path[1].rsplit('.', 1)[-1]} takes {', '.join(names)}" if names else ""


def _shown(value: str) -> str:
    """A value as it is shown: of a file that was taken for one, only its beginning."""
    line = value.splitlines()[0] if value else value
    return repr(line if len(line) < 80 else line[:80] + "...")


def _expected(message: str) -> Iterator[str]:
    for kind in re.findall(r"Expected an? (<class '[\w.]+'>|typing\.Literal\[[^\]]*\])", message):
        if kind.startswith("typing.Literal"):
            yield ", ".join(str(value) for value in ast.literal_eval(kind.removeprefix("typing.Literal")))
        elif kind in TYPES:
            yield TYPES[kind]
