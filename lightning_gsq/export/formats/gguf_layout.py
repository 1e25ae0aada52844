"""Where each parameter of a run lies in its GGUF file, and what else that file holds: before and after training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.formats.gguf_storage import source_file
from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.architectures.table import HEADLESS, Architecture, architecture_of
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.layout import (
    EMBEDDINGS,
    HEAD,
    Stored,
    architecture_name,
    matrices_in_file,
    other_in_file,
    places_in_folder,
)
from lightning_gsq.gguf.rows import Place
from lightning_gsq.models.head import head_name
from lightning_gsq.models.norms import norm_names


@dataclass(frozen=True)
class Layout:
    """The places of a run's parameters.

    Args:
        source: The file whose remaining contents are copied; None for a model that comes from a folder.
        architecture: The table's entry for a model that comes from a folder.
        weights: Those of the quantized weights, by parameter.
        others: Those of what is written anew beside them: everything, or what a run from a file trained.
    """

    source: GGUFFile | None
    architecture: Architecture | None
    weights: dict[str, Stored]
    others: dict[str, Stored]

    @property
    def parameters(self) -> dict[str, str]:
        """Parameters by the names of the tensors that hold them."""
        both = [*self.weights.items(), *self.others.items()]
        return {place.name: parameter for parameter, stored in both for place in stored.places}


def layout_of(run: PlannedRun) -> Layout:
    """The layout of a run.

    Raises:
        ConfigurationError: a parameter has no place in such a file.
    """
    source = source_file(run)
    return _in_folder(run) if source is None else _in_file(run, source)


def trained_names(run: PlannedRun) -> list[str]:
    """Parameters beside the quantized ones that a run trained, or is going to."""
    if isinstance(run, FinishedRun):
        return list(run.trained)
    train = (run.settings.get("end_to_end") or {}).get("train") or ()
    if "end_to_end" not in (run.settings.get("phases") or ()):
        return []
    return [
        *(norm_names(run.network) if "norms" in train else []),
        *([head_name(run.network)] if "head" in train else []),
    ]


def _in_folder(run: PlannedRun) -> Layout:
    architecture, head = architecture_of(run.config), head_name(run.network)
    rows = {name: _rows(run.values[name]) for name in [*run.other_names(), *trained_names(run)]}
    weights = {name: weight.site.rows for name, weight in run.weights.items()}
    return Layout(
        None,
        architecture,
        places_in_folder(architecture, run.config, weights, head),
        places_in_folder(architecture, run.config, rows, head),
    )


def _in_file(run: PlannedRun, source: GGUFFile) -> Layout:
    same = run.start_file is None
    matrices = (
        (name, weight.site.to_matrix(run.network.get_parameter(name).detach())) for name, weight in run.weights.items()
    )
    weights = matrices_in_file(source, run.config, matrices, same)
    others = {name: _trained_in_file(run, source, name) for name in trained_names(run)}
    return Layout(source, None, weights, others)


def _trained_in_file(run: PlannedRun, source: GGUFFile, name: str) -> Stored:
    """Where a file holds, or is to hold, a parameter that a run trains."""
    stored = other_in_file(source, run.config, name, run.network.get_parameter(name).detach())
    if stored is not None:
        return stored
    architecture = architecture_name(source)
    if name != head_name(run.network) or architecture in HEADLESS:
        what = "a head of its own" if name == head_name(run.network) else name
        raise ConfigurationError(
            f"format: gguf: a file of the {architecture} architecture has no place for {what}, which the end-to-end "
            "phase trains; leave it out of --model.end_to_end.train, or export to native or dequantized"
        )
    return Stored((Place(HEAD),))


def _rows(value: Tensor) -> int:
    return value.reshape(-1, value.shape[-1]).shape[0] if value.ndim > 1 else len(value)


def with_file(layout: Layout, run: FinishedRun) -> dict[str, Stored]:
    """The places of all parameters whose values a written file has, and the original model has not.

    What is copied from the file that the original model came from has the model's values, but for embeddings, which may
    be stored in another type.
    """
    places = layout.weights | layout.others
    if layout.source is None:
        return places
    for name in run.other_names():
        try:
            stored = None if name in places else other_in_file(layout.source, run.config, name, run.values[name])
        except ConfigurationError:  # a buffer that is computed, and has no name there
            continue
        if stored is not None and (run.start_file is not None or stored.places[0].name in EMBEDDINGS):
            places[name] = stored
    return places
