"""Runs that have not begun."""

from __future__ import annotations

from pathlib import Path

from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.models import loading
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.scheme import QuantScheme


def planned(folder: Path, bits: object = 4, group_size: int = 32, **settings: object) -> PlannedRun:
    """A run over a saved model that has not begun."""
    scheme = settings.pop("scheme", None) or QuantScheme(bits, group_size)  # type: ignore[arg-type]
    model = ModelQuantization(str(folder), scheme, **settings)  # type: ignore[arg-type]
    model.load(loading.resolve(str(folder)))
    return PlannedRun(model, make_plan(model), {})
