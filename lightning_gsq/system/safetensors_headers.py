"""The weight files of a model folder, looked at before anything is loaded from them.

A folder may come from anywhere. What stands in its files is checked first: names in an index have to be names of files
in that folder, and a safetensors file has to be complete. Only headers are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_gsq.errors import ConfigurationError

INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
"""Element types as the safetensors library orders them."""
LENGTH_BYTES = 8
"""What says how long the header is; headers are filled up to a multiple of as many."""
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

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in PyTorch's terms; ``uint8`` for one that PyTorch does not have."""
        return DTYPES.get(self.dtype, torch.uint8)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigurationError: the file is missing, too large, or holds something else.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        refuse_pointer(file)
        content = json.loads(file.read_text(encoding="utf-8"))
    except ConfigurationError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"model: {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"model: {file} holds a {type(content).__name__}, expected an object")
    return content


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes before the numbers in a safetensors file with these tensors: length, JSON, and what fills it up to eight.

    The library lays tensors out by the size of their elements, largest first, then by name; only the digits of the
    offsets depend on it.
    """
    names = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "U8"}
    ordered = sorted(tensors, key=lambda name: (-_ORDER.index(names[tensors[name].dtype]), name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in ordered:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    length = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return LENGTH_BYTES + length + -length % LENGTH_BYTES


def refuse_pointer(file: Path) -> None:
    """Refuses what Git leaves in place of a large file that was not fetched.

    Raises:
        ConfigurationError: the file is such a pointer.
    """
    with file.open("rb") as content:
        if content.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConfigurationError(
                f"model: {file} is a Git LFS pointer in place of the file itself; run `git lfs pull` in that folder"
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the index's order.

    Raises:
        ConfigurationError: there are none, or the index names something that is not a file of this folder.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            others = sorted(file.name for file in folder.glob("*.safetensors"))
            hint = f"; it holds {others[0]}, a name that is not looked for: rename it" if len(others) == 1 else ""
            raise ConfigurationError(f"model: {folder} has neither model.safetensors nor {INDEX}{hint}")
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
            refuse_pointer(file)
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 - not a mapping
                    if name in tensors:
                        raise ValueError(f"{name} is in {tensors[name].file.name} as well")
                    part = content.get_slice(name)
                    tensors[name] = TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))
        except ConfigurationError:
            raise
        except (SafetensorError, ValueError, OSError) as error:
            raise ConfigurationError(f"model: {file} is no complete safetensors file: {error}") from error
    return tensors
