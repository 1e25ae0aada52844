"""What a size is divided among: every matrix, what it may take, and what that costs in the file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import PlannedRun
from lightning_gsq.export.contract import ExportFormat, FileSizes
from lightning_gsq.export.registry import all_formats
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.ends import end_names
from lightning_gsq.run.block_plan import BlockPlan, with_schemes
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.assignment import fit_rows, scheme_of
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.widths import Choice, Group, make_groups
from lightning_gsq.widths.groups import named, scheme_name
from lightning_gsq.widths.size import SLACK

DEFAULT_CHOICES = {
    "gguf": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"),
    "native": ("w2g64", "w3g64", "w3g32", "w4g64", "w4g32", "w5g64", "w6g64", "w8g64"),
}
"""Of the formats whose files are counted."""
Free = dict[str, dict[str, QuantScheme]]
"""What each matrix may take that is not pinned, by its full name and that of the choice."""


@dataclass(frozen=True)
class Menu:
    """What a size is divided among.

    Args:
        model: The model; its matrices have the smallest choices for now.
        plan: Their plan.
        runtime: The format whose file counts.
        file: The sizes of that file.
        groups: Matrices that choose together.
        limit: Bytes that the file may have.
        notes: Lines about pinned matrices that the file holds otherwise than they are pinned.
    """

    model: ModelQuantization
    plan: list[BlockPlan]
    runtime: ExportFormat
    file: FileSizes
    groups: list[Group]
    limit: int
    notes: tuple[str, ...]

    def schemes(self, options: Mapping[str, str]) -> dict[str, QuantScheme]:
        """The scheme of every matrix, by the option of its group."""
        return {name: group.schemes[options[group.name]] for group in self.groups for name in group.members}

    def sizes(self, group: Group) -> dict[str, int]:
        """Bytes of each option of a group."""
        return {
            choice: sum(self.file.weight(name, scheme) for name in group.members)
            for choice, scheme in group.schemes.items()
        }

    def extreme(self, largest: bool = False) -> dict[str, str]:
        """The smallest option of every group, or the largest."""
        best = max if largest else min
        return {group.name: best(self.sizes(group).items(), key=lambda item: item[1])[0] for group in self.groups}

    def parts(self, choice: Choice) -> dict[str, tuple[str, int, int]]:
        """What each matrix takes, its weights and its bytes, by name."""
        return {
            name: (scheme_name(scheme), self.weights[name], self.file.weight(name, scheme))
            for name, scheme in self.schemes(self.options(choice.widths)).items()
        }

    def options(self, widths: Mapping[str, str]) -> dict[str, str]:
        """The option of every group, given what matrices take that have a choice, by their names."""
        return {
            group.name: next(iter(group.schemes)) if group.pinned else widths[group.members[0]] for group in self.groups
        }

    @property
    def free(self) -> Free:
        """What there is to choose."""
        return {name: dict(group.schemes) for group in self.groups if not group.pinned for name in group.members}

    def widest_for_all(self) -> tuple[dict[str, str], int]:
        """The option of every group if all take the same step up from their smallest, as far as it fits; its bytes."""
        ordered = {group.name: sorted(self.sizes(group), key=self.sizes(group).__getitem__) for group in self.groups}
        best = self.extreme(), self.file.total(self.schemes(self.extreme()))
        for step in range(1, max(map(len, ordered.values()))):
            options = {name: steps[min(step, len(steps) - 1)] for name, steps in ordered.items()}
            total = self.file.total(self.schemes(options))
            if best[1] < total <= self.limit:
                best = options, total
        return best

    @property
    def widest_plan(self) -> list[BlockPlan]:
        """The plan with the largest option of every group."""
        return with_schemes(self.plan, self.schemes(self.extreme(largest=True)))

    @property
    def weights(self) -> dict[str, int]:
        """How many weights each matrix has."""
        return {name: self.model.network.get_parameter(name).numel() for g in self.groups for name in g.members}

    def widths(self, options: Mapping[str, str]) -> dict[str, str]:
        """What matrices take that have a choice, by their names in the model's order."""
        return {name: options[g.name] for g in self.groups if not g.pinned for name in g.members}


def make_menu(
    model: ModelQuantization, plan: list[BlockPlan], formats: Sequence[ExportFormat], settings: Mapping[str, Any]
) -> Menu:
    """Finds out what there is to choose, and refuses a size that cannot be.

    Args:
        model: The model, loaded, with a size.
        plan: Its plan without a choice.
        formats: Those that the run will be exported to.
        settings: The run's settings of the model, as plain data.

    Returns:
        The menu. The model has its smallest choices now.

    Raises:
        ConfigurationError: the size is below the least or above the most that the choices reach, the format has none of
            them, or a pin leaves too little.
    """
    menu = offered(model, plan, formats, settings)
    _refuse(menu)
    model.take(menu.widths(menu.extreme()), mixture_name(model))
    return replace(menu, plan=with_schemes(plan, menu.schemes(menu.extreme())))


def offered(
    model: ModelQuantization, plan: list[BlockPlan], formats: Sequence[ExportFormat], settings: Mapping[str, Any]
) -> Menu:
    """The same menu for any size, possible or not; see :func:`make_menu`."""
    assert model.size is not None
    runtime = _runtime(formats)
    choices = [scheme_of(name) for name in _choices(model, runtime)]
    pinned, columns = _pins(model, plan)
    fused = (f"{block.name}.{site.name}" for block in plan for site in block.weights if site.experts)
    plain_alone = {*end_names(model.network), *fused}
    free = {
        name: _options(model, runtime, choices, name, columns[name], plain_alone)
        for name in columns
        if name not in pinned
    }
    if not free:
        raise ConfigurationError("model.size: every matrix is pinned, nothing is left to choose; leave out the size")
    groups = make_groups(pinned, free, find_blocks(model.network)[0])
    model.take({name: next(iter(options)) for name, options in free.items()})
    start = with_schemes(plan, {name: next(iter(options.values())) for name, options in free.items()})
    parameters = sum(p.numel() for p in model.network.parameters())
    planned = runtime.view(PlannedRun(model, start, settings))
    sizes = runtime.sizes(planned)
    assert sizes is not None
    limit, notes = model.size.size.num_bytes(parameters), _notes(runtime, pinned, columns)
    return Menu(model, start, runtime, sizes, groups, limit, notes)


def _choices(model: ModelQuantization, runtime: ExportFormat) -> Sequence[str]:
    """Names of the presets that are chosen among."""
    assert model.size is not None
    return model.size.choices or DEFAULT_CHOICES[runtime.name]


def _runtime(formats: Sequence[ExportFormat]) -> ExportFormat:
    """The format whose file counts."""
    if not formats:
        return all_formats()["native"]
    for format_ in formats:
        if format_.name in DEFAULT_CHOICES:
            return format_
    raise ConfigurationError(
        f"model.size counts the bytes of a gguf or a native file, and --export names "
        f"{', '.join(format_.name for format_ in formats)}; add one of the two"
    )


def _pins(model: ModelQuantization, plan: list[BlockPlan]) -> tuple[dict[str, QuantScheme], dict[str, int]]:
    """Schemes that the settings give, and the columns of every matrix, by name; what stays as it is, is in neither."""
    pinned, columns = {}, {}
    network, selection = model.network, model.selection
    given = model.outer.expected(network)
    for name in end_names(network):
        if model.outer.stays(network, name) and name not in given:
            continue
        columns[name] = network.get_parameter(name).shape[1]
        if name in given:
            pinned[name] = given[name][0]
    for block in plan:
        for site, scheme in block.weights.items():
            name = f"{block.name}.{site.name}"
            columns[name] = site.in_features
            if selection.pins(name):
                pinned[name] = scheme
    return pinned, columns


def _notes(runtime: ExportFormat, pinned: Mapping[str, QuantScheme], columns: Mapping[str, int]) -> tuple[str, ...]:
    """Says of pins what refuses a choice: a pin is a wish, which stays; its bytes are those that the file holds."""
    told: dict[str, list[str]] = {}
    for name, scheme in pinned.items():
        reason = runtime.why_no_choice(scheme, columns[name])
        if reason is not None:
            told.setdefault(reason, []).append(name)
    return tuple(
        f"{reason}. {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} stay as pinned, and count in "
        "the size as they are held"
        for reason, names in told.items()
    )


def _options(
    model: ModelQuantization,
    runtime: ExportFormat,
    choices: Sequence[QuantScheme],
    name: str,
    columns: int,
    plain_alone: Collection[str],
) -> dict[str, QuantScheme]:
    """What a matrix may take, by its name; where a type does not hold its rows, what presets take instead."""
    if name in plain_alone:
        choices = [choice for choice in choices if not choice.mixed]
        if not choices:
            raise ConfigurationError(
                f"model.choices: salient columns are for plain matrices in the blocks, and {name} is none; add a "
                "preset without them, such as w4g64"
            )
    fitting = [fit_rows({name: choice}, {name: columns}, model.selection.fallback)[name] for choice in choices]
    for scheme in fitting:
        reason = runtime.why_no_choice(scheme, columns)
        if reason is not None:
            raise ConfigurationError(
                f"model.choices: {reason}. That is of {name}; --model.overrides gives a matrix what it has alone"
            )
    return named(fitting)


def _refuse(menu: Menu) -> None:
    """Refuses a size below the least or above the most that there is."""
    assert menu.model.size is not None
    asked, names = menu.model.size.size.text, ", ".join(_choices(menu.model, menu.runtime))
    least = menu.file.total(menu.schemes(menu.extreme()))
    most = menu.file.total(menu.schemes(menu.extreme(largest=True)))
    if most < (1 - SLACK) * menu.limit:
        raise ConfigurationError(
            f"model.size: {asked} are {menu.limit:,} bytes, and the widest of {names} fill {most:,} of them; give at "
            f"most {_megabytes(most)}, or a wider choice"
        )
    if least <= menu.limit:
        return
    pins = {group.name: menu.sizes(group) for group in menu.groups if group.pinned}
    taken = sum(sum(sizes.values()) for sizes in pins.values())
    said = f"model.size: {asked} are {menu.limit:,} bytes, and the narrowest of {names} take {least:,}"
    if pins:
        held = "".join(f"; {note}" for note in menu.notes)
        largest = max(pins, key=lambda name: sum(pins[name].values()))
        raise ConfigurationError(
            f"{said}, {taken:,} of them for {len(pins)} pinned matrices, such as {largest} "
            f"({', '.join(pins[largest])}); give at least {_megabytes(least)}, or pin less with --model.overrides, "
            f"--model.embedding and --model.head{held}"
        )
    raise ConfigurationError(f"{said}; give at least {_megabytes(least)}, or a narrower choice")


def _megabytes(count: int) -> str:
    """A size that has room for so many bytes."""
    unit, name = (1e3, "kB") if count < 1e6 else (1e6, "MB")
    return f"{math.ceil(100 * count / unit) / 100:.2f}{name}"


def mixture_name(model: ModelQuantization) -> str:
    """What the widths of a model with a size are called."""
    assert model.size is not None
    return f"mixed widths within {model.size.size.text}"
