"""This process among those of a run: who shares what, and who writes.

Lightning starts the other processes with the first ``fit`` or ``validate`` of a Trainer. A run works before that
(hidden states, Hessians), so :meth:`Ranks.join` brings that moment forward. What one process can refuse, it has refused
by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from lightning_gsq.errors import ConfigurationError, ProcessLostError
from lightning_gsq.system.slices import slices

T = TypeVar("T")
PIECE_BYTES = 1 << 26
"""What processes send each other at once."""


@dataclass(frozen=True)
class Ranks:
    """One process of several; with the defaults, the only one.

    Args:
        rank: Its number.
        world: How many there are.
        strategy: Lightning's strategy, through which they talk; None for one process.
    """

    rank: int = 0
    world: int = 1
    strategy: Strategy | None = None

    @classmethod
    def join(cls, trainer: Trainer) -> Ranks:
        """Starts the other processes where that is Lightning's task, and meets them.

        Raises:
            ConfigurationError: the strategy starts processes in a way that a run cannot use.
        """
        if trainer.world_size == 1:
            return cls()
        strategy = trainer.strategy
        if isinstance(strategy.launcher, _MultiProcessingLauncher):
            raise ConfigurationError(
                "trainer.strategy: forked and spawned processes end with each fit, and a run has one for every block; "
                "use ddp, or torchrun"
            )
        if strategy.launcher is not None:
            strategy.launcher.launch(lambda: None)
        strategy.setup_environment()
        return cls(trainer.global_rank, trainer.world_size, strategy)

    @classmethod
    @contextmanager
    def joined(cls, trainer: Trainer) -> Iterator[Ranks]:
        """What :meth:`join` gives, left at the end; an error ends the other processes too."""
        try:
            ranks = cls.join(trainer)
            yield ranks
        except BaseException as error:
            _end_others(trainer.strategy)
            if isinstance(error, RuntimeError) and trainer.world_size > 1 and "gloo" in str(error):
                raise ProcessLostError(
                    "another process of this run has ended, see its own message; the same command resumes after the "
                    "last finished block or phase"
                ) from error
            raise
        ranks.leave()

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, sequences: Tensor, even: bool = True) -> Tensor:
        """This process's part of ``N ...``; ``even`` drops what cannot be divided evenly."""
        stop = len(sequences) - len(sequences) % self.world if even else len(sequences)
        return sequences[self.rank : stop : self.world]

    def share_of(self, count: int) -> int:
        """How many of ``count`` things are this process's part."""
        return len(range(self.rank, count, self.world))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def gather_rows(self, own: Tensor, counts: Sequence[int], device: torch.device) -> Tensor:
        """Rows of all processes below one another, in the first process; the others keep their own.

        They travel some at a time, so that no more than :data:`PIECE_BYTES` of them is on a device at once.

        Args:
            own: This process's rows, on the host.
            counts: How many each process has.
            device: Where processes exchange tensors.
        """
        step = max(1, PIECE_BYTES // max(1, own[:1].nbytes))
        if not self.first:
            for part in slices(len(own), step):
                torch.distributed.send(own[part].contiguous().view(torch.uint8).to(device), 0)
            return own
        everything = own.new_empty(sum(counts), *own.shape[1:])
        everything[: len(own)] = own
        start = len(own)
        for rank, count in enumerate(counts[1:], 1):
            for part in slices(count, step):
                rows = everything[start:][part]
                piece = torch.empty_like(rows.view(torch.uint8), device=device)
                torch.distributed.recv(piece, rank)
                rows.copy_(piece.cpu().view(own.dtype))
            start += count
        return everything

    def all(self, value: T) -> list[T]:
        """What each process has, in all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """The first process's value, everywhere."""
        return value if self.strategy is None else self.strategy.broadcast(value)

    def wait(self) -> None:
        """Waits for all."""
        if self.strategy is not None:
            self.strategy.barrier()

    def leave(self) -> None:
        """Ends what :meth:`join` began."""
        if self.strategy is not None:
            self.wait()
            torch.distributed.destroy_process_group()


def _end_others(strategy: Strategy) -> None:
    """Ends the processes that the strategy has started, without waiting for what they are busy with.

    Lightning's observer, which ends this process too as soon as it sees one of them gone, looks at the same list.
    """
    started = getattr(strategy.launcher, "procs", [])
    processes = list(started)
    started.clear()
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def check_shares(ranks: int, **counts: int) -> None:
    """Verifies that every process gets something.

    Args:
        ranks: How many processes there are.
        counts: What is shared, by option; two underscores stand for a dot.

    Raises:
        ConfigurationError: there are more processes than things to share.
    """
    for name, count in counts.items():
        if count < ranks:
            raise ConfigurationError(
                f"{name.replace('__', '.')}: {count} sequences cannot be shared by {ranks} processes; give at least "
                f"{ranks}, or use fewer devices"
            )
