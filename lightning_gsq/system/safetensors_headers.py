"""The weight files of a model folder, looked at before anything is loaded from them.

A folder may come from anywhere. What stands in its files is checked first: names in an index have to be names of files
in that folder, and a safetensors file has to be complete. Only headers are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lightning_gsq.errors import ConfigurationError

INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor.

    Args:
        file: The file.
        dtype: Its dtype in the safetensors notation, such as ``I32`` or ``BF16``.
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigurationError: the file is missing, too large, or holds something else.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"model: {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"model: {file} holds a {type(content).__name__}, expected an object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the index's order.

    Raises:
        ConfigurationError: there are none, or the index names something that is not a file of this folder.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise ConfigurationError(f"model: {folder} has neither model.safetensors nor {INDEX}")
        return [single]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ConfigurationError(f"model: {index} has no weight_map from tensors to files")
    files = []
    for name in dict.fromkeys(names.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigurationError(f"model: {index} names {name!r}, which is not a safetensors file of that folder")
        if not (folder / name).is_file():
            raise ConfigurationError(f"model: {folder} lacks {name}, which its index names")
        files.append(folder / name)
    return files


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Every tensor of some safetensors files.

    Raises:
        ConfigurationError: a file is truncated or corrupt, or two files hold the same tensor.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 - not a mapping
                    if name in tensors:
                        raise ValueError(f"{name} is in {tensors[name].file.name} as well")
                    part = content.get_slice(name)
                    tensors[name] = TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, ValueError, OSError) as error:
            raise ConfigurationError(f"model: {file} is no complete safetensors file: {error}") from error
    return tensors
