"""The weights of a model that is not loaded, with their schemes."""

from __future__ import annotations

from collections import defaultdict

from lightning_gsq.estimate.quantities import Weights
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.models.ends import end_names
from lightning_gsq.models.shared_weights import refuse_shared
from lightning_gsq.training import ModelQuantization


def assigned(model: ModelQuantization, skeleton: Skeleton) -> dict[int, Weights]:
    """The weights of every planned block with their schemes, as ``fit`` assigns them."""
    sites = {
        f"{skeleton.prefix}.{index}.{site.name}": (index, site)
        for index in model.selection.indices(len(skeleton.blocks))
        for site in skeleton.blocks[index].sites
    }
    plan: dict[int, Weights] = defaultdict(dict)
    schemes = model.selection.schemes({name: site for name, (_, site) in sites.items()}, end_names(skeleton.model))
    refuse_shared(skeleton.model, schemes)
    for name, scheme in schemes.items():
        index, site = sites[name]
        plan[index][site] = scheme
    return dict(plan)
