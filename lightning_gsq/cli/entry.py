"""Where a command begins and ends: arguments in, exit code out.

Signals are watched before the libraries are loaded, which takes seconds.
"""

from __future__ import annotations

import gc
import sys

from lightning_gsq.cli.listings import listing, option_names
from lightning_gsq.cli.names import unknown_option, unknown_verb
from lightning_gsq.cli.verbs import EXIT_USAGE, overview
from lightning_gsq.system.console import make_console
from lightning_gsq.system.signals import Stopped, speaks, stopping
from lightning_gsq.system.versions import own_version


def console() -> None:
    """The command ``lightning-gsq``."""
    sys.exit(main())


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    if arguments[0] in ("-h", "--help", "--version"):
        print(f"lightning-gsq {own_version()}" if arguments[0] == "--version" else overview())
        return 0
    text = listing(arguments)
    if text is not None:
        print(text, end="")
        return 0
    wrong = unknown_verb(arguments[0]) or unknown_option(arguments, option_names(arguments[0]))
    if wrong is not None:
        print(f"error: {wrong}", file=sys.stderr)
        return EXIT_USAGE
    again = "resumes after the last finished block or phase" if "fit" in arguments else "begins anew"
    farewell = f"stopped; the same command {again}"
    try:
        with stopping(farewell, loading=True) as watch:
            from lightning_gsq.cli.errors import run

            watch.loading = False
            if args is None:  # a process of its own: what libraries brought stays, and need not be looked at again
                gc.freeze()
            return run(arguments, debug)
    except Stopped as stopped:
        if speaks():
            make_console(stderr=True).print(farewell, soft_wrap=True)
        return stopped.exit_code
