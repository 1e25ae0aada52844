"""Which of a block's weights are better trained, measured on held-out sequences; the others go back to their start.

A block whose held-out error fell is kept, and of its routed experts those whose own output is no further off than with
their start. A block whose error rose goes back to its start, but for the matrices and experts with which it is better.
What is decided for experts one by one has to hold for the block: if its held-out error says otherwise, only the clearer
half of them is decided so, and so on.

An expert that few tokens reach hardly shows in the error of the block. So this may rise by :data:`TOLERANCE` where such
experts go back to a start that is better by their own output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_gsq.models.expert_parallel import in_step
from lightning_gsq.models.experts import Experts, Part, find_experts
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.run.expert_outputs import Batches, OutputErrors, output_errors
from lightning_gsq.run.run import Run
from lightning_gsq.training import BlockQuantization
from lightning_gsq.training.losses import refuse_non_finite

TOLERANCE = 1e-3
NOTHING_SPREAD: Mapping[str, range] = MappingProxyType({})


@dataclass(frozen=True)
class Accepted:
    """What became of a block.

    Args:
        trained: Which matrices of each weight stay trained, by name: bool ``E``, or one for a plain weight.
        measures: Held-out errors ``start``, ``trained`` and ``final``.
        experts: By place: ``held_out_tokens`` that reached each expert, and the numbers of those that ``kept_start``.
    """

    trained: dict[str, Tensor]
    measures: dict[str, float]
    experts: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    @property
    def plain_at_start(self) -> list[str]:
        """Weights without experts that keep their start."""
        return [name for name, part in self.trained.items() if len(part) == 1 and not bool(part)]

    def line(self, name: str) -> str | None:
        """What to tell of the block of that name; None where all of it stays trained."""
        start, trained, final = (self.measures[key] for key in ("start", "trained", "final"))
        some = any(bool(part.any()) for part in self.trained.values())
        experts = [_listed(place, of["kept_start"]) for place, of in self.experts.items() if of["kept_start"]]
        if trained <= start:
            what = f"{name}: {'; '.join(experts)} went back to the start, by the held-out tokens that reach each"
            return f"{what} (the block's error {trained:.4g}, then {final:.4g})" if experts else None
        rose = f"{name}: training raised the held-out error from {start:.4g} to {trained:.4g}"
        if not some:
            return f"{rose}; the block keeps its warm start"
        stay = [name for name, part in self.trained.items() if len(part) == 1 and bool(part)]
        counts = [
            f"{len(of['held_out_tokens']) - len(of['kept_start'])} of {place}" for place, of in self.experts.items()
        ]
        return f"{rose}; with {', '.join([*stay, *counts])} trained and the rest as at the start it is {final:.4g}"


def _listed(place: str, numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8])
    return f"{len(numbers)} of {place} ({shown}{', …' if len(numbers) > 8 else ''})"


@torch.no_grad()
def accept(
    run: Run, module: BlockQuantization, batches: Batches, held: Mapping[str, range] = NOTHING_SPREAD
) -> Accepted:
    """Decides which weights of a trained block stay.

    Args:
        run: The run.
        module: The block, trained.
        batches: Held-out batches, as the block's loss takes them.
        held: The matrices that this process has of each weight that is spread over processes, by name.

    Raises:
        NonFiniteLossError: the error of the start is NaN or infinite.
    """
    dense = _Dense(module, held)
    start, trained = (error_of(run, module, batches, weights) for weights in (dense.start, dense.trained))
    refuse_non_finite(
        start,
        f"the held-out error of the warm start of {module.name}",
        "its weights, or the hidden states that enter it, are not finite: see --model.dtype, --model.scale_dtype and "
        "--activations.dtype",
    )
    fell = trained <= start
    # All processes decide alike, about the experts of all of them.
    sites = [_whole(run, site) if site.name in held else site for site in module.sites]
    chosen = {site.name: torch.full((max(site.experts, 1),), fell) for site in sites}
    final, routed = trained if fell else start, list[tuple[Experts, OutputErrors]]()
    places = find_experts(module.block, sites)
    if places:
        others = dense.trained if fell else dense.start
        errors = output_errors(run, module, places, batches, dense.start, dense.trained, others, held)
        routed = [(experts, own) for experts, own in zip(places, errors, strict=True) if own.routed]

    def attempt(changes: Iterable[Part]) -> float:
        return error_of(run, module, batches, dense.blended(_with(chosen, changes, not fell)))

    if not fell:
        of_experts = {name for experts, _ in routed for parts in experts.parts for name, _ in parts}
        for name in [site.name for site in module.sites if site.name not in of_experts]:
            parts = [(name, number) for number in range(len(chosen[name]))]
            error = attempt(parts)
            if error < final:
                chosen, final = _with(chosen, parts, True), error
    unseen, seen = _to_change(routed, fell)
    chosen = _with(chosen, unseen, not fell)  # no held-out token notices
    limit = final * (1 + TOLERANCE) if fell else final
    while seen:
        changes = [part for parts in seen for part in parts]
        error = attempt(changes)
        if error <= limit:
            chosen, final = _with(chosen, changes, not fell), error
            break
        seen = seen[: len(seen) // 2]
    return Accepted(chosen, {"start": start, "trained": trained, "final": final}, _of_places(routed, chosen))


def error_of(run: Run, module: BlockQuantization, batches: Batches, weights: dict[str, Tensor]) -> float:
    """Relative squared error of the block on held-out sequences, over all processes.

    Args:
        run: The run.
        module: The block.
        batches: The sequences.
        weights: Dense weights to use, by name.
    """
    total, count = 0.0, 0
    with torch.no_grad(), run.precision(), in_step(module.block, len(batches), weights):
        for batch in batches:
            tensors = tuple(tensor.to(run.device) for tensor in batch)
            total += float(module.loss(tensors, weights)) * len(tensors[0])
            count += len(tensors[0])
    total, count = run.ranks.sum(torch.tensor([total, count], dtype=torch.float64, device=run.device)).tolist()
    return float(total / count)


class _Dense:
    """The dense weights of a block, as it started and as it is trained."""

    def __init__(self, module: BlockQuantization, held: Mapping[str, range]) -> None:
        self.sites, self.held = module.sites, held
        self.start, self.trained = module.start_weights(), module.hard_weights()

    def blended(self, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained where ``chosen`` is true, as at the start elsewhere."""
        weights = {}
        for site in self.sites:
            name, trained_E = site.name, own_part(chosen[site.name], self.held.get(site.name))
            if bool(trained_E.all()) or not bool(trained_E.any()):
                weights[name] = (self.trained if bool(trained_E.all()) else self.start)[name]
                continue
            start_OI, trained_OI = site.to_matrix(self.start[name]), site.to_matrix(self.trained[name])
            rows_O1 = rows_of(site, trained_E).to(start_OI.device)[:, None]
            weights[name] = site.from_matrix(torch.where(rows_O1, trained_OI, start_OI))
        return weights


def own_part(trained_E: Tensor, held: range | None) -> Tensor:
    """Of what holds for each matrix of a weight, this process's part; ``held`` is None for one that is not spread."""
    return trained_E if held is None else trained_E[held.start : held.stop]


def _whole(run: Run, site: LinearSite) -> LinearSite:
    """A spread weight with the experts of all processes."""
    count = run.ranks.sum(torch.tensor([site.experts], dtype=torch.float64, device=run.device))
    return replace(site, experts=int(count))


def rows_of(site: LinearSite, trained_E: Tensor) -> Tensor:
    """What holds for each matrix of a weight, for each of its rows: ``E`` to ``E * O``."""
    return trained_E.repeat_interleave(site.out_features)


def _with(chosen: Mapping[str, Tensor], parts: Iterable[Part], trained: bool) -> dict[str, Tensor]:
    changed = {name: trained_E.clone() for name, trained_E in chosen.items()}
    for name, number in parts:
        changed[name][number] = trained
    return changed


def _to_change(routed: Sequence[tuple[Experts, OutputErrors]], fell: bool) -> tuple[list[Part], list[tuple[Part, ...]]]:
    """Experts for which something else is right than for their block.

    Returns:
        The matrices of experts that no held-out token reached: nothing says that training made them better. And those
        of experts whose own output says so, the clearest first.
    """
    unseen: list[Part] = []
    seen: list[tuple[float, tuple[Part, ...]]] = []
    for experts, errors in routed:
        for number, parts in enumerate(experts.parts):
            start, trained = float(errors.start_E[number]), float(errors.trained_E[number])
            if not int(errors.tokens_E[number]):
                unseen += parts if fell else ()
            elif trained > start if fell else trained < start:
                worse, better = max(start, trained), min(start, trained)
                seen.append((better / worse, parts))
    return unseen, [parts for _, parts in sorted(seen, key=lambda pair: pair[0])]


def _of_places(
    routed: Sequence[tuple[Experts, OutputErrors]], chosen: Mapping[str, Tensor]
) -> dict[str, dict[str, list[int]]]:
    return {
        experts.name: {
            "held_out_tokens": errors.tokens_E.tolist(),
            "kept_start": [i for i, ((name, part), *_) in enumerate(experts.parts) if not bool(chosen[name][part])],
        }
        for experts, errors in routed
    }
