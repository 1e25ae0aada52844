"""Hidden states of all calibration sequences at one depth of the model, in memory or in a file."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.locking import is_free, locked

PREFIX, LOCK = "lightning-gsq-", ".lock"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ActivationOptions:
    """How hidden states are kept between blocks.

    Args:
        dtype: Storage dtype; half precision halves the memory.
        memory_limit_gb: Above this total, in gigabytes (10^9 bytes), hidden states live in memory-mapped files. Where a
            size is given, what the choices of a block's matrices are worth is found out in parts of as much at once.
        folder: Where those files go; null for the system's temporary folder. They are deleted at the end.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    memory_limit_gb: float = 8.0
    folder: str | None = None

    def __post_init__(self) -> None:
        if not self.memory_limit_gb >= 0:
            raise ConfigurationError(
                f"activations.memory_limit_gb must not be negative, got {self.memory_limit_gb}; 0 keeps all of them in "
                "files"
            )

    @property
    def limit(self) -> float:
        """The memory limit in bytes."""
        return self.memory_limit_gb * 1e9

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return _DTYPES[self.dtype].itemsize

    @property
    def place(self) -> Path:
        """The folder that the files' own folder is made in."""
        return Path(self.folder or tempfile.gettempdir()).expanduser()


class ActivationStore:
    """Room for hidden states ``N T D`` at one depth, several times (the streams of a run).

    Args:
        shape: ``(N, T, D)``.
        options: Dtype and threshold.
        streams: How many tensors of that shape will be asked for; the limit counts them all.

    Raises:
        ConfigurationError: the file system has too little room.
    """

    def __init__(self, shape: tuple[int, int, int], options: ActivationOptions, streams: int) -> None:
        self.shape, self.dtype = shape, _DTYPES[options.dtype]
        self.bytes_each = math.prod(shape) * self.dtype.itemsize
        self.folder: Path | None = None
        self._count, self._lock = 0, ExitStack()
        if streams * self.bytes_each > options.limit:
            self.folder = self._make_folder(options.place, streams)

    def _make_folder(self, place: Path, streams: int) -> Path:
        try:
            _clean_up(place)
            free = shutil.disk_usage(place).free
            if free < streams * self.bytes_each:
                raise ConfigurationError(
                    f"activations.folder: {place} has {free / 1e9:.1f} GB free, the hidden states of {self.shape[0]} "
                    f"sequences of {self.shape[1]} tokens need {streams * self.bytes_each / 1e9:.1f} GB; choose "
                    "another folder or fewer sequences"
                )
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        except OSError as error:
            raise ConfigurationError(f"activations.folder: cannot write to {place}: {error.strerror}") from error
        self._lock.enter_context(locked(folder / LOCK, "hidden states", "activations.folder", lambda _: None))
        return folder

    def new(self) -> Tensor:
        """An uninitialised tensor ``N T D``, memory-mapped past the threshold."""
        return self._room(self.shape, self.dtype)[0]

    def room_for(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor for one like this of every sequence, floating-point numbers in the store's dtype."""
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        made, file = self._room((self.shape[0], *tensor.shape[1:]), dtype)
        if file is not None:
            with contextlib.suppress(PermissionError):  # Windows keeps the name for as long as the file is mapped
                file.unlink()  # the mapping keeps the content until the tensor is gone
        return made

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Path | None]:
        if self.folder is None:
            return torch.empty(shape, dtype=dtype), None
        file = self.folder / f"stream{self._count}.bin"
        self._count += 1
        return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape), file

    def close(self) -> None:
        """Deletes the files, if any."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _clean_up(place: Path) -> None:
    """Deletes what runs that were killed left: folders whose lock nobody holds."""
    for folder in place.glob(f"{PREFIX}*"):
        if folder.is_dir() and not folder.is_symlink() and is_free(folder / LOCK):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Stream:
    """All sequences at one depth of one model: the full-precision one, or the quantized one.

    Args:
        ids_NT: Their token ids.
        hidden_NTD: Hidden states, in room of ``store``.
        store: Where more room is had.
        beside: What blocks before have computed for blocks to come, by name, sequences first.
    """

    ids_NT: Tensor
    hidden_NTD: Tensor
    store: ActivationStore
    beside: dict[str, Tensor] = field(default_factory=dict)


class ActivationDataset(Dataset[tuple[Tensor, ...]]):
    """A block's inputs and targets ``N T D`` and what else is given for each sequence, a batch at a time."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        return [tuple(tensor[indices] for tensor in self.tensors)]


def first(batches: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Collate function of :class:`ActivationDataset`: its batches arrive whole."""
    return batches[0]
