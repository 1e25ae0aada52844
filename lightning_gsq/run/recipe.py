"""What makes two runs the same: the resolved settings that decide the result, and fingerprints of model and text.

What a fingerprint stands for (the address of a model, of a text, of a file to start from) may be written otherwise, or
have moved: it is kept in the recipe, and does not count. Neither does the text for perplexity, which changes no weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.system.digests import data_digest, weights_digest
from lightning_gsq.system.fingerprint import file_digest, fingerprint
from lightning_gsq.system.versions import versions
from lightning_gsq.training import ModelQuantization

FORMAT = 2
"""Of the recipe and of the files that carry its digest; earlier runs have none."""
BESIDE_THE_RECIPE: dict[str, set[str]] = {
    # settings that a resumed run may change, because they do not change its result
    "trainer": {
        "default_root_dir",
        "logger",
        "profiler",
        "log_every_n_steps",
        "enable_progress_bar",
        "enable_model_summary",
        "enable_checkpointing",
        "devices",
        "num_nodes",
        "strategy",
        "use_distributed_sampler",
    },
    "model": {"phases", "save_imatrix", "expert_parallel"},
    "data": {"cache_folder", "retries", "retry_pause"},
    "evaluation": {"by_block"},
    "activations": {"memory_limit_gb", "folder"},
}
LATER = {"config", "end_to_end", "export"}
"""Groups that are no part of it: the end-to-end phase keeps its settings beside its own result, exports come after."""
OF_THIS_MACHINE = {"strategy"}
"""Settings of the end-to-end phase that say how processes share it."""
STANDING_FOR = {
    # settings that a fingerprint stands for
    "model": {"model.pretrained", "model.revision", "model.trust_remote_code"},
    "calibration": {"data.source"},
    "start": {"model.warm_start.init_args.file"},
    "imatrix": {"model.imatrix"},
}
ADDRESSES = {"pretrained", "path", "file", "folder", "imatrix"}
"""Names of settings that may be local addresses, relative to where the run was started."""


def make_recipe(
    settings: dict[str, Any],
    seed: int,
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
    choice: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The recipe of a run over this model and this text; ``choice`` is that of widths, as plain data."""
    groups: dict[str, Any] = {}
    for key, value in settings.items():
        if key in LATER:
            continue
        dropped = BESIDE_THE_RECIPE.get(key, set())
        groups[key] = {k: v for k, v in value.items() if k not in dropped} if isinstance(value, dict) else value
    callbacks = groups["trainer"].get("callbacks") or []
    groups["trainer"]["callbacks"] = [c for c in callbacks if not watches_only(c["class_path"])]
    if not has_salient_part(settings["model"]):
        groups["model"].pop("saliency", None)
    if settings["model"].get("size") is None:  # as in recipes from before there was one
        for name in ("size", "choices"):
            groups["model"].pop(name, None)
    if model.start.experts.option is None:
        for name in ("moe_calibrate_all_experts", "moe_min_tokens_per_expert", "moe_max_extra_sequences"):
            groups["model"].pop(name, None)
    elif model.start.experts.min_tokens is None:
        groups["model"].pop("moe_max_extra_sequences", None)
    spare = [data.spare_ids_NT] if len(data.spare_ids_NT) else []
    fingerprints = {
        "model": model_fingerprint(model),
        "calibration": fingerprint([data.train_ids_NT, data.validation_ids_NT, *spare]),
        "evaluation": fingerprint([evaluation.ids_NT]),
    }
    start = _start_file(settings["model"])
    if start is not None:
        fingerprints["start"] = file_digest(start)
    if model.start.imatrix is not None:
        fingerprints["imatrix"] = file_digest(Path(model.start.imatrix).expanduser())
    else:
        groups["model"].pop("imatrix", None)
    return {
        "format": FORMAT,
        "seed": seed,
        "settings": groups,
        **({} if choice is None else {"choice": dict(choice)}),
        "beside": _beside(settings),
        "addresses": dict(_addresses(groups)),
        "fingerprints": fingerprints,
        "versions": versions(),
    }


def _beside(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Which phases there are, and the last one's settings, so that :func:`settings_of` can give back both."""
    end_to_end = {k: v for k, v in (settings.get("end_to_end") or {}).items() if k not in OF_THIS_MACHINE}
    phases = {name: settings["model"][name] for name in ("phases",) if name in settings["model"]}
    return {"model": phases, "end_to_end": end_to_end}


def settings_of(recipe: Mapping[str, Any], watching: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The settings of a run like that of a recipe, as a configuration holds them.

    Args:
        recipe: A recipe, whole as :func:`is_whole` says.
        watching: Callbacks that come to those of the recipe, which names only such as decide a result.

    Returns:
        Settings by group. Addresses are absolute where the recipe says what they were; code that comes with a model is
        not run, whatever the recipe's own run allowed.
    """
    settings: dict[str, Any] = copy.deepcopy(dict(recipe["settings"]))
    for name, address in (recipe.get("addresses") or {}).items():
        _replace(settings, str(name).split("."), address)
    beside = recipe.get("beside") or {}
    settings["model"] = {**settings["model"], **(beside.get("model") or {}), "trust_remote_code": False}
    if beside.get("end_to_end"):
        settings["end_to_end"] = copy.deepcopy(beside["end_to_end"])
    trainer = settings.get("trainer") or {}
    settings["trainer"] = {**trainer, "callbacks": [*(trainer.get("callbacks") or []), *watching]}
    return settings


def deciding(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that decides the weights of a run."""
    settings = copy.deepcopy(dict(recipe["settings"]))
    settings.pop("evaluation", None)
    fingerprints = {name: value for name, value in recipe["fingerprints"].items() if name != "evaluation"}
    for name in fingerprints:
        for path in STANDING_FOR.get(name, ()):
            _remove(settings, path.split("."))
    choice = recipe.get("choice")
    widths = {} if choice is None else {"widths": choice["widths"]}
    return {"seed": recipe["seed"], "settings": settings, **widths, "fingerprints": fingerprints}


def recipe_digest(recipe: Mapping[str, Any]) -> str | None:
    """What every file of the run carries; None for the recipe of an earlier version, whose files carry nothing."""
    return data_digest(deciding(recipe)) if recipe.get("format") == FORMAT else None


def is_whole(recipe: Any) -> bool:
    """Whether something is a recipe, and all of it."""
    if not isinstance(recipe, Mapping) or not {"seed", "settings", "fingerprints", "versions"} <= set(recipe):
        return False
    groups = recipe["settings"]
    return isinstance(groups, Mapping) and isinstance(recipe["fingerprints"], Mapping) and "model" in groups


def _typed(value: Any) -> str:
    """A value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def compare(recorded: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines that say where two nested mappings differ."""
    lines = []
    for key in sorted({*recorded, *wanted}, key=str):
        old, new, name = recorded.get(key), wanted.get(key), f"{prefix}{key}"
        classes = [of.get("class_path") for of in (old, new) if isinstance(of, Mapping)]
        if len(classes) == 2 and classes[0] != classes[1]:  # whose arguments have nothing to do with each other
            lines.append(f"{name}: the run has {classes[0]}, asked for {classes[1]}")
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += compare(old, new, f"{name}.")
        elif old != new:
            lines.append(f"{name}: the run has {_typed(old)}, asked for {_typed(new)}")
    return lines


def has_salient_part(settings: dict[str, Any]) -> bool:
    """Whether any scheme in these settings leaves something to the choice of salient weights."""
    overrides = (settings.get("overrides") or {}).values()
    schemes = [settings["scheme"], *(override or {} for override in overrides)]
    # A preset's name is a scheme without any.
    return any(not isinstance(scheme, str) and (scheme.get("salient") or scheme.get("budget")) for scheme in schemes)


def model_fingerprint(model: ModelQuantization) -> str:
    """A digest of every number that the model was loaded with."""
    return weights_digest(model.network.state_dict())


def watches_only(class_path: str) -> bool:
    """Whether a callback changes no result, as its class says."""
    module, _, name = class_path.rpartition(".")
    return bool(getattr(getattr(import_module(module), name), "watches_only", False))


def _start_file(settings: Mapping[str, Any]) -> Path | None:
    """The file that the warm start reads codes from, if it is one that does."""
    file = ((settings.get("warm_start") or {}).get("init_args") or {}).get("file")
    path = Path(file).expanduser() if isinstance(file, str) else None
    return path if path is not None and path.is_file() else None


def _addresses(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Local addresses among the settings, by dotted name, made absolute."""
    entries = settings.items() if isinstance(settings, Mapping) else enumerate(settings or ())
    for key, value in entries:
        name = f"{prefix}{key}"
        if isinstance(value, Mapping | list):
            yield from _addresses(value, f"{name}.")
        elif key in ADDRESSES and isinstance(value, str) and Path(value).expanduser().exists():
            yield name, str(Path(value).expanduser().absolute())


def _replace(settings: Any, path: list[str], value: Any) -> None:
    """Sets what a dotted name stands for, numbers for places in lists; nothing where there is no such place."""
    for key in path[:-1]:
        if isinstance(settings, list) and key.isdigit() and int(key) < len(settings):
            settings = settings[int(key)]
        else:
            settings = settings.get(key) if isinstance(settings, dict) else None
    if isinstance(settings, dict) and path[-1] in settings:
        settings[path[-1]] = value


def _remove(settings: Any, path: list[str]) -> None:
    for key in path[:-1]:
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    if isinstance(settings, dict):
        settings.pop(path[-1], None)
