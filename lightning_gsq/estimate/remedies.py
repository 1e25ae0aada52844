"""What would make each phase that does not fit fit: options, counted like the run itself, with what it then takes.

The training of a block on a device has more to say, of several devices too: :mod:`lightning_gsq.estimate.advice`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.estimate.advice import LION, SHORTER
from lightning_gsq.estimate.phases import Phase, phases_of
from lightning_gsq.estimate.quantities import Surroundings, Weights, optimizer_state
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.quantizers import RTN, WarmStart
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.training import EndToEndOptions, Lion, ModelQuantization

WITHOUT = "--model.phases init,blocks"


@dataclass(frozen=True)
class Case:
    """A run as it is counted; arguments as of :func:`lightning_gsq.estimate.phases.phases_of`."""

    model: ModelQuantization
    data: CalibrationDataModule
    evaluation: PerplexityData
    activations: ActivationOptions
    end_to_end: EndToEndOptions
    skeleton: Skeleton
    plan: dict[int, Weights]
    around: Surroundings

    def phases(self) -> list[Phase]:
        """Its phases, without what the process takes by itself."""
        return phases_of(
            self.model,
            self.data,
            self.evaluation,
            self.activations,
            self.end_to_end,
            self.skeleton,
            self.plan,
            self.around,
        )


Change = Callable[[Case], Case | None]
"""A case with an option; None where it has that already."""


def _in_files(case: Case) -> Case | None:
    limit = case.activations.memory_limit_gb
    return replace(case, activations=replace(case.activations, memory_limit_gb=0.0)) if limit else None


def _by_block(case: Case) -> Case | None:
    evaluation = copy.copy(case.evaluation)
    evaluation.by_block = True
    return None if case.evaluation.by_block is True else replace(case, evaluation=evaluation)


def _started(case: Case, warm_start: WarmStart) -> Case:
    model = copy.copy(case.model)
    model.start = replace(model.start, warm_start=warm_start)
    return replace(case, model=model)


def _replaceable(case: Case) -> WarmStart | None:
    """The start, if nothing but its rounding would be lost with it."""
    start = case.model.start.warm_start
    return start if start.rule is start else None


def _own_weights(case: Case) -> Case | None:
    start = copy.copy(_replaceable(case))
    if start is None or not case.model.follows:
        return None
    start.following = None
    return _started(case, start)


def _rounded(case: Case) -> Case | None:
    start = _replaceable(case)
    return _started(case, RTN()) if start is not None and start.needs_hessian and not start.diagonal_only else None


def _unweighted(case: Case) -> Case | None:
    start = case.model.start
    if _replaceable(case) is None or not start.watches_inputs:
        return None
    if start.end_loss_weights or start.experts.option is not None:
        return None  # these ask for what it looks at
    return _started(case, RTN(weighted=False))


def _one_by_one(case: Case) -> Case | None:
    data = copy.copy(case.data)
    data.batch_size = 1
    return replace(case, data=data) if case.data.batch_size > 1 else None


def _lion(case: Case) -> Case | None:
    model = copy.copy(case.model)
    if model.block.gumbel.logits_dtype == "bfloat16":
        return None
    gumbel = replace(model.block.gumbel, logits_dtype="bfloat16")
    model.block = replace(model.block, gumbel=gumbel, optimizer=lambda groups: Lion(groups, lr=1e-3))
    return replace(case, model=model, around=replace(case.around, optimizer_state=optimizer_state(model)))


def _recomputed(case: Case) -> Case | None:
    end_to_end = copy.copy(case.end_to_end)
    end_to_end.recompute = True
    return None if case.end_to_end.recompute else replace(case, end_to_end=end_to_end)


def _short_end(case: Case) -> Case | None:
    end_to_end = copy.copy(case.end_to_end)
    end_to_end.passes = replace(end_to_end.passes, batch_size=1)
    return replace(case, end_to_end=end_to_end) if case.end_to_end.passes.batch_size > 1 else None


def _over(devices: int) -> Change:
    def change(case: Case) -> Case | None:
        return replace(case, around=replace(case.around, spread=devices)) if case.around.spread == 1 else None

    return change


SPREAD = [(f"--trainer.strategy fsdp2 --trainer.devices {count}", _over(count)) for count in (2, 4, 8, 16)]
"""Tried of the end-to-end phase beside everything else."""
STARTS: list[tuple[str, Change]] = [
    ("--model.warm_start.follow false", _own_weights),
    ("--model.warm_start RTN", _rounded),
    ("--model.warm_start RTN --model.warm_start.weighted false", _unweighted),
]
"""Each takes the place of the one before."""
FILES = ("--activations.memory_limit_gb 0", _in_files)
OPTIONS: dict[str, list[tuple[str, Change]]] = {
    "perplexity": [("--evaluation.by_block true", _by_block), FILES],
    "gradients of the end loss": [FILES],
    "warm start": [*STARTS, FILES],
    "blocks: warm start": [FILES, *STARTS],
    "blocks: training": [FILES, (SHORTER, _one_by_one), (LION, _lion)],
    "end to end": [("--end_to_end.recompute true", _recomputed), ("--end_to_end.batch_size 1", _short_end)],
}
"""Of each phase, by the beginning of its name, options in the order in which they are tried, then together."""


class Remedies:
    """Says of phases what would make them fit.

    Args:
        case: The run.
        phases: Its phases with what the process takes.
        on_host: The device is the host.
    """

    def __init__(self, case: Case, phases: Sequence[Phase], on_host: bool) -> None:
        self._case, self._phases, self._on_host = case, phases, on_host
        self._own = phases[0].needed(on_host) - case.phases()[0].needed(on_host)

    @functools.cache  # noqa: B019 - lives as long as a plan
    def _changed(self, changes: tuple[Change, ...]) -> list[Phase] | None:
        case = self._case
        for change in changes:
            case = change(case) or case
        return None if case is self._case else case.phases()

    def of(self, phase: Phase, room: int, device: bool) -> str:
        """What makes a phase fit, the end of a sentence; what comes closest where nothing does; empty without any.

        Args:
            phase: One that does not fit.
            room: Bytes there are.
            device: On the device; else on the host.
        """
        if phase.name.startswith("blocks: training") and device:
            return ""  # the lines of `advice` say it
        listed = next((options for name, options in OPTIONS.items() if phase.name.startswith(name)), [])
        tried = [[option] for option in listed]
        tried += [_without_replaced(options) for options in accumulate(tried)][1:]
        if phase.name == "end to end" and device:
            tried += [[*listed, option] for option in SPREAD]
        least: tuple[int, str] | None = None
        index = self._phases.index(phase)
        for options in tried:
            phases = self._changed(tuple(change for _, change in options))
            if phases is None:
                continue
            size, names = _needed(phases[index], self._on_host, device), " ".join(name for name, _ in options)
            size += 0 if device else self._own
            if size <= room:
                return f"; with {names} {_gb(size)}, which fits"
            if size < (least[0] if least else _needed(phase, self._on_host, device)):
                least = size, names
        said = f"; no option makes it fit, with {least[1]} it takes {_gb(least[0])}" if least else "; no option helps"
        if phase.name == "end to end":
            said += f"; {WITHOUT} leaves it out"
        return said


def _without_replaced(options: list[tuple[str, Change]]) -> list[tuple[str, Change]]:
    """Of several starts, the last."""
    starts = [option for option in options if option in STARTS]
    return [option for option in options if option not in starts[:-1]]


def _needed(phase: Phase, on_host: bool, device: bool) -> int:
    """Bytes that a phase takes of the device, or of the host."""
    return phase.total(on_host)[1] if device else phase.needed(on_host)


def memory_problems(case: Case, phases: Sequence[Phase], on_host: bool, host: int, device: int | None) -> list[str]:
    """A line for every phase that takes more than there is, those together that take the same.

    Args:
        case: The run.
        phases: Its phases with what the process takes.
        on_host: The device is the host.
        host: Bytes of the host.
        device: Bytes of the device; None where it is the host, or does not say.
    """
    rooms = {False: host} if device is None else {False: host, True: device}
    too_large = [(phase, own) for own, room in rooms.items() for phase in phases if _needed(phase, on_host, own) > room]
    if not too_large:
        return []
    remedies = Remedies(case, phases, on_host)
    names: dict[tuple[str, str], list[str]] = {}
    for phase, on_device in too_large:
        needed, room = _needed(phase, on_host, on_device), rooms[on_device]
        start = f"{'device' if on_device else 'host'} memory: {_gb(needed)} are needed"
        there = f", {_gb(room)} are {'free' if on_device else 'available'}{remedies.of(phase, room, on_device)}"
        names.setdefault((start, there), []).append(phase.name)
    return [f"{start} ({'; '.join(who)}){there}" for (start, there), who in names.items()]


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
