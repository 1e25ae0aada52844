"""Where a command begins and ends: arguments in, exit code out."""

from __future__ import annotations

import sys

from lightning_gsq.cli.app import GSQCLI
from lightning_gsq.cli.defaults import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, quiet_libraries
from lightning_gsq.errors import ConfigurationError, WorkFailedError
from lightning_gsq.system.console import make_console
from lightning_gsq.training import NonFiniteLossError


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if args is None else args
    quiet_libraries()
    errors = make_console(stderr=True)
    try:
        if not arguments:
            arguments, args = ["--help"], ["--help"]
        GSQCLI(args)
    except (ConfigurationError, NonFiniteLossError, WorkFailedError) as error:
        errors.print(f"error: {error}", soft_wrap=True)
        return EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILURE
    except KeyboardInterrupt:
        errors.print("stopped; the same command resumes after the last finished block or phase")
        return EXIT_INTERRUPTED
    return 0
