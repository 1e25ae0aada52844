"""Matrices that take their width together, and what each may take.

The routed experts of a block are chosen for together: fused ones are one matrix as they are, those of a list form a
group of all that have one name (every ``down_proj``), because a runtime stacks them into one tensor. Everything else
chooses for itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_gsq.weights.presets import PlainPreset, plain_preset
from lightning_gsq.weights.scheme import QuantScheme

_MEMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Group:
    """Matrices with one choice.

    Args:
        name: Their name; a star for the number of an expert.
        members: Full parameter names.
        schemes: What they may take, by its name; one alone for those that are pinned.
        pinned: Whether the settings say what they take.
    """

    name: str
    members: tuple[str, ...]
    schemes: Mapping[str, QuantScheme]
    pinned: bool


def group_name(name: str, prefix: str) -> str:
    """The name of the group that a parameter belongs to: the numbers inside of its block are stars.

    Args:
        name: Full parameter name.
        prefix: Name of the list of blocks.
    """
    if not name.startswith(f"{prefix}."):
        return name
    index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{index}.{_MEMBER.sub('.*.', f'.{rest}')[1:]}"


def make_groups(
    pinned: Mapping[str, QuantScheme], free: Mapping[str, Mapping[str, QuantScheme]], prefix: str
) -> list[Group]:
    """The groups of a model's matrices.

    Args:
        pinned: Schemes that the settings give, by parameter name.
        free: What each other matrix may take, by its name and that of the choice.
        prefix: Name of the list of blocks.
    """
    members: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, schemes in free.items():
        members.setdefault((group_name(name, prefix), tuple(schemes)), []).append(name)
    groups = [Group(stem, tuple(names), free[names[0]], False) for (stem, _), names in members.items()]
    return groups + [Group(name, (name,), {scheme_name(scheme): scheme}, True) for name, scheme in pinned.items()]


def scheme_name(scheme: QuantScheme) -> str:
    """The name of a preset, such as ``q4_k`` or ``w3g64``; a description where a scheme has none."""
    if scheme.preset is not None:
        return scheme.preset
    name = PlainPreset(scheme.bits, scheme.group_size, scheme.salient).name
    named_so = plain_preset(name)
    return name if named_so is not None and QuantScheme(*named_so) == scheme else str(scheme)


def named(schemes: Sequence[QuantScheme]) -> dict[str, QuantScheme]:
    """Schemes by their names, each once."""
    return {scheme_name(scheme): scheme for scheme in schemes}
