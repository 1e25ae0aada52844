"""Does the Hugging Face hub answer? Asked once, where its libraries would ask again for minutes.

``huggingface_hub`` repeats a request that got no answer five times, with pauses of up to eight seconds, for every file
that its cache does not hold, and a tokenizer alone may come in a dozen files; ``datasets`` does the same. Its own
``get_hf_file_metadata`` asks once, and waits for ``HF_HUB_ETAG_TIMEOUT`` seconds at most.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

REACH = "get within reach of the hub (HF_ENDPOINT names another one, HTTPS_PROXY a way to it)"
WAYS_OUT = f"give a local path, or {REACH}"
CLIENTS = {"httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
"""Packages whose errors say that there was no answer."""
FRESH = 60.0
"""Seconds for which a hub is taken to be as it was when it was asked."""

_log = logging.getLogger(__name__)
_heard: dict[str, tuple[float, str | None]] = {}
"""By address of the hub: when it was asked, and why there was no answer."""


def why_out_of_reach() -> str | None:
    """Why the hub does not answer; None if it does, whatever it says, or is not to be asked (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return None  # the libraries then refuse at once
    when, reason = _heard.get(constants.ENDPOINT, (-math.inf, None))
    if time.monotonic() - when > FRESH:
        reason = _no_answer(constants.ENDPOINT)
        _heard[constants.ENDPOINT] = time.monotonic(), reason
    return reason


def _no_answer(address: str) -> str | None:
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(address)
    except HfHubHTTPError:
        return None
    except Exception as error:
        if not is_no_answer(error):
            raise
        return str(error).strip() or type(error).__name__
    return None


def is_no_answer(error: Exception) -> bool:
    """Whether an error, of whichever client is installed, says that a request got no answer."""
    roots = {parent.__module__.partition(".")[0] for parent in type(error).__mro__}
    return bool(roots & CLIENTS) or isinstance(error, OSError)


@contextmanager
def without_waiting() -> Iterator[str | None]:
    """Has the hub's libraries take what their caches hold, and refuse the rest at once, where the hub does not answer.

    Yields:
        Why it does not; None if it does, or is not to be asked.
    """
    from huggingface_hub import constants

    reason = why_out_of_reach()
    if reason is None:
        yield None
        return
    owners: list[Any] = [constants]
    if find_spec("datasets") is not None:
        from datasets import config  # has a copy, taken when it is imported: here, and not inside

        owners.append(config)
    before = [owner.HF_HUB_OFFLINE for owner in owners]
    try:
        for owner in owners:
            owner.HF_HUB_OFFLINE = True
        yield reason
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.HF_HUB_OFFLINE = value


def is_cached(name: str, file: str, kind: Literal["model", "dataset"], revision: str | None = None) -> bool:
    """Whether a file of the hub is in the cache of this machine.

    Args:
        name: Of the repository.
        file: The file in it.
        kind: What the repository holds.
        revision: Branch, tag or commit.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, file, revision=revision, repo_type=kind), str)
    except HFValidationError:
        return False


@functools.cache
def say_cached(shown: str, reason: str) -> None:
    """Says once that something of the hub is taken from the cache, because the hub does not answer."""
    _log.warning("the hub is out of reach (%s): %s is taken from the cache of this machine", reason, shown)
