"""What a run does with each block: which weights it quantizes, and to what."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lightning_gsq.models import left_out
from lightning_gsq.models.chain import find_blocks, run_block
from lightning_gsq.models.classes import outside_line
from lightning_gsq.models.ends import end_names
from lightning_gsq.models.linear_weights import LinearSite, find_all_sites
from lightning_gsq.models.shared_weights import refuse_shared
from lightning_gsq.models.survey import survey
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.scheme import QuantScheme


@dataclass(frozen=True)
class BlockPlan:
    """What is to be done with one block.

    Args:
        index: Its number in the model.
        name: Its name, such as ``model.layers.3``.
        weights: The weights to quantize, in order, with their schemes.
        left_out: Why each of its other matrices stays as it is, by name inside the block.
        held: Which experts this process has of weights whose experts are spread, by name inside the block.
    """

    index: int
    name: str
    weights: dict[LinearSite, QuantScheme]
    left_out: dict[str, str] = field(default_factory=dict, compare=False)
    held: dict[str, range] = field(default_factory=dict)

    @property
    def expected(self) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
        """Scheme and ``(O, I)`` by parameter name: what the block's file has to hold."""
        return {site.name: (scheme, (site.rows, site.in_features)) for site, scheme in self.weights.items()}

    def own(self, held: Mapping[str, range]) -> BlockPlan:
        """What a process does that has these experts of some weights, by name in the block, and all of the others."""
        here = {site.name: held[site.name] for site in self.weights if site.experts and site.name in held}
        weights = {
            replace(site, experts=len(here[site.name])) if site.name in here else site: scheme
            for site, scheme in self.weights.items()
        }
        return replace(self, weights=weights, held=here)


def make_plan(model: ModelQuantization) -> list[BlockPlan]:
    """Finds the linear weights of every block and assigns their schemes.

    Raises:
        ConfigurationError: the architecture does not fit, blocks compute something that is not finite or share a
            weight to quantize, a pattern matches nothing, or a range is empty.
    """
    prefix, blocks = find_blocks(model.network)
    surveyed = survey(model.network)
    sites: dict[str, LinearSite] = {}
    of_block: dict[int, list[LinearSite]] = {}
    for index in model.selection.indices(len(blocks)):
        run = functools.partial(run_block, blocks[index], surveyed.inputs_BTD[index], surveyed.bound_call(index))
        of_block[index] = find_all_sites(blocks[index], run)
        sites |= {f"{prefix}.{index}.{site.name}": site for site in of_block[index]}
    schemes = model.selection.schemes(sites, end_names(model.network))
    refuse_shared(model.network, schemes)
    plans = []
    for index, sites_here in of_block.items():
        name = f"{prefix}.{index}"
        weights = {site: schemes[f"{name}.{site.name}"] for site in sites_here if f"{name}.{site.name}" in schemes}
        if weights:
            left = left_out.reasons(blocks[index], sites_here, {site.name for site in weights})
            plans.append(BlockPlan(index, name, weights, left))
    return plans


def with_schemes(plan: Sequence[BlockPlan], schemes: Mapping[str, QuantScheme]) -> list[BlockPlan]:
    """The plan with other schemes, by full parameter name; those of weights that are not named stay."""
    return [
        replace(
            part, weights={site: schemes.get(f"{part.name}.{site.name}", old) for site, old in part.weights.items()}
        )
        for part in plan
    ]


def not_quantized(model: ModelQuantization, plan: list[BlockPlan]) -> list[str]:
    """A line for each kind of matrix in the planned blocks that stays as it is, and why; one for what is outside of the
    text decoder."""
    _, blocks = find_blocks(model.network)
    left = {
        f"{block.name}.{name}": (reason, blocks[block.index].get_parameter(name).numel())
        for block in plan
        for name, reason in block.left_out.items()
    }
    total = sum(p.numel() for block in plan for p in blocks[block.index].parameters())
    return [*left_out.lines(left, total), *filter(None, [outside_line(model.network)])]
