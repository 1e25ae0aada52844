"""What would make the training of a block fit a device that is too small for it, each option counted like the run."""

from __future__ import annotations

import copy
import dataclasses
import math

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate.block_terms import worst_block
from lightning_gsq.estimate.experts import most_experts, thinner
from lightning_gsq.estimate.quantities import Surroundings, Weights, optimizer_state
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.training import Lion, ModelQuantization

LION = "--model.gumbel.logits_dtype bfloat16 --model.optimizer Lion"
SHORTER = "--data.batch_size 1"


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
    needed = _bytes(model, data, skeleton, plan, around)
    if needed <= room:
        return []
    thrifty, one = _with_lion(model), _one_by_one(data)
    state = dataclasses.replace(around, optimizer_state=optimizer_state(thrifty))
    tried = {
        SHORTER: _bytes(model, one, skeleton, plan, around),
        LION: _bytes(thrifty, data, skeleton, plan, state),
        f"{LION} {SHORTER}": _bytes(thrifty, one, skeleton, plan, state),
    }
    fitting = next((options for options, size in tried.items() if size <= room), None)
    if fitting is not None:
        return [f"with {fitting} the training of the largest block takes {_gb(tried[fitting])} on the device, and fits"]
    least = min(tried, key=lambda options: tried[options])
    lines = [
        f"no option makes the largest block fit: {_gb(needed)}, with {least} {_gb(tried[least])}, on every device, "
        "since further devices share sequences and not weights"
    ]
    count = _devices(thrifty, one, skeleton, plan, state, room, tried[f"{LION} {SHORTER}"])
    if count is not None:
        lines.append(
            f"spread over devices of {_gb(room)}, its experts would need {count} of them with these options; no run "
            "spreads experts yet"
        )
    return lines


def _devices(
    model: ModelQuantization,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    around: Surroundings,
    room: int,
    alone: int,
) -> int | None:
    """Devices over which the experts of every block have to be spread; None if the rest alone is too large.

    What a device holds is a fixed part and one that the experts share, so that two sizes say about where the answer
    is; there it is counted.
    """
    most = max((most_experts(block.module) for block in skeleton.blocks), default=0)
    if most < 2:
        return None
    spread = min(most, 16)
    shared = (alone - _spread_bytes(model, data, skeleton, plan, around, spread)) / (1 - 1 / spread)
    if alone - shared >= room:
        return None
    count = max(2, math.ceil(shared / (room - (alone - shared))) - 1)
    while count <= most:
        if _spread_bytes(model, data, skeleton, plan, around, count) <= room:
            return count
        count += 1
    return None


def _spread_bytes(
    model: ModelQuantization,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    around: Surroundings,
    count: int,
) -> int:
    """What each of so many devices would hold, with its share of the experts."""
    blocks = [
        dataclasses.replace(block, module=thinner(block.module, -(-most_experts(block.module) // count)))
        for block in skeleton.blocks
    ]
    shares = {
        index: {
            (dataclasses.replace(site, experts=-(-site.experts // count)) if site.experts else site): scheme
            for site, scheme in weights.items()
        }
        for index, weights in plan.items()
    }
    return _bytes(model, data, dataclasses.replace(skeleton, blocks=blocks), shares, around)


def _bytes(
    model: ModelQuantization,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    around: Surroundings,
) -> int:
    worst = worst_block(model, data, skeleton, plan, around)
    return max(sum(worst.start.values()), sum(worst.training.values()))


def _with_lion(model: ModelQuantization) -> ModelQuantization:
    changed = copy.copy(model)
    gumbel = dataclasses.replace(model.block.gumbel, logits_dtype="bfloat16")
    changed.block = dataclasses.replace(model.block, gumbel=gumbel, optimizer=lambda groups: Lion(groups, lr=1e-3))
    return changed


def _one_by_one(data: CalibrationDataModule) -> CalibrationDataModule:
    changed = copy.copy(data)
    changed.batch_size = 1
    return changed


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
