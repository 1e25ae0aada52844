"""Opening a finished run: its recipe, its original model, its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.folders import MARK
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.models.computed_weights import for_a_while
from lightning_gsq.quantizers.from_file import start_file
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.recipe import FORMAT, is_whole, model_fingerprint, recipe_digest
from lightning_gsq.system.owned_folders import read_mark
from lightning_gsq.system.yaml_files import read_yaml
from lightning_gsq.training import ModelQuantization
from lightning_gsq.training.outer_options import AUTO
from lightning_gsq.weights.assignment import override_of, scheme_of
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.widths import Choice

_MODEL_SETTINGS = (
    # settings of a run that say what its weights are; the others say how they were trained
    "pretrained",
    "include",
    "exclude",
    "fallback",
    "blocks",
    "scale_dtype",
    "dtype",
    "output_dtype",
    "revision",
)


def open_run(folder: str | Path, trust_remote_code: bool = False) -> FinishedRun:
    """Opens a finished run and loads its original model.

    Args:
        folder: The run folder.
        trust_remote_code: Run Python code that comes with the original model. What the run's recipe says of it counts
            for nothing: a folder from elsewhere does not decide what runs here.

    Raises:
        ConfigurationError: it is no run folder, the run is not finished, or its original model is not there or has
            changed.
    """
    root = Path(folder).expanduser()
    recipe = _read_recipe(root)
    run_folder = RunFolder(root, create=False)
    run_folder.recipe = recipe_digest(recipe)
    model = _model_of(recipe, root, trust_remote_code)
    choice = recipe.get("choice")
    if choice is not None:
        model.take(Choice.of_plain(choice).widths, f"mixed widths within {choice['size']}")
    try:
        with for_a_while(root) as scratch:
            model.load(model.address.source(), scratch=scratch)
    except ConfigurationError as error:
        if trust_remote_code or not recipe["settings"]["model"].get("trust_remote_code"):
            raise
        raise ConfigurationError(
            f"{error}\nThe run was trained with Python code that comes with {model.address.pretrained}. That is never "
            "run because a recipe says so: read the code, then add --trust_remote_code"
        ) from error
    recorded = recipe.get("fingerprints", {}).get("model")
    if recorded is not None and recorded != model_fingerprint(model):
        raise ConfigurationError(
            f"run: {model.address.pretrained} is no longer the model that the run in {root} quantized; put the "
            "original back"
        )
    return FinishedRun(run_folder, recipe, run_folder.summary, model, make_plan(model))


def _read_recipe(root: Path) -> dict[str, Any]:
    file = root / "recipe.yaml"
    if not file.is_file():
        raise ConfigurationError(
            f"run: {root} is not a run folder (no recipe.yaml); give what fit wrote: its --trainer.default_root_dir"
        )
    if read_mark(root, MARK) is not None:
        raise ConfigurationError(f"run: {root} is what an export wrote; give the run folder that it was written from")
    recipe = read_yaml(file, "run")
    settings = recipe.get("settings") if isinstance(recipe, Mapping) else None
    if not isinstance(settings, Mapping) or not isinstance(settings.get("model"), Mapping):
        raise ConfigurationError(f"run: {file} is not the recipe of a run: it has no settings of a model")
    if recipe.get("format") == FORMAT and not is_whole(recipe):
        raise ConfigurationError(f"run: {file} is damaged: parts of the recipe are missing")
    return dict(recipe)


def _model_of(recipe: Mapping[str, Any], root: Path, trust_remote_code: bool) -> ModelQuantization:
    """The model with the settings of a run, not loaded yet."""
    settings = recipe["settings"]["model"]
    overrides: Mapping[str, Any] = settings.get("overrides") or {}
    try:
        return ModelQuantization(
            scheme=scheme_of(settings["scheme"]),
            embedding=None if _refines(settings) else _outer(settings.get("embedding")),
            head=_outer(settings.get("head")),
            overrides={name: override_of(fields) for name, fields in overrides.items()},
            **{key: settings[key] for key in _MODEL_SETTINGS if key in settings} | _address_of(recipe),
            trust_remote_code=trust_remote_code,
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"run: the recipe in {root} is not one of this version: {error}") from error


def _outer(setting: Mapping[str, Any] | str | None) -> QuantScheme | str | None:
    return scheme_of(setting) if isinstance(setting, Mapping) else setting


def _refines(settings: Mapping[str, Any]) -> bool:
    """Whether a run kept the embedding of the file that it started from, as ``auto`` says then."""
    return settings.get("embedding") == AUTO and start_file(settings) is not None


def _address_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Where the original was when the run started, if it still is there: the address as typed depends on the folder."""
    addresses = recipe.get("addresses")
    address = addresses.get("model.pretrained") if isinstance(addresses, Mapping) else None
    return {"pretrained": address} if isinstance(address, str) and Path(address).exists() else {}
