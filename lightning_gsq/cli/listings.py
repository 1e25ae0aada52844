"""What ``VERB --help`` prints, without the libraries that carry the verb out: their import takes seconds.

The texts in ``listings/`` are the parser's own, written by ``scripts/write_listings.py``. A test compares them with it;
installed beside other versions of the packages that name the options, they are not used, and the parser is asked.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from lightning_gsq.cli.verbs import SUMMARIES

PACKAGES = ("jsonargparse", "lightning")
"""What else decides the text."""
FOLDER = Path(str(files("lightning_gsq.cli") / "listings"))
HELP, ALL = ("-h", "--help"), "--help.all"
COLUMNS = "100"


def listing(arguments: list[str]) -> str | None:
    """The help that a command line asks for; None if it asks for none, or only the parser can say.

    Args:
        arguments: The command line without the program's name.
    """
    if not arguments or arguments[0] not in SUMMARIES or not {*HELP, ALL} & set(arguments):
        return None
    file = FOLDER / name_of(arguments[0], ALL in arguments)
    if not file.is_file():
        return None
    head, _, text = file.read_text(encoding="utf-8").partition("\n")
    return text if head.partition("; ")[0] == made_with() else None


def option_names(verb: str) -> frozenset[str]:
    """The options of a verb, without dashes; none where no listing says them."""
    file = FOLDER / name_of(verb, everything=True)
    if verb not in SUMMARIES or not file.is_file():
        return frozenset()
    head, _, text = file.read_text(encoding="utf-8").partition("\n")
    names = re.findall(r"--([\w.]+)", "\n".join(re.findall(r"(?m)^  -.*", text)))
    return frozenset(names) if head.partition("; ")[0] == made_with() else frozenset()


def name_of(verb: str, everything: bool) -> str:
    """Name of a listing's file."""
    return f"{verb}.all.txt" if everything else f"{verb}.txt"


def made_with() -> str:
    """The versions that a listing belongs to."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def listings() -> Iterator[tuple[str, str]]:
    """Name and content of every file, from the parser."""
    from lightning_gsq.cli.errors import run

    python = ".".join(platform.python_version_tuple()[:2])
    for verb in SUMMARIES:
        for everything in (False, True):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit), _columns():
                run([verb, ALL if everything else HELP[1]], debug=True)
            yield name_of(verb, everything), f"{made_with()}; Python {python}\n{printed.getvalue()}"


@contextlib.contextmanager
def _columns() -> Iterator[None]:
    """As many columns as the texts have, whatever the terminal's."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
