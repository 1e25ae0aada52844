"""The quantized weights of all blocks, of which only the one that is looked at is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from lightning_gsq.run.block_files import Blocks
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.folder import RunFolder


class StoredBlocks(Sequence[Blocks]):
    """Quantized weights of each planned block, read from its file, and checked, whenever they are asked for.

    Args:
        folder: The run folder.
        kind: Whose they are: of the ``warm_start``, of each ``block`` or of ``end_to_end``.
        plan: The planned blocks.
    """

    def __init__(self, folder: RunFolder, kind: str, plan: Sequence[BlockPlan]) -> None:
        self.folder, self.kind, self.plan = folder, kind, plan

    def __len__(self) -> int:
        return len(self.plan)

    @overload
    def __getitem__(self, number: int) -> Blocks: ...

    @overload
    def __getitem__(self, number: slice) -> StoredBlocks: ...

    def __getitem__(self, number: int | slice) -> Blocks | StoredBlocks:
        """The weights of a block, by its position in the plan.

        Raises:
            DamagedFileError: its file is truncated, changed, or something else.
        """
        if isinstance(number, slice):
            return StoredBlocks(self.folder, self.kind, self.plan[number])
        part = self.plan[number]
        return self.folder.read_block(self.kind, part.index, part.expected)
