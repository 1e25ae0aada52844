"""Weight files, shard by shard, with a ledger of every byte.

Tensors go into the safetensors files of :mod:`lightning_gsq.system.shards`, which keeps none of them in memory. What a
tensor counts as in the ledger is said when it is added.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lightning_gsq.system.safetensors_headers import header_bytes
from lightning_gsq.system.shards import METADATA, Shards, begins_a_file
from lightning_gsq.weights.ledger import Ledger, LedgerEntry


class ShardWriter:
    """Writes tensors into the safetensors files of a model folder.

    Args:
        folder: The folder.
        shard_size: Bytes after which a new file begins.
    """

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder = folder
        self._shards = Shards(folder, shard_size)
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
        self._shards.add(tensors)
        self._entries.append(entry)

    def add_plain(self, name: str, tensor: Tensor, parameter: str | None = None) -> None:
        """Adds a parameter that is stored as plain numbers; ``parameter`` is its name in the model, if another."""
        self.add({name: tensor}, LedgerEntry(parameter or name, tensor.numel(), unquantized=8 * tensor.nbytes))

    def finish(self) -> Ledger:
        """Writes what is left and the index; returns the ledger, checked against the files."""
        headers = self._shards.finish()
        ledger = Ledger(tuple(self._entries), headers)
        ledger.verify(self.folder / name for name in headers)
        return ledger


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
