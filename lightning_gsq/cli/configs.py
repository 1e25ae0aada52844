"""Configuration files: the recipe that is the default, a run's own recipe, and what a file of a user's may not hold."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lightning_gsq.cli.classes import refuse_moved
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.recipe import is_whole, settings_of, watches_only
from lightning_gsq.system.yaml_files import MAX_BYTES, parse_yaml, read_yaml

FOLDER = Path(str(files("lightning_gsq") / "configs"))
DEFAULTS = str(FOLDER / "default.yaml")
"""The recipe that holds without any option: cli.yaml without its model and run folder."""


def config_file(name: str) -> str:
    """The file of a packaged configuration, such as quickstart; any other name as it is."""
    packaged = FOLDER / f"{name}.yaml"
    return str(packaged) if name in packaged_configs() and not Path(name).is_file() else name


def packaged_configs() -> list[str]:
    """Names of the configurations in the package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def config_value(name: str) -> str:
    """What the parser gets for a configuration: its file, or the text of the settings that a run's recipe holds.

    Raises:
        ConfigurationError: as of :func:`check_config`.
    """
    file = config_file(name)
    content = check_config(file)
    if not is_whole(content):
        return file
    default = read_yaml(Path(DEFAULTS), "config")["trainer"]["callbacks"]
    watching = [callback for callback in default if watches_only(callback["class_path"])]
    return str(yaml.safe_dump(settings_of(content, watching), sort_keys=False))


def check_config(name: str) -> dict[str, Any]:
    """The content of a file, if it can be a configuration; before anything is built from it.

    Raises:
        ConfigurationError: there is none, it is no YAML mapping in UTF-8, stands for too much, names a class that has
            moved, or asks for code to be run.
    """
    content = _content(name)
    if not isinstance(content, dict):
        raise ConfigurationError(f"config: {name} holds no settings by name, such as 'model: {{scheme: {{bits: 2}}}}'")
    for value in _strings(content):
        refuse_moved(value)
    for group in (content, *(content.get(verb) for verb in ("fit", "validate", "plan"))):
        model = group.get("model") if isinstance(group, dict) else None
        if isinstance(model, dict) and model.get("trust_remote_code"):
            raise ConfigurationError(
                f"config: {name} asks for code of the model to be run (model.trust_remote_code), which no file can "
                "allow; if you trust it, set that to false there and give --model.trust_remote_code true"
            )
    return content


def _content(name: str) -> Any:
    path = Path(name).expanduser()
    try:
        if not path.is_file():
            names = ", ".join(packaged_configs())
            raise ConfigurationError(f"config: there is no file {name}; those of the package are {names}")
        octets = path.read_bytes()[: MAX_BYTES + 1]
        if len(octets) > MAX_BYTES:
            raise ConfigurationError(f"config: {name} is larger than the {MAX_BYTES:,} bytes that are read")
        return load_limited(octets.decode("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"config: {name[:200]} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"config: {name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"config: {name} is no YAML: {' '.join(str(error).split())}") from error


def load_limited(text: str) -> Any:
    """The content of a YAML document, if it stands for little enough to be built.

    Raises:
        ConfigurationError: it does not.
        yaml.YAMLError: it is no YAML.
    """
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"config: a document in it cannot be used: {error}") from error


def _strings(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [text for part in parts for text in _strings(part)]
