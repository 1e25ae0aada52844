"""What transformers, huggingface_hub and gguf raise while they load something, as one line; the one broad ``except``.

They raise dozens of unrelated types for what is wrong with a folder or a name. The original error stays the cause of
ours. What a model's own Python code raises is not ours to explain: it goes through as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from lightning_gsq.errors import ConfigurationError

REMOTE_CODE = "transformers_modules"
"""The package that transformers puts a model's own Python code into."""


@contextmanager
def as_refusals(what: str, trust_remote_code: bool = False) -> Iterator[None]:
    """Turns any error inside the context into a :class:`ConfigurationError`.

    Args:
        what: What could not be done, and with which option: the beginning of the message.
        trust_remote_code: Whether the model's own code may run, and may be what is wrong.

    Raises:
        ConfigurationError: with the error as its cause.
    """
    try:
        yield
    except (ConfigurationError, MemoryError):
        raise
    except Exception as error:
        if trust_remote_code and passes_through_remote_code(error.__traceback__):
            raise
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ConfigurationError(
                f"{what}: it comes with Python code of its own, which runs only with trust_remote_code true; read that "
                "code first"
            ) from error
        raise ConfigurationError(f"{what}: {first_line(error)}") from error


def passes_through_remote_code(trace: TracebackType | None) -> bool:
    """Whether an error was raised in, or below, a model's own Python code."""
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == REMOTE_CODE:
            return True
        trace = trace.tb_next
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message, all of them where it only announces what follows; its type without one."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if lines and lines[0].endswith(":"):
        return " ".join(lines)[:400]
    return lines[0] if lines else type(error).__name__
