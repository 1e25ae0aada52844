"""llama.cpp's importance matrices: read, and written in their GGUF form.

Such a file has ``general.type`` = ``imatrix``, the names of the texts, the number of chunks and the tokens of a chunk,
and for each weight matrix ``blk.0.ffn_down.weight`` two fp32 tensors: ``….in_sum2``, the sum of the squared inputs
of every column over all tokens, and ``….counts``, how many tokens that were. For fused experts both have a row an
expert. What llama.cpp's quantizer uses is the quotient, and one where an expert saw no token. Other tensors, such as
the sums of the inputs themselves (``….in_sum``), are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.file import Field, GGUFFile
from lightning_gsq.gguf.imatrix_dat import read_dat
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.gguf.write import NewTensor, write_gguf

KIND, DATASETS, CHUNK_COUNT, CHUNK_SIZE = (
    "general.type",
    "imatrix.datasets",
    "imatrix.chunk_count",
    "imatrix.chunk_size",
)
SUMS, COUNTS = ".in_sum2", ".counts"
F32 = TYPES["F32"].number


@dataclass(frozen=True)
class InputSquares:
    """Squared inputs of one weight, or of each of some fused experts.

    Args:
        sum_EI: fp32, sums over tokens; one row for a plain matrix.
        count_E: fp32, tokens; whole numbers.
    """

    sum_EI: Tensor
    count_E: Tensor

    def mean(self) -> Tensor:
        """The importance ``E I`` with which llama.cpp quantizes: the mean square, or one where no token came."""
        mean_EI = self.sum_EI / self.count_E[:, None]
        return torch.where(self.count_E[:, None] > 0, mean_EI, torch.ones_like(mean_EI))


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix.

    Args:
        entries: By the weight's name in a GGUF file of the model.
        datasets: Names of the texts.
        chunk_count: Chunks of text.
        chunk_size: Tokens of a chunk.
    """

    entries: Mapping[str, InputSquares]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Reads a file in either form.

    In the older one (:mod:`lightning_gsq.gguf.imatrix_dat`) fused experts are one row of all their columns.

    Raises:
        ConfigurationError: it is damaged, or no importance matrix.
    """
    if _begins_otherwise(path):
        entries, text, chunks = read_dat(path.read_bytes(), path)
        squares = {name: InputSquares(sums[None], torch.tensor([calls])) for name, (sums, calls) in entries.items()}
        return ImportanceMatrix(squares, (text,) if text else (), chunks, 0)
    file = GGUFFile(path)
    if _value(file, KIND, str) != "imatrix":
        raise ConfigurationError(
            f"{path} is a GGUF file of the type {_value(file, KIND, str)!r}, not 'imatrix'; make an importance matrix "
            f"with llama-imatrix -o {path.name}"
        )
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    alone = {name.removesuffix(COUNTS) for name in file.tensors if name.endswith(COUNTS)} ^ set(names)
    if alone or not names:
        what = f"{min(alone)} has sums without counts or counts without sums" if alone else "there are no sums"
        raise ConfigurationError(f"{path} is not a whole importance matrix: {what}")
    datasets = _value(file, DATASETS, list)
    return ImportanceMatrix(
        {name: _entry(file, name) for name in names},
        tuple(str(name) for name in datasets or ()),
        _value(file, CHUNK_COUNT, int) or 0,
        _value(file, CHUNK_SIZE, int) or 0,
    )


def _begins_otherwise(path: Path) -> bool:
    """Whether a file is there and not in GGUF form."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) != b"GGUF"
    except OSError:
        return False  # the reader of GGUF files says why


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Writes a file as llama.cpp does: weights in the order of their names, dimensions of one at the end left out.

    Raises:
        ValueError: sums and counts do not fit together, or there are none.
    """
    if not matrix.entries:
        raise ValueError("an importance matrix needs an entry")
    fields = {
        KIND: Field("imatrix", GGUFValueType.STRING),
        DATASETS: Field(list(matrix.datasets), GGUFValueType.ARRAY, GGUFValueType.STRING),
        CHUNK_COUNT: Field(matrix.chunk_count, GGUFValueType.UINT32),
        CHUNK_SIZE: Field(matrix.chunk_size, GGUFValueType.UINT32),
    }
    tensors = []
    for name in sorted(matrix.entries, key=lambda name: name.encode()):
        sum_EI, count_E = matrix.entries[name].sum_EI, matrix.entries[name].count_E
        if sum_EI.ndim != 2 or count_E.shape != sum_EI.shape[:1]:
            raise ValueError(f"{name}: sums of shape {tuple(sum_EI.shape)}, counts of shape {tuple(count_E.shape)}")
        experts, columns = sum_EI.shape
        tensors.append(_plain(name + SUMS, (columns,) if experts == 1 else (experts, columns), sum_EI))
        tensors.append(_plain(name + COUNTS, (1,) if experts == 1 else (experts, 1), count_E))
    write_gguf(path, fields, tensors)


def _plain(name: str, shape: tuple[int, ...], value: Tensor) -> NewTensor:
    return NewTensor(name, shape, F32, lambda: value.detach().cpu().float().numpy().astype("<f4"))


def _entry(file: GGUFFile, name: str) -> InputSquares:
    sums, counts = _numbers(file, name + SUMS), _numbers(file, name + COUNTS)
    if len(sums) % len(counts):
        raise ConfigurationError(f"{file.path}: {name} has {len(sums)} sums for {len(counts)} counts")
    return InputSquares(sums.view(len(counts), -1), counts)


def _numbers(file: GGUFFile, name: str) -> Tensor:
    if file.tensors[name].number != F32:
        raise ConfigurationError(f"{file.path}: {name} is of ggml's type {file.tensors[name].number}, expected F32")
    numbers = torch.from_numpy(np.array(file.raw(name)).reshape(-1).view("<f4").astype(np.float32))
    if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()):
        raise ConfigurationError(f"{file.path}: {name} has a negative, infinite or NaN number")
    return numbers


def _value(file: GGUFFile, key: str, kind: type) -> Any:
    """A field of a type; None where there is none."""
    value = file.fields[key].value if key in file.fields else None
    if value is not None and not isinstance(value, kind):
        raise ConfigurationError(f"{file.path}: {key} is {value!r}, expected {kind.__name__}")
    return value
