"""This project's own progress bar: live in a terminal, nothing in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_gsq.system.console import make_console


def make_bar(name: str, console: Console) -> Progress:
    """A bar that is gone when it ends: name, how many of how many, a text of the moment (``inner``), times.

    Args:
        name: What stands before it.
        console: Where it is drawn.
    """
    return Progress(
        TextColumn(name, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[inner]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
    )


@contextmanager
def bar(name: str, total: int, shown: bool = True) -> Iterator[Callable[[], None]]:
    """A bar over some steps, on standard error where that is a terminal.

    Args:
        name: What stands before it.
        total: How many steps there are.
        shown: Whether there is a bar at all: one process of several has it.

    Yields:
        A function that moves it by one step.
    """
    console = make_console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda: None
        return
    with make_bar(name, console) as progress:
        task = progress.add_task(name, total=total, inner="")
        yield lambda: progress.advance(task)
