"""Which errors a command tells in one line, and with which exit code.

Every error that a user can cause ends here. Anything else is a mistake of this program and is shown in full.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import traceback
from collections.abc import Callable

import jinja2
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from lightning_gsq.cli.app import GSQCLI
from lightning_gsq.cli.defaults import EXIT_FAILURE, quiet_libraries
from lightning_gsq.cli.verbs import EXIT_USAGE
from lightning_gsq.errors import ConfigurationError, ProcessLostError, WorkFailedError
from lightning_gsq.system.console import make_console
from lightning_gsq.system.progress_bars import no_foreign_bars
from lightning_gsq.training import NonFiniteLossError

DISK = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT, errno.EIO}
"""Numbers of errors that a disk raises, now or always."""


def _of_the_system(error: OSError) -> str:
    text = str(error.strerror or error)
    if error.filename:
        return f"{text}: {error.filename}"
    if error.errno in DISK:
        return f"{text}: what was finished is kept, and the same command goes on when the disk takes files again"
    return text


LINES: dict[type[Exception], tuple[int, Callable[..., str]]] = {
    ConfigurationError: (EXIT_USAGE, str),
    MisconfigurationException: (EXIT_USAGE, str),
    NonFiniteLossError: (EXIT_FAILURE, str),
    ProcessLostError: (EXIT_FAILURE, str),
    WorkFailedError: (EXIT_FAILURE, str),
    jinja2.TemplateError: (EXIT_USAGE, lambda error: f"the tokenizer's chat template cannot be used: {error}"),
    RecursionError: (EXIT_USAGE, lambda error: f"a file or an option is nested too deeply to be read ({error})"),
    SafetensorError: (EXIT_FAILURE, lambda error: f"a safetensors file cannot be read or written: {error}"),
    torch.OutOfMemoryError: (EXIT_FAILURE, lambda error: f"the device has too little memory: {error}"),
    MemoryError: (
        EXIT_FAILURE,
        lambda error: f"this machine has too little memory: {str(error) or 'plan says how much is needed'}",
    ),
    OSError: (EXIT_FAILURE, _of_the_system),
}
"""Exit code and line of the errors that are told in one; the first that fits."""


def run(arguments: list[str], debug: bool) -> int:
    """Runs a command; returns its exit code.

    Args:
        arguments: Those of the command line, without ``--debug``.
        debug: Show the traceback of errors that are told in one line, too.
    """
    quiet_libraries()
    threading.excepthook = _in_the_background
    try:
        with no_foreign_bars():
            GSQCLI(arguments)
    except tuple(LINES) as error:
        if debug:
            traceback.print_exception(error)
        code, line = line_of(error)
        with contextlib.suppress(OSError):  # what fails may be the file that the error's line goes to
            make_console(stderr=True).print(f"error: {line}", soft_wrap=True)
        return code
    return 0


def _in_the_background(arguments: threading.ExceptHookArgs) -> None:
    """An exception that ends a thread: of TensorBoard's writer, where the disk fails, one line is enough."""
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)
        return
    what = arguments.exc_value.strerror or arguments.exc_value
    make_console(stderr=True).print(f"TensorBoard's events cannot be written: {what}", soft_wrap=True)


def line_of(error: Exception) -> tuple[int, str]:
    """Exit code and line of an error of :data:`LINES`."""
    code, line = next(entry for kind, entry in LINES.items() if isinstance(error, kind))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        code = EXIT_USAGE
    return code, line(error)
