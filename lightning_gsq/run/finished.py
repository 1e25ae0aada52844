"""The files of a phase that are there and whole. Each counts only on top of the very block that it was made on.

A block is made from the hidden states that the blocks before it give, so its file names the digest of the one before.
One that is damaged is made again; those after it stay if it comes out as it was, and are made again if it does not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lightning_gsq.run.block_files import OUTER, ROUNDED, Blocks, DamagedFileError, Header
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.experts import own_part, whole
from lightning_gsq.run.run import Run


class Finished:
    """What a phase has on disk, taken and added in the order of the blocks.

    Args:
        run: The run.
        kind: ``warm_start`` or ``block``.
    """

    def __init__(self, run: Run, kind: str) -> None:
        self.run, self.kind = run, kind
        self.headers: dict[int, Header] = run.ranks.agree(self._whole() if run.ranks.first else {})
        self._first = run.ranks.agree(self._outer())
        self._before = self._first

    def _outer(self) -> str:
        """Digest of the weights outside of the blocks, on which the first block is made; empty where none has any."""
        if not self.run.model.outer.expected(self.run.model.network):
            return ""
        header = self.run.folder.header(ROUNDED, OUTER)
        return "" if header is None else header.digest

    def _whole(self) -> dict[int, Header]:
        """Headers of the files whose every number was read and found to be what was written."""
        headers = {}
        for plan in self.run.plan:
            file = self.run.folder.block_file(self.kind, plan.index)
            if not file.exists():
                continue
            try:
                self.run.folder.read_block(self.kind, plan.index, plan.expected)
            except DamagedFileError as error:
                self.run.say(str(error))
                continue
            header = self.run.folder.header(self.kind, plan.index)
            if header is not None:
                headers[plan.index] = header
        return headers

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        before = self._first
        for plan in self.run.plan:
            header = self.headers.get(plan.index)
            if header is None or header.after != before:
                return False
            before = header.digest
        return True

    def take(self, plan: BlockPlan) -> Blocks | None:
        """What this process has of the next block, if its file is there and was made on those before."""
        header = self.headers.get(plan.index)
        if header is None:
            return None
        if header.after != self._before:
            self.run.say(f"{plan.name} was made on other weights of the blocks before it; it is made again")
            return None
        self._before = header.digest
        return own_part(self.run, plan, self.run.folder.read_block(self.kind, plan.index, plan.expected))

    def add(self, plan: BlockPlan, tensors: Blocks, measures: Mapping[str, Any] | None = None) -> None:
        """Writes the next block, of which each process gives what it has."""
        self.run.folder.write_block(self.kind, plan.index, whole(self.run, plan, tensors), self._before, measures)
        header = self.run.folder.header(self.kind, plan.index) if self.run.ranks.first else None
        self._before = self.run.ranks.agree("" if header is None else header.digest)


class Lap:
    """Seconds between two moments of a run, and what its parts took of them.

    Args:
        run: The run, whose watch counts the parts.
    """

    def __init__(self, run: Run) -> None:
        self.run, self._began = run, time.perf_counter()
        run.watch.take()

    def take(self) -> dict[str, float]:
        """``seconds``, and ``seconds/<part>``, since the last call."""
        parts = {f"seconds/{part}": seconds for part, seconds in self.run.watch.take().items()}
        began, self._began = self._began, time.perf_counter()
        return {"seconds": self._began - began, **parts}
