"""``recipe.yaml``: written for a new run, compared on resuming, written again where the blocks vouch for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.block_files import read_header
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.recipe import FORMAT, compare, deciding, is_whole, recipe_digest
from lightning_gsq.system.files import write_atomically
from lightning_gsq.system.yaml_files import read_yaml

FINGERPRINTS = {
    "fingerprints.model": "the original model (--model.pretrained): other weights",
    "fingerprints.calibration": "the calibration text (--data.source and beside it): other tokens",
    "fingerprints.start": "the file of the warm start (--model.warm_start.file): other contents",
}


def open_recipe(folder: RunFolder, recipe: dict[str, Any], say: Callable[[str], None] = lambda _: None) -> None:
    """Makes a folder that of the run with this recipe; every file read from it has to belong to that run from now on.

    Args:
        folder: The run folder.
        recipe: The recipe of the run that is asked for.
        say: Prints a line for the user.

    Raises:
        ConfigurationError: the folder belongs to a run with another recipe, or nobody can say to which.
    """
    wanted = json.loads(json.dumps(recipe))
    digest = recipe_digest(wanted)
    if folder.rank and not folder.recipe_file.exists():  # the first process has yet to write it
        folder.recipe = digest
        return
    recorded, reason = _read(folder)
    if recorded is None:
        _refuse_orphans(folder, digest, reason)
        if folder.recipe_file.exists():
            say(f"{folder.recipe_file} is damaged; it is written anew, with the settings that the finished blocks had")
        content = wanted
    else:
        _refuse_another(folder, recorded, wanted)
        if recorded["fingerprints"].get("evaluation") != wanted["fingerprints"].get("evaluation"):
            say("Another text for perplexity than before: perplexities are measured anew, nothing is trained again")
        # Versions are there to be read: another one may change the last bits of a result, not what was asked for.
        content = {**wanted, "versions": recorded["versions"]}
    folder.recipe = digest
    if folder.rank == 0 and content != recorded:
        write_atomically(folder.recipe_file, yaml.safe_dump(content, sort_keys=False).encode())


def known_choice(folder: RunFolder, recipe: Mapping[str, Any]) -> Any:
    """The choice of widths of the run in a folder, as its recipe has it; None where it has yet to be made.

    Args:
        folder: The run folder.
        recipe: The recipe of the run that is asked for, without a choice.

    Raises:
        ConfigurationError: the folder belongs to a run with another recipe.
    """
    recorded, _ = _read(folder)
    if recorded is None:
        return None
    _refuse_another(folder, {k: v for k, v in recorded.items() if k != "choice"}, json.loads(json.dumps(recipe)))
    return recorded.get("choice")


def _read(folder: RunFolder) -> tuple[dict[str, Any] | None, str]:
    """The recipe, or None and what is wrong with it."""
    if not folder.recipe_file.exists():
        return None, "has block files and no recipe.yaml"
    try:
        content = read_yaml(folder.recipe_file, "trainer.default_root_dir")
    except ConfigurationError as error:
        return None, f"has a damaged recipe.yaml ({error})"
    return (dict(content), "") if is_whole(content) else (None, "has a damaged recipe.yaml (parts of it are missing)")


def _refuse_orphans(folder: RunFolder, digest: str | None, reason: str) -> None:
    """Verifies that the blocks of a folder without a recipe are those of this run, if there are any."""
    files = sorted(folder.blocks.glob("*.safetensors"))
    owners = {header.recipe for header in map(read_header, files) if header is not None}
    if files and owners != {digest}:
        raise ConfigurationError(
            f"trainer.default_root_dir: {folder.root} {reason}, and its blocks are not known to be those of a run with "
            "these settings; put its recipe.yaml back, use the settings that it was started with, or choose another "
            "folder"
        )


def _refuse_another(folder: RunFolder, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if recorded.get("format") != FORMAT:
        raise ConfigurationError(
            f"trainer.default_root_dir: {folder.root} holds a run of an earlier version, whose files do not say what "
            "they are; export it, or choose another folder"
        )
    differences = list(dict.fromkeys(map(_told, compare(deciding(recorded), deciding(wanted)))))
    if differences:
        raise ConfigurationError(
            f"trainer.default_root_dir: {folder.root} holds a run with another recipe; choose another folder, or "
            "the same settings to resume it. What differs:\n" + "\n".join(f"  {line}" for line in differences)
        )


def _told(line: str) -> str:
    """A difference under the name of its option, without digests."""
    name, _, rest = line.partition(":")
    if name in FINGERPRINTS:
        return FINGERPRINTS[name]
    option = "seed_everything" if name == "seed" else name.removeprefix("settings.")
    return f"--{option}:{rest}"
