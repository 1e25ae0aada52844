"""Uploading a finished folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.hub import is_no_answer


def check_name(name: str, formats: int) -> None:
    """Verifies a repository name before any work.

    Args:
        name: The name, with ``{format}`` where the format's name shall stand.
        formats: How many formats are to be uploaded.

    Raises:
        ConfigurationError: it is no name, or several formats would share it.
    """
    if formats > 1 and "{format}" not in name:
        raise ConfigurationError(
            f"push_to_hub: {formats} formats cannot share the repository {name!r}; put {{format}} into the name"
        )
    try:
        validate_repo_id(name.replace("{format}", "format"))
    except HFValidationError as error:
        raise ConfigurationError(f"push_to_hub: {error}") from error


def push(folder: Path, name: str, private: bool) -> str:
    """Makes the repository if need be and uploads the folder in one commit.

    Args:
        folder: What to upload.
        name: ``organisation/name``, or ``name`` for one's own account.
        private: Whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        ConfigurationError: the hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Upload a model quantized with lightning-gsq"
        )
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | LocalTokenNotFoundError) and not is_no_answer(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"push_to_hub: the hub did not take {name}: {reason}; the files are in {folder}. Log in with "
            "`hf auth login` or set HF_TOKEN, and try again with `hf upload`"
        ) from error
    return str(repository)
