"""The routed experts of a block: which matrices belong to which of them, known by how their parameters lie.

Experts are matrices fused in parameters of one module, or modules of a list that are alike. A list whose modules all
see every token is none of experts; only a run of the block shows that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lightning_gsq.models.linear_weights import LinearSite

Part = tuple[str, int]
"""A parameter, and the number of one of its matrices; 0 for a plain weight."""


@dataclass(frozen=True)
class Experts:
    """The experts of one place in a block.

    Args:
        name: The place, such as ``mlp.experts``.
        parts: The matrices of each expert.
        fused: They lie in common parameters rather than in a list of modules.
    """

    name: str
    parts: tuple[tuple[Part, ...], ...]
    fused: bool

    def __len__(self) -> int:
        return len(self.parts)


def find_experts(block: nn.Module, sites: Iterable[LinearSite]) -> list[Experts]:
    """The experts among some weights of a block, in the order of its parameters.

    Args:
        block: The block.
        sites: The weights.
    """
    sites = list(sites)
    return [*_fused(sites), *_listed(block, [site for site in sites if not site.experts])]


def all_take(block: nn.Module, sites: Iterable[LinearSite]) -> list[LinearSite]:
    """Those of some weights that every token takes: no fused experts, and none of a list that may be one of experts."""
    sites = list(sites)
    routed = {name for place in find_experts(block, sites) for parts in place.parts for name, _ in parts}
    return [site for site in sites if site.name not in routed]


def part_of(site: LinearSite, number: int) -> Part:
    """The matrix that a product was with; a plain weight may be used a few rows at a time."""
    return site.name, number if site.experts else 0


def _fused(sites: Iterable[LinearSite]) -> list[Experts]:
    places: dict[tuple[str, int], list[str]] = {}
    for site in sites:
        if site.experts:
            place = site.name.removesuffix(".weight").rpartition(".")[0]
            places.setdefault((place, site.experts), []).append(site.name)
    return [
        Experts(place, tuple(tuple((name, number) for name in names) for number in range(count)), True)
        for (place, count), names in places.items()
    ]


def _listed(block: nn.Module, sites: Iterable[LinearSite]) -> list[Experts]:
    names, found = [site.name for site in sites], list[Experts]()
    for prefix, modules in block.named_modules():
        inside = any(prefix.startswith(f"{other.name}.") for other in found)  # a list that is part of an expert
        if inside or not prefix or not isinstance(modules, nn.ModuleList):
            continue
        stems = [f"{prefix}.{number}." for number in range(len(modules))]
        of_each = [[name for name in names if name.startswith(stem)] for stem in stems]
        kinds = {tuple(name.removeprefix(stem) for name in own) for stem, own in zip(stems, of_each, strict=True)}
        if len(modules) > 1 and len(kinds) == 1 and of_each[0]:
            found.append(Experts(prefix, tuple(tuple((name, 0) for name in own) for own in of_each), False))
    return found
