"""``model.scheme file``: every weight has the type that ``model.warm_start.file`` has for it.

The word becomes a scheme, overrides and patterns to exclude before there is a model, so that recipe, resuming, exports
and tables see a run of named types. The model's configuration says which weights there are, the file's table of tensors
which types they have: no tensor is read.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.estimate import make_skeleton
from lightning_gsq.estimate.assigned import planned_sites
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.models import loading
from lightning_gsq.models.ends import end_names
from lightning_gsq.quantizers import FromFile
from lightning_gsq.quantizers.from_file import start_file
from lightning_gsq.training import settings as of_model
from lightning_gsq.training.selection import Selection
from lightning_gsq.weights.assignment import names_it
from lightning_gsq.weights.presets import GGML, OF_FILE
from lightning_gsq.weights.scheme import QuantScheme

PLAIN_NUMBERS = ("F32", "F16", "BF16")
"""Types of weights that are not quantized in the file: the run leaves them alone too."""


@dataclass(frozen=True)
class FileTypes:
    """What the file has for the weights of a run.

    Args:
        file: The file.
        scheme: Name of the preset that most weights have.
        overrides: Presets of the others by patterns, after them what the user's say.
        exclude: Patterns of weights that the user or the file leaves in full precision.
        parts: Type of each weight that is refined, its weights and its bytes, by name.
        left: Type of each weight that the file has in plain numbers, by name.
    """

    file: Path
    scheme: str
    overrides: dict[str, Any]
    exclude: list[str]
    parts: dict[str, tuple[str, int, int]]
    left: dict[str, str]

    @property
    def options(self) -> dict[str, Any]:
        """The settings of the model that stand for the word."""
        return {"scheme.preset": self.scheme, "overrides": self.overrides, "exclude": self.exclude}


def is_asked_for(scheme: Mapping[str, Any]) -> bool:
    """Whether settings of a scheme name the file's types.

    Raises:
        ConfigurationError: others beside them.
    """
    if str(scheme["preset"]).lower() != OF_FILE:
        return False
    for field in dataclasses.fields(QuantScheme):
        value = scheme[field.name]
        if field.name != "preset" and value != field.default:
            raise ConfigurationError(
                f"model.scheme.{field.name}: {value} and --model.scheme file both say what weights take; leave one out"
            )
    return True


def types_of_file(settings: Mapping[str, Any]) -> FileTypes:
    """Finds out what the file has for every weight that a run quantizes.

    Args:
        settings: Those of the model, plain data.

    Raises:
        ConfigurationError: there is no such file, it is one of another model, or has a weight in a type without codes
            that can be refined; an override names another type than it has.
    """
    start, overrides = FromFile(str(_file(settings))), settings["overrides"]
    selection = Selection(
        QuantScheme(), settings["include"], settings["exclude"], {}, settings["blocks"], settings["fallback"]
    )
    skeleton = _skeleton(settings)
    sites = {name: site for name, (_, site) in planned_sites(skeleton, selection).items()}
    ends = end_names(skeleton.model)
    shapes = {name: (sites[name].rows, sites[name].in_features) for name in selection.schemes(sites, ends)}
    kinds = start.types(shapes)
    pinned = {name for name in kinds if any(names_it(pattern, name) for pattern in overrides)}
    _refuse_others(start, {name: kind for name, kind in kinds.items() if name not in pinned}, ends)
    refined = {name: kind for name, kind in kinds.items() if kind.lower() in GGML}
    if not refined:
        found = ", ".join(dict.fromkeys(kinds.values()))
        raise ConfigurationError(
            f"model.warm_start.file: {start.file.path} has all weights of the run as {found}, without codes to refine; "
            "give a quantized file"
        )
    (usual, _), *_ = Counter(refined.values()).most_common(1)
    # A pinned weight without codes is no exception here: it is refused below, like any that is not what the file has.
    known = {name: usual if name in pinned and name not in refined else kind for name, kind in kinds.items()}
    others = {pattern: kind for pattern, kind in patterns(known, ends).items() if kind != usual}
    presets = {pattern: kind.lower() for pattern, kind in others.items() if kind.lower() in GGML}
    taken = FileTypes(
        start.file.path,
        usual.lower(),
        {**{pattern: preset for pattern, preset in presets.items() if pattern not in overrides}, **overrides},
        [*settings["exclude"], *(pattern for pattern in others if pattern not in presets)],
        {name: _part(kind, *shapes[name]) for name, kind in refined.items()},
        {name: kind for name, kind in known.items() if name not in refined and name not in pinned},
    )
    schemes = {pattern: of_model.override(pattern, value) for pattern, value in taken.overrides.items()}
    scheme = QuantScheme(preset=taken.scheme)
    final = dataclasses.replace(selection, scheme=scheme, exclude=taken.exclude, overrides=schemes)
    start.check({name: (scheme, shapes[name]) for name, scheme in final.schemes(sites, ends).items()})
    return taken


def _file(settings: Mapping[str, Any]) -> Path:
    """The file whose types are asked for.

    Raises:
        ConfigurationError: the settings name none, or a size beside it.
    """
    if settings["size"] is not None:
        raise ConfigurationError(
            f"model.size: {settings['size']} and --model.scheme file both say what matrices take; leave one out"
        )
    file = start_file(settings)
    if file is None:
        start = settings["warm_start"]
        given = "null" if start is None else start["class_path"].rpartition(".")[2]
        raise ConfigurationError(
            "model.scheme: file takes every weight's type from a GGUF file, which --model.warm_start FromFile "
            f"--model.warm_start.file FILE.gguf names; the warm start is {given}. Or name a type, such as q4_k"
        )
    return file


def patterns(values: Mapping[str, str], ends: Collection[str]) -> dict[str, str]:
    """Values by patterns: one for all weights whose names end alike where all have it, else the module's own name.

    Args:
        values: The value of each weight, by its full name.
        ends: Names of the matrices outside of the blocks, which no pattern may mean.
    """
    found: dict[str, set[str]] = {}
    for name, value in values.items():
        found.setdefault(_ending(name), set()).add(value)

    def pattern(name: str) -> str:
        short = f"*.{_ending(name)}"
        alike = len(found[_ending(name)]) == 1 and not any(names_it(short, end, outside=True) for end in ends)
        return short if alike else name.removesuffix(".weight")

    return {pattern(name): value for name, value in values.items()}


def _ending(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _skeleton(settings: Mapping[str, Any]) -> Skeleton:
    address = of_model.Address(
        settings["pretrained"], settings["revision"], settings["trust_remote_code"], settings["dtype"]
    )
    source = address.source(need_weights=False)
    return make_skeleton(source, loading.load_config(source), address.dtype)


def _part(kind: str, rows: int, columns: int) -> tuple[str, int, int]:
    return kind, rows * columns, rows * TYPES[kind].row_bytes(columns)


def _refuse_others(start: FromFile, kinds: Mapping[str, str], ends: Collection[str]) -> None:
    """Refuses types that are neither a preset's nor plain numbers, with the patterns that leave such weights out."""
    known = {name: "" if kind.lower() in GGML or kind in PLAIN_NUMBERS else kind for name, kind in kinds.items()}
    others = {pattern: kind for pattern, kind in patterns(known, ends).items() if kind}
    if others:
        raise ConfigurationError(
            f"model.warm_start.file: {start.file.path} has weights in {', '.join(dict.fromkeys(others.values()))}, "
            f"whose codes cannot be refined; leave them out with --model.exclude '{','.join(others)}'"
        )
