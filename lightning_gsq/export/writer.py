"""Weight files, shard by shard, with a ledger of every byte.

Tensors are collected up to a limit and written as one safetensors file; the index names every shard. Only one shard is
ever in memory. What a tensor counts as in the ledger is said when it is added.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lightning_gsq.system.safetensors_headers import header_bytes
from lightning_gsq.weights.ledger import Ledger, LedgerEntry

METADATA = {"format": "pt"}
"""Tells transformers which framework wrote a file; it refuses files without."""
SINGLE, SHARD, INDEX = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json"


def begins_a_file(pending: int, size: int, shard_size: int) -> bool:
    """Whether the tensors of the next parameter go into a new file.

    Args:
        pending: Bytes of the file so far; a file holds one parameter at least.
        size: Bytes of the next parameter.
        shard_size: Bytes after which a new file begins.
    """
    return pending > 0 and pending + size > shard_size


class ShardWriter:
    """Writes tensors into the safetensors files of a model folder.

    Args:
        folder: The folder.
        shard_size: Bytes after which a new file begins.
    """

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder, self.shard_size = folder, shard_size
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total = 0
        self._shards: list[tuple[Path, list[str], int]] = []
        self._entries: list[LedgerEntry] = []

    def add(self, tensors: dict[str, Tensor], entry: LedgerEntry) -> None:
        """Adds the tensors that store one parameter.

        Args:
            tensors: By their names in the file; together they have the entry's bits.
            entry: What they count as.

        Raises:
            ValueError: the tensors do not have that many bits.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        if 8 * size != entry.bits:
            raise ValueError(f"{entry.name} takes {8 * size} bits in the file, its ledger entry says {entry.bits}")
        if begins_a_file(self._pending_bytes, size, self.shard_size):
            self._flush()
        self._pending |= {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._pending_bytes += size
        self._entries.append(entry)

    def add_plain(self, name: str, tensor: Tensor, parameter: str | None = None) -> None:
        """Adds a parameter that is stored as plain numbers; ``parameter`` is its name in the model, if another."""
        self.add({name: tensor}, LedgerEntry(parameter or name, tensor.numel(), unquantized=8 * tensor.nbytes))

    def finish(self) -> Ledger:
        """Writes what is left and the index; returns the ledger, checked against the files."""
        self._flush()
        headers: dict[str, int] = {}
        index: dict[str, str] = {}
        for number, (path, names, size) in enumerate(self._shards, start=1):
            final = SINGLE if len(self._shards) == 1 else SHARD.format(number, len(self._shards))
            path = path.replace(self.folder / final)
            headers[final] = path.stat().st_size - size
            index |= dict.fromkeys(names, final)
        if len(self._shards) > 1:
            content = {"metadata": {"total_size": self._total}, "weight_map": index}
            (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        ledger = Ledger(tuple(self._entries), headers)
        ledger.verify(self.folder / name for name in headers)
        return ledger

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.folder / f".shard-{len(self._shards)}.safetensors"
        save_file(self._pending, path, METADATA)
        path.chmod(0o666 & ~_umask())  # safetensors leaves it to the owner alone
        self._shards.append((path, list(self._pending), self._pending_bytes))
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


class PlannedShards:
    """The bytes of what a :class:`ShardWriter` would write, from tensors of which only shape and dtype count.

    Args:
        shard_size: As there.
    """

    def __init__(self, shard_size: int) -> None:
        self.shard_size = shard_size
        self._shards: list[dict[str, Tensor]] = [{}]
        self._pending = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Adds the tensors that store one parameter."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if begins_a_file(self._pending, size, self.shard_size):
            self._shards.append({})
            self._pending = 0
        self._shards[-1] |= tensors
        self._pending += size

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(
            header_bytes(shard, METADATA) + sum(tensor.nbytes for tensor in shard.values())
            for shard in self._shards
            if shard
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
