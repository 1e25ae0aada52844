"""Puts the parts of a plan together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.estimate import limits, problems
from lightning_gsq.estimate.advice import device_advice
from lightning_gsq.estimate.assigned import assigned
from lightning_gsq.estimate.end_to_end_probe import EndToEndWork, end_to_end_work
from lightning_gsq.estimate.perplexity_terms import by_block
from lightning_gsq.estimate.phases import Phase
from lightning_gsq.estimate.probe import Timing, probe
from lightning_gsq.estimate.quantities import (
    Weights,
    ledger_of,
    num_streams,
    outer_ledgers,
    stream_bytes,
    window_bytes,
)
from lightning_gsq.estimate.remedies import Case, memory_problems
from lightning_gsq.estimate.skeleton import Skeleton, make_skeleton
from lightning_gsq.estimate.surroundings import surroundings
from lightning_gsq.estimate.width_probe import Schemes, width_seconds
from lightning_gsq.models import loading
from lightning_gsq.models.chain import compiled_run_block, run_block
from lightning_gsq.models.computed_weights import computed_bytes, short_of_memory
from lightning_gsq.models.dequantizing import method_of
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.run.experts import check_spread
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.system.compiling import compiler_available
from lightning_gsq.system.memory import release
from lightning_gsq.system.shards import SHARD_SIZE
from lightning_gsq.training import EndToEndOptions, ModelQuantization
from lightning_gsq.weights.quantized import BitsLedger
from lightning_gsq.weights.scheme import QuantScheme

SPARE_DISK = 50_000_000
"""Room for the recipe, TensorBoard events and the summary."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Args:
        skeleton: The model.
        plan: Weights to quantize of each block, by its number.
        ledgers: Bits of the weights of each scheme.
        outer: Scheme and bits of a quantized embedding and head, by name.
        phases: Memory.
        on_host: The device is the host.
        streams: Bytes of the hidden states of the blocks phase.
        mapped: They live in memory-mapped files.
        windows: Bytes of the hidden states of the evaluation windows, where they live in such files too.
        run_folder: Bytes the run folder takes, by what they are.
        steps: Optimizer steps a block.
        timing: Seconds of one block's parts; None without a probe.
        end_to_end: What the end-to-end phase takes; None without a probe or that phase.
        seconds: Seconds in all, without measuring perplexity; None without a probe.
        probed: Why there was no probe; empty if there was one.
        choosing: Seconds of choosing the widths of a size, which are not among ``seconds``; None without one, or where
            they are not known.
        choosing_unknown: Why they are not known; empty if they are, or without a size.
        problems: What does not fit.
    """

    skeleton: Skeleton
    plan: dict[int, Weights]
    ledgers: dict[QuantScheme, BitsLedger]
    outer: dict[str, tuple[QuantScheme, BitsLedger]]
    phases: list[Phase]
    on_host: bool
    streams: int
    mapped: bool
    windows: int
    run_folder: dict[str, int]
    steps: int
    timing: Timing | None
    end_to_end: EndToEndWork | None
    seconds: float | None
    probed: str
    choosing: float | None
    choosing_unknown: str
    problems: list[str]

    @property
    def peak(self) -> tuple[int, int]:
        """The most that any phase takes, on the host and on the device."""
        totals = [phase.total(self.on_host) for phase in self.phases]
        return max(host for host, _ in totals), max(device for _, device in totals)


def estimate(
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
    activations: ActivationOptions,
    end_to_end: EndToEndOptions,
    trainer: Trainer,
    with_probe: bool = True,
    host_memory: float | None = None,
    device_memory: float | None = None,
    choices: Mapping[str, Schemes] = {},
) -> Estimate:
    """Plans the run that ``fit`` would do with these settings; loads no weight and reads no text.

    Args:
        model: The model, not loaded, and its settings.
        data: Calibration text.
        evaluation: Text for perplexity.
        activations: How hidden states are kept.
        end_to_end: The end-to-end phase.
        trainer: A Trainer with the user's settings.
        with_probe: Measure one block's steps.
        host_memory: Bytes of another machine's host; None for this one's.
        device_memory: Bytes of another machine's accelerator; None for what this one has.
        choices: What each matrix may take that is not pinned where a size is given, by its name and that of the choice;
            empty without one.

    Raises:
        ConfigurationError: the model cannot be quantized, a pattern matches nothing, or a range is empty.
    """
    source = model.address.source(need_weights=False)
    config = loading.load_config(source)
    loading.check_headers(source, config)
    skeleton = make_skeleton(source, config, model.address.dtype)
    plan = assigned(model, skeleton)
    check_spread(model, skeleton.model, plan, trainer)
    # What this process takes already is part of the plan's baseline.
    host_room = limits.host_bytes() + limits.own_bytes() if host_memory is None else int(host_memory)
    size = skeleton.parameters * skeleton.dtype.itemsize
    computed = computed_bytes(source, skeleton.model, method_of(config) is not None)
    in_files = computed > 0 and short_of_memory(size, host_room)
    around = surroundings(model, end_to_end, trainer, source, computed == 0 or in_files, device_memory)
    most = max(map(len, choices.values()), default=0)
    around = replace(around, host_room=host_room, output_dtype=model.storage.output_dtype, choices=most)
    case = Case(model, data, evaluation, activations, end_to_end, skeleton, plan, around)
    phases = case.phases()
    scale_dtype = model.storage.scale_dtype
    ledgers = {scheme: ledger_of(items, scale_dtype) for scheme, items in _by_scheme(plan).items()}
    outer = outer_ledgers(model, skeleton.model)
    streams = num_streams(model) * stream_bytes(data, activations, skeleton.width) if "blocks" in model.phases else 0
    windows = (
        window_bytes(evaluation, activations, skeleton.width) if by_block(evaluation, skeleton, plan, around) else 0
    )
    limit = activations.limit
    mapped, windows = streams > limit, windows if windows > limit else 0
    outer_ledger = sum((ledger for _, ledger in outer.values()), BitsLedger())
    run_folder = _run_folder(model, skeleton, sum(ledgers.values(), BitsLedger()), outer_ledger)
    if in_files:
        run_folder["weights computed on loading"] = computed
    steps = _steps(trainer, data)
    timing, reason = None, "--probe false"
    choosing, choosing_unknown = None, "--probe false" if choices else ""
    if around.experts_over > 1:
        reason = "the experts of a block are spread over devices, and this is one"
    elif with_probe:
        timing, reason = _probe(model, data, skeleton, plan, phases, trainer)
    work = None
    if timing is not None and "end_to_end" in model.phases:
        work = end_to_end_work(end_to_end, data, skeleton, plan, trainer)
    if with_probe and choices:
        device = trainer.strategy.root_device
        choosing, choosing_unknown = width_seconds(data, skeleton, plan, choices, device, scale_dtype, limit)
    compiled = timing is not None and _compiles(model, trainer)
    baseline = {"Python, libraries" + (", compiled code" if compiled else ""): _baseline(source)}
    for phase in phases:
        phase.host = baseline | phase.host

    on_host = not around.accelerated
    misfits = memory_problems(case, phases, on_host, host_room, around.device_room)
    if around.device_room is not None and "blocks" in model.phases:
        misfits += device_advice(model, data, skeleton, plan, around, around.device_room, trainer.world_size)
    if not mapped and streams > host_room:
        misfits.append(problems.stream_problem(streams, host_room, activations))
    if mapped or windows:
        misfits += problems.disk_problems(max(streams if mapped else 0, windows), activations)
    misfits += problems.folder_problems(sum(run_folder.values()), Path(trainer.default_root_dir))
    return Estimate(
        skeleton,
        plan,
        ledgers,
        outer,
        phases,
        on_host,
        streams,
        mapped,
        windows,
        run_folder,
        steps,
        timing,
        work,
        None if timing is None else _seconds(model, data, timing, len(plan), steps, work),
        reason,
        choosing,
        choosing_unknown,
        misfits,
    )


def _by_scheme(plan: dict[int, Weights]) -> dict[QuantScheme, list[tuple[LinearSite, QuantScheme]]]:
    pairs: dict[QuantScheme, list[tuple[LinearSite, QuantScheme]]] = defaultdict(list)
    for weights in plan.values():
        for site, scheme in weights.items():
            pairs[scheme].append((site, scheme))
    return dict(pairs)


def _run_folder(model: ModelQuantization, skeleton: Skeleton, ledger: BitsLedger, outer: BitsLedger) -> dict[str, int]:
    kinds = len(set(model.phases))
    files = 1 + ("end_to_end" in model.phases)
    dense = skeleton.parameters * model.storage.output_dtype.itemsize
    name = f"embedding and head, {files} file{'s' if files > 1 else ''}"
    return {
        **({name: files * outer.num_bytes} if outer.weights else {}),
        f"block files, {kinds} set{'s' if kinds > 1 else ''}": kinds * ledger.num_bytes,
        "quantized model, dequantized": dense,
        "a file of it while that is written": min(dense, SHARD_SIZE),
        "logs and the rest": SPARE_DISK,
    }


def _steps(trainer: Trainer, data: CalibrationDataModule) -> int:
    """Optimizer steps of one block."""
    batches = max(1, data.num_sequences // (data.batch_size * trainer.world_size))
    limit = trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    steps = epochs * math.ceil(batches / trainer.accumulate_grad_batches)
    return int(min(steps, trainer.max_steps if trainer.max_steps >= 0 else math.inf))


def _compiles(model: ModelQuantization, trainer: Trainer) -> bool:
    """Whether anything is compiled: what trains blocks."""
    trains = "blocks" in model.phases and model.block.gumbel.backend != "eager"
    return trains and compiler_available(trainer.strategy.root_device.type)


def _probe(
    model: ModelQuantization,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    phases: list[Phase],
    trainer: Trainer,
) -> tuple[Timing | None, str]:
    """The seconds of one block, or why they were not measured."""
    device = trainer.strategy.root_device
    room = limits.device_bytes(device) or limits.host_bytes()
    needed = max((sum(p.device.values()) for p in phases if p.name.startswith("blocks")), default=0)
    if needed > room:
        return None, (
            f"one block in training takes {problems.gigabytes(needed)}, {problems.gigabytes(room)} are free here"
        )
    index, weights = next(iter(plan.items()))
    run = compiled_run_block() if model.block.compiled and _compiles(model, trainer) else run_block
    bf16 = trainer.precision == "bf16-mixed"
    return probe(model, data, skeleton.width, skeleton.blocks[index], weights, device, bf16, run), ""


def _seconds(
    model: ModelQuantization,
    data: CalibrationDataModule,
    timing: Timing,
    blocks: int,
    steps: int,
    end_to_end: EndToEndWork | None,
) -> float:
    """Seconds in all, without measuring perplexity."""
    of_blocks = blocks * (
        ("blocks" in model.phases) * timing.block(model, data, steps)
        + ("init" in model.phases) * timing.warm_start(model, data)
        + bool({"init", "blocks"} & set(model.phases)) * timing.end_loss(model, data)
    )
    return of_blocks + (0 if end_to_end is None else end_to_end.seconds)


def _baseline(source: loading.ModelSource) -> int:
    """What this process takes with everything a run loads beside the model, once the probe's tensors are gone."""
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    here = Path(source.path).is_dir() and (source.gguf_file or any(Path(source.path).glob("tokenizer*")))
    tokenizer = loading.load_tokenizer(source) if here else None
    release()
    taken = limits.own_bytes()
    del tokenizer
    return taken
