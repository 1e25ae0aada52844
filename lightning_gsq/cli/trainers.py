"""Trainers from the user's settings, or a line that names the setting that cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system import signals
from lightning_gsq.weights.assignment import scheme_of

SEEDS = range(2**32)
LIMITS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "max_epochs": ("be at least 1, or -1 for no such limit", lambda value: value >= 1 or value == -1),
    "max_steps": ("be at least 1, or -1 for no such limit", lambda value: value >= 1 or value == -1),
    "accumulate_grad_batches": ("be at least 1", lambda value: value >= 1),
    "limit_train_batches": ("be a number of batches, or a share above 0 and up to 1", lambda value: value > 0),
    "gradient_clip_val": ("be positive, or null for no clipping", lambda value: value > 0),
    "log_every_n_steps": ("not be negative (0 logs nothing)", lambda value: value >= 0),
    "num_nodes": ("be at least 1", lambda value: value >= 1),
}
"""What Lightning takes without a word, or refuses without naming the option: what it must do, and whether it does."""

WHOLE = ("limit_val_batches", "fast_dev_run", "overfit_batches")
"""Settings that measure on a part of the text, whose number would be reported as that of the whole."""

WAYS_OUT = {
    "devices": "give a number of devices, a list such as 0,1, or auto",
    "accelerator": "give auto, cpu or gpu",
    "strategy": "give auto, ddp or fsdp2",
    "profiler": "give simple, advanced or pytorch, or leave it out",
    "precision": "leave it out for what this machine is fastest in",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Verifies settings of a Trainer, before one is made.

    Raises:
        ConfigurationError: one is out of range.
    """
    for name, (wanted, fits) in LIMITS.items():
        value = settings.get(name)
        if value is not None and not fits(value):
            raise ConfigurationError(f"trainer.{name} must {wanted}, got {value}")
    for name in WHOLE:
        value = settings.get(name)
        whole = value in (None, False) or (isinstance(value, float) and value in (0.0, 1.0))
        if name == "limit_val_batches":
            whole = value is None or (isinstance(value, float) and value == 1.0)
        if not whole:
            raise ConfigurationError(
                f"trainer.{name}: {str(value).lower()} would measure on a part of the text and report it as all; leave "
                "it out, and use --data.num_validation_sequences and --evaluation.num_windows"
            )
    if settings.get("default_root_dir") == "":
        raise ConfigurationError("trainer.default_root_dir is empty: name the run folder, such as runs/mine")


def check_seed(name: str, seed: int | bool) -> None:
    """Verifies that random numbers can be made from a seed.

    Raises:
        ConfigurationError: it is out of range.
    """
    if isinstance(seed, bool) or seed not in SEEDS:
        raise ConfigurationError(f"{name} must be a number from 0 to {SEEDS[-1]}, got {str(seed).lower()}")


def make_trainer(settings: Mapping[str, Any]) -> Trainer:
    """A Trainer with these settings, which leaves signals to the command.

    Raises:
        ConfigurationError: Lightning refuses them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(**settings)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(_refusal(settings, str(error))) from error
    signals.leave_to_us(trainer)
    return trainer


def _refusal(settings: Mapping[str, Any], reason: str) -> str:
    """Lightning's reason in a line, with the option that it speaks of where it speaks of one."""
    reason = " ".join(reason.split())
    mentioned = [name for name in (*WAYS_OUT, *settings) if f"`{name}" in reason or f"{name}=" in reason]
    if "backend" in reason:
        reason, mentioned = "this machine has no such device", ["accelerator"]
    if not mentioned:
        return f"trainer: {reason}"
    name = mentioned[0]
    way_out = WAYS_OUT.get(name, "fit --help.all says what it takes")
    return f"trainer.{name}={settings.get(name)}: {reason.removesuffix('.')}; {way_out}"


def check_preset(scheme: Namespace) -> None:
    """Verifies that the preset of ``model.scheme`` exists.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        if scheme.preset is not None:
            scheme_of(scheme.preset)
    except ConfigurationError as error:
        raise ConfigurationError(f"model.scheme: {error}") from None


def latest_of_each_class(callbacks: list[Namespace] | None) -> list[Namespace] | None:
    """Callbacks where the last one of a class stands for those before it: one that comes with other settings."""
    if callbacks is None:
        return None
    return list({callback.class_path: callback for callback in callbacks}.values())
