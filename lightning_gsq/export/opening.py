"""Opening a finished run: its recipe, its original model, its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.recipe import model_fingerprint, recipe_digest
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.assignment import SchemeOverride
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme

_MODEL_SETTINGS = (
    # settings of a run that say what its weights are; the others say how they were trained
    "pretrained",
    "include",
    "exclude",
    "blocks",
    "scale_dtype",
    "dtype",
    "output_dtype",
    "revision",
    "trust_remote_code",
)


def open_run(folder: str | Path) -> FinishedRun:
    """Opens a finished run and loads its original model.

    Args:
        folder: The run folder.

    Raises:
        ConfigurationError: it is no run folder, the run is not finished, or its original model is not there or has
            changed.
    """
    root = Path(folder).expanduser()
    recipe = _read_recipe(root)
    run_folder = RunFolder(root, create=False)
    run_folder.recipe = recipe_digest(recipe)
    model = _model_of(recipe, root)
    source = model.address.source()
    model.load(source)
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
        raise ConfigurationError(f"run: {root} is not a run folder (no recipe.yaml)")
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(f"run: {file} cannot be read: {error}") from error
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("settings", {}).get("model"), Mapping):
        raise ConfigurationError(f"run: {file} is not the recipe of a run: it has no settings of a model")
    return dict(recipe)


def _model_of(recipe: Mapping[str, Any], root: Path) -> ModelQuantization:
    """The model with the settings of a run, not loaded yet."""
    settings = recipe["settings"]["model"]
    overrides: Mapping[str, Any] = settings.get("overrides") or {}
    try:
        return ModelQuantization(
            scheme=QuantScheme(**_with_salient(settings["scheme"])),
            overrides={name: SchemeOverride(**_with_salient(fields)) for name, fields in overrides.items()},
            **{key: settings[key] for key in _MODEL_SETTINGS if key in settings},
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"run: the recipe in {root} is not one of this version: {error}") from error


def _with_salient(fields: Mapping[str, Any]) -> dict[str, Any]:
    salient = fields.get("salient")
    return {**fields, "salient": SalientPart(**salient) if salient else salient}
