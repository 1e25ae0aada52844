"""Is the Hugging Face hub within reach? Asked once, before a library asks that tries again for half a minute.

``huggingface_hub`` repeats a request that got no answer five times, with pauses of up to eight seconds, where it has no
copy of the file; ``datasets`` does the same. Its own ``get_hf_file_metadata`` asks once, and waits for
``HF_HUB_ETAG_TIMEOUT`` seconds at most.
"""

from __future__ import annotations

from typing import Literal

WAYS_OUT = "give a local path, or get within reach of the hub (HF_ENDPOINT names another one, HTTPS_PROXY a way to it)"
CLIENTS = {"httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
"""Packages whose errors say that there was no answer."""


def why_out_of_reach(
    name: str, file: str, kind: Literal["model", "dataset"], revision: str | None = None
) -> str | None:
    """Why nobody answers for a file on the hub; None where it is in the local cache, or there is an answer, whatever.

    Args:
        name: Of the repository.
        file: The file in it.
        kind: What the repository holds.
        revision: Branch, tag or commit.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if is_offline_mode():
        return None  # the libraries then refuse at once
    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision, repo_type=kind), str):
            return None
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision, repo_type=kind))
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # of whichever client is installed
        roots = {parent.__module__.partition(".")[0] for parent in type(error).__mro__}
        if not roots & CLIENTS and not isinstance(error, OSError):
            raise
        return str(error).strip() or type(error).__name__
    return None
