"""The weights of a model that is not loaded, with their schemes."""

from __future__ import annotations

from collections import defaultdict

from lightning_gsq.estimate.quantities import Weights
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.models.ends import end_names
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.models.shared_weights import refuse_shared
from lightning_gsq.training import ModelQuantization
from lightning_gsq.training.selection import Selection


def assigned(model: ModelQuantization, skeleton: Skeleton) -> dict[int, Weights]:
    """The weights of every planned block with their schemes, as ``fit`` assigns them."""
    sites = planned_sites(skeleton, model.selection)
    plan: dict[int, Weights] = defaultdict(dict)
    schemes = model.selection.schemes({name: site for name, (_, site) in sites.items()}, end_names(skeleton.model))
    refuse_shared(skeleton.model, schemes)
    for name, scheme in schemes.items():
        index, site = sites[name]
        plan[index][site] = scheme
    return dict(plan)


def planned_sites(skeleton: Skeleton, selection: Selection) -> dict[str, tuple[int, LinearSite]]:
    """The linear weights of every planned block and its number, by full name; those that are left out as well."""
    return {
        f"{skeleton.prefix}.{index}.{site.name}": (index, site)
        for index in selection.indices(len(skeleton.blocks))
        for site in skeleton.blocks[index].sites
    }
