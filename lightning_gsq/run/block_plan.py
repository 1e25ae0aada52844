"""What a run does with each block: which weights it quantizes, and to what."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_gsq.models.chain import check_chain, find_blocks, run_block, trace
from lightning_gsq.models.finite import check_activations
from lightning_gsq.models.linear_weights import LinearSite, find_linear_sites
from lightning_gsq.models.probe import probe_ids
from lightning_gsq.models.shared_weights import refuse_shared
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.scheme import QuantScheme


@dataclass(frozen=True)
class BlockPlan:
    """What is to be done with one block.

    Args:
        index: Its number in the model.
        name: Its name, such as ``model.layers.3``.
        weights: The weights to quantize, in order, with their schemes.
    """

    index: int
    name: str
    weights: dict[LinearSite, QuantScheme]

    @property
    def expected(self) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
        """Scheme and ``(O, I)`` by parameter name: what the block's file has to hold."""
        return {site.name: (scheme, (site.rows, site.in_features)) for site, scheme in self.weights.items()}


def make_plan(model: ModelQuantization) -> list[BlockPlan]:
    """Finds the linear weights of every block and assigns their schemes.

    Raises:
        ConfigurationError: the architecture does not fit, blocks compute something that is not finite or share a
            weight to quantize, a pattern matches nothing, or a range is empty.
    """
    prefix, blocks = find_blocks(model.network)
    traced = trace(model.network, probe_ids(model.network))
    check_activations(model.network, traced)
    check_chain(model.network, traced)
    sites: dict[str, tuple[int, LinearSite]] = {}
    for index in model.selection.indices(len(blocks)):
        run = functools.partial(run_block, blocks[index], traced.inputs_BTD[index], traced.calls[index])
        found = find_linear_sites(blocks[index], run)
        sites |= {f"{prefix}.{index}.{site.name}": (index, site) for site in found}
    schemes = model.selection.schemes({name: site.in_features for name, (_, site) in sites.items()})
    refuse_shared(model.network, schemes)
    plans: dict[int, BlockPlan] = {}
    for name, scheme in schemes.items():
        index, site = sites[name]
        plans.setdefault(index, BlockPlan(index, f"{prefix}.{index}", {})).weights[site] = scheme
    return [plans[index] for index in sorted(plans)]
