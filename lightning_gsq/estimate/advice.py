"""What would make the training of a block fit a device that is too small for it, each option counted like the run."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, replace

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate.block_terms import worst_block
from lightning_gsq.estimate.experts import most_experts
from lightning_gsq.estimate.quantities import Surroundings, Weights, optimizer_state
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.training import Lion, ModelQuantization

LION = "--model.gumbel.logits_dtype bfloat16 --model.optimizer Lion"
SHORTER = "--data.batch_size 1"
SPREAD = "--model.expert_parallel true"


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
        """Of the training of the largest block, on the device; another start is another phase's remedy."""
        worst = worst_block(self.model, self.data, self.skeleton, self.plan, self.around)
        return sum(worst.training.values())

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

    def spread(self, devices: int) -> _Case:
        """With the experts of a block spread over so many devices."""
        return replace(self, around=replace(self.around, experts_over=devices))

    @property
    def most_experts(self) -> int:
        """Experts of the largest module of fused experts."""
        return max((most_experts(block.module) for block in self.skeleton.blocks), default=0)


def device_advice(
    model: ModelQuantization,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    around: Surroundings,
    room: int,
    devices: int = 1,
) -> list[str]:
    """Lines on what would bring the largest block within the room of one device: options, and experts that are spread.

    Args:
        model: The model's settings.
        data: Calibration text.
        skeleton: The model.
        plan: Weights to quantize of each block.
        around: Surroundings.
        room: Bytes of a device.
        devices: How many the run has.
    """
    case = _Case(model, data, skeleton, plan, around)
    if case.bytes <= room:
        return []
    spread = around.experts_over > 1
    tried = _with_options(case)
    if not spread and 1 < devices <= case.most_experts:
        over = case.spread(devices)
        tried |= {SPREAD: over} | {f"{SPREAD} {options}": changed for options, changed in _with_options(over).items()}
    fitting = next((options for options, changed in tried.items() if changed.bytes <= room), None)
    if fitting is not None:
        size = _gb(tried[fitting].bytes)
        return [f"with {fitting} the training of the largest block takes {size} on the device, and fits"]
    line = f"no option makes the largest block fit: {_gb(case.bytes)}"
    least = min(tried, key=lambda options: tried[options].bytes, default="")
    if least:
        line += f", with {least} {_gb(tried[least].bytes)}"
    if SPREAD in least:
        line += f", on each of {devices} devices"
    elif not spread:
        line += ", on every device, since further devices share sequences and not weights"
    smallest = [*_with_options(case).items()][-1:] or [("", case)]
    return [line, *(said for options, changed in smallest if (said := _over_more(options, changed, room)))]


def _over_more(options: str, case: _Case, room: int) -> str:
    """How many devices the experts of a case need; empty where no number is enough."""
    count = _devices(case, room)
    if count is None:
        return ""
    options = f"{options} {SPREAD} and --trainer.devices {count}".strip()
    return f"with {options} it takes {_gb(case.spread(count).bytes)} on each of {count} devices, and fits"


def _with_options(case: _Case) -> dict[str, _Case]:
    """A case with what options change of it, by those options; the last has all of them. None that it has already."""
    changes = {}
    if case.data.batch_size > 1:
        changes[SHORTER] = case.one_by_one()
    if case.model.block.gumbel.logits_dtype != "bfloat16":
        changes[LION] = case.with_lion()
    if len(changes) == 2:
        changes[f"{LION} {SHORTER}"] = case.with_lion().one_by_one()
    return changes


def _devices(case: _Case, room: int) -> int | None:
    """Devices over which the experts of every block have to be spread; None if the rest alone is too large.

    What a device holds is a fixed part and one that the experts share, so that two sizes say about where the answer
    is; there it is counted, with the tokens of the other devices, which grow with their number.
    """
    most = case.most_experts
    if most < 2:
        return None
    some = min(most, 16)
    shared = (case.bytes - case.spread(some).bytes) / (1 - 1 / some)
    if case.bytes - shared >= room:
        return None
    count = max(2, math.ceil(shared / (room - (case.bytes - shared))) - 1)
    size = case.bytes
    while count <= most:
        before, size = size, case.spread(count).bytes
        if size <= room:
            return count
        if size >= before:
            return None
        count += 1
    return None


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
