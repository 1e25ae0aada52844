"""The terminal: what is printed is text, whatever brackets and colons stand in names of folders, models and modules."""

from __future__ import annotations

from rich.console import Console


def make_console(stderr: bool = False, quiet: bool = False) -> Console:
    """A console that shows every string as it is: no markup, no emoji codes, no highlighted numbers."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
