"""What makes two runs the same: the resolved settings that decide the result, and fingerprints of model and text."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.system.fingerprint import fingerprint
from lightning_gsq.system.versions import versions
from lightning_gsq.training import ModelQuantization

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
    "model": {"phases"},
    "data": {"cache_folder", "retries", "retry_pause"},
    "evaluation": {"by_block"},
    "activations": {"memory_limit_gb", "folder"},
}
LATER = {"config", "end_to_end", "export"}
"""Groups that are no part of it: the end-to-end phase keeps its settings beside its own result, exports come after."""


def make_recipe(
    settings: dict[str, Any],
    seed: int,
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
) -> dict[str, Any]:
    """The recipe of a run over this model and this text."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if key in LATER:
            continue
        dropped = BESIDE_THE_RECIPE.get(key, set())
        kept[key] = {k: v for k, v in value.items() if k not in dropped} if isinstance(value, dict) else value
    callbacks = kept["trainer"].get("callbacks") or []
    kept["trainer"]["callbacks"] = [c for c in callbacks if not _watches_only(c["class_path"])]
    if not has_salient_part(settings["model"]):
        kept["model"].pop("saliency", None)
    fingerprints = {
        "model": model_fingerprint(model),
        "calibration": fingerprint([data.train_ids_NT, data.validation_ids_NT]),
        "evaluation": fingerprint([evaluation.ids_NT]),
    }
    return {"seed": seed, "settings": kept, "fingerprints": fingerprints, "versions": versions()}


def has_salient_part(settings: dict[str, Any]) -> bool:
    """Whether any scheme in these settings leaves something to the choice of salient weights."""
    overrides = (settings.get("overrides") or {}).values()
    schemes = [settings["scheme"], *(override or {} for override in overrides)]
    # A preset's name is a scheme without any.
    return any(not isinstance(scheme, str) and (scheme.get("salient") or scheme.get("budget")) for scheme in schemes)


def _watches_only(class_path: str) -> bool:
    """Whether a callback changes no result, as its class says."""
    module, _, name = class_path.rpartition(".")
    return bool(getattr(getattr(import_module(module), name), "watches_only", False))


def model_fingerprint(model: ModelQuantization) -> str:
    """A digest of some numbers of every parameter: enough to tell two models apart, without reading a large one."""
    return fingerprint(p.detach().flatten()[:: max(1, p.numel() // 256)].float() for p in model.network.parameters())
