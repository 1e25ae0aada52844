"""What would make the training of a block fit a device that is too small for it, each option counted like the run."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, replace

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate.block_terms import worst_block
from lightning_gsq.estimate.experts import most_experts, thinner
from lightning_gsq.estimate.quantities import Surroundings, Weights, optimizer_state
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.training import Lion, ModelQuantization

LION = "--model.gumbel.logits_dtype bfloat16 --model.optimizer Lion"
SHORTER = "--data.batch_size 1"


@dataclass(frozen=True)
class _Case:
    """A run as it is counted.

    Args:
        model: The model's settings.
        data: Calibration text.
        skeleton: The model.
        plan: Weights to quantize of each block.
        around: Surroundings.
    """

    model: ModelQuantization
    data: CalibrationDataModule
    skeleton: Skeleton
    plan: dict[int, Weights]
    around: Surroundings

    @functools.cached_property
    def bytes(self) -> int:
        """Of the largest block, on the device."""
        worst = worst_block(self.model, self.data, self.skeleton, self.plan, self.around)
        return max(sum(worst.start.values()), sum(worst.training.values()))

    def one_by_one(self) -> _Case:
        """With a sequence a step."""
        data = copy.copy(self.data)
        data.batch_size = 1
        return replace(self, data=data)

    def with_lion(self) -> _Case:
        """With bfloat16 logits and Lion."""
        model = copy.copy(self.model)
        gumbel = replace(model.block.gumbel, logits_dtype="bfloat16")
        model.block = replace(model.block, gumbel=gumbel, optimizer=lambda groups: Lion(groups, lr=1e-3))
        return replace(self, model=model, around=replace(self.around, optimizer_state=optimizer_state(model)))

    def spread(self, count: int) -> _Case:
        """What each of so many devices would hold, with its share of the experts."""
        blocks = [
            replace(block, module=thinner(block.module, -(-most_experts(block.module) // count)))
            for block in self.skeleton.blocks
        ]
        shares = {
            index: {
                (replace(site, experts=-(-site.experts // count)) if site.experts else site): scheme
                for site, scheme in weights.items()
            }
            for index, weights in self.plan.items()
        }
        return replace(self, skeleton=replace(self.skeleton, blocks=blocks), plan=shares)


def device_advice(
    model: ModelQuantization,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    around: Surroundings,
    room: int,
) -> list[str]:
    """Lines on what would bring the largest block within the room of one device, and how many devices its experts
    would need if they were spread.

    Args:
        model: The model's settings.
        data: Calibration text.
        skeleton: The model.
        plan: Weights to quantize of each block.
        around: Surroundings.
        room: Bytes of a device.
    """
    case = _Case(model, data, skeleton, plan, around)
    if case.bytes <= room:
        return []
    smallest = case.with_lion().one_by_one()
    tried = {SHORTER: case.one_by_one(), LION: case.with_lion(), f"{LION} {SHORTER}": smallest}
    sizes = {options: changed.bytes for options, changed in tried.items()}
    fitting = next((options for options, size in sizes.items() if size <= room), None)
    if fitting is not None:
        return [f"with {fitting} the training of the largest block takes {_gb(sizes[fitting])} on the device, and fits"]
    least = min(sizes, key=lambda options: sizes[options])
    lines = [
        f"no option makes the largest block fit: {_gb(case.bytes)}, with {least} {_gb(sizes[least])}, on every device, "
        "since further devices share sequences and not weights"
    ]
    count = _devices(smallest, room)
    if count is not None:
        lines.append(
            f"spread over devices of {_gb(room)}, its experts would need {count} of them with these options; no run "
            "spreads experts yet"
        )
    return lines


def _devices(case: _Case, room: int) -> int | None:
    """Devices over which the experts of every block have to be spread; None if the rest alone is too large.

    What a device holds is a fixed part and one that the experts share, so that two sizes say about where the answer
    is; there it is counted.
    """
    most = max((most_experts(block.module) for block in case.skeleton.blocks), default=0)
    if most < 2:
        return None
    spread = min(most, 16)
    shared = (case.bytes - case.spread(spread).bytes) / (1 - 1 / spread)
    if case.bytes - shared >= room:
        return None
    count = max(2, math.ceil(shared / (room - (case.bytes - shared))) - 1)
    while count <= most:
        if case.spread(count).bytes <= room:
            return count
        count += 1
    return None


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
