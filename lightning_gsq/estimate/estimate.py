"""Puts the parts of a plan together."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.estimate import limits
from lightning_gsq.estimate.probe import Timing, probe
from lightning_gsq.estimate.skeleton import Skeleton, make_skeleton
from lightning_gsq.estimate.terms import (
    Phase,
    Surroundings,
    Weights,
    by_block,
    ledger_of,
    num_streams,
    optimizer_state,
    phases_of,
    stream_bytes,
    window_bytes,
)
from lightning_gsq.models import loading
from lightning_gsq.models.chain import compiled_run_block, run_block
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.system.compiling import compiler_available
from lightning_gsq.training import EndToEndOptions, ModelQuantization
from lightning_gsq.weights.assignment import assign_schemes
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
        phases: Memory.
        on_host: The device is the host.
        streams: Bytes of the hidden states of the blocks phase.
        mapped: They live in memory-mapped files.
        windows: Bytes of the hidden states of the evaluation windows, where they live in such files too.
        run_folder: Bytes the run folder takes, by what they are.
        steps: Optimizer steps a block.
        timing: Seconds of one block's parts; None without a probe.
        seconds: Seconds in all, without measuring perplexity; None without a probe.
        probed: Why there was no probe; empty if there was one.
        problems: What does not fit.
    """

    skeleton: Skeleton
    plan: dict[int, Weights]
    ledgers: dict[QuantScheme, BitsLedger]
    phases: list[Phase]
    on_host: bool
    streams: int
    mapped: bool
    windows: int
    run_folder: dict[str, int]
    steps: int
    timing: Timing | None
    seconds: float | None
    probed: str
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

    Raises:
        ConfigurationError: the model cannot be quantized, a pattern matches nothing, or a range is empty.
    """
    source = loading.resolve(model.pretrained, model.revision, model.trust_remote_code, need_weights=False)
    config = loading.load_config(source)
    skeleton = make_skeleton(source, config, model.dtype_name)
    plan = _assign(model, skeleton)
    device = trainer.strategy.root_device
    bf16 = trainer.precision == "bf16-mixed"
    compiled = model.gumbel.backend != "eager" and compiler_available(device.type)
    device_room = limits.device_bytes(device) if device_memory is None else int(device_memory)
    around = Surroundings(
        bf16=bf16,
        optimizer_state=optimizer_state(model),
        file_bytes=sum(file.stat().st_size for file in source.files) if source.gguf_file else 0,
        device_room=device_room,
        accelerated=device.type != "cpu" or device_memory is not None,
        mapped=source.gguf_file is None and model.dtype_name == "auto",
        spread=1 if end_to_end.strategy is None else trainer.world_size,
    )
    phases = phases_of(model, data, evaluation, activations, end_to_end, skeleton, plan, around)
    streams = num_streams(model) * stream_bytes(data, activations, skeleton.width) if "blocks" in model.phases else 0
    mapped = streams > activations.memory_limit_gb * 1e9
    windows = window_bytes(evaluation, activations, skeleton.width) if by_block(evaluation, skeleton, around) else 0
    ledgers = {scheme: ledger_of(items, model.scale_dtype.itemsize) for scheme, items in _by_scheme(plan).items()}
    total = sum(ledgers.values(), BitsLedger())
    kinds = len({"init", "blocks", "end_to_end"} & set(model.phases))
    run_folder = {
        f"block files, {kinds} set{'s' if kinds > 1 else ''}": kinds * total.num_bytes,
        "quantized model, dequantized": skeleton.parameters * model.output_dtype.itemsize,
        "logs and the rest": SPARE_DISK,
    }
    steps = _steps(trainer, data)
    timing, reason = None, "--probe false"
    if with_probe:
        room = limits.device_bytes(device) or limits.host_bytes()
        needed = max((sum(p.device.values()) for p in phases if p.name.startswith("blocks")), default=0)
        reason = f"one block in training takes {_gigabytes(needed)}, {_gigabytes(room)} are free here"
        if needed <= room:
            index, weights = next(iter(plan.items()))
            run = compiled_run_block() if model.compile_blocks and compiled else run_block
            timing = probe(model, data, skeleton.width, skeleton.blocks[index], weights, device, bf16, run)
    baseline = {"Python, libraries" + (", compiled code" if timing and compiled else ""): _baseline(source)}
    for phase in phases:
        phase.host = baseline | phase.host
    seconds = None
    if timing is not None:
        seconds = len(plan) * (
            ("blocks" in model.phases) * timing.block(model, data, steps)
            + ("init" in model.phases) * timing.warm_start(model, data)
        )
    found = Estimate(
        skeleton,
        plan,
        ledgers,
        phases,
        not around.accelerated,
        streams,
        mapped,
        windows if windows > activations.memory_limit_gb * 1e9 else 0,
        run_folder,
        steps,
        timing,
        seconds,
        reason,
        [],
    )
    # What this process takes already is part of the plan's baseline.
    host_room = limits.host_bytes() + limits.own_bytes() if host_memory is None else int(host_memory)
    found.problems.extend(_problems(found, activations, Path(trainer.default_root_dir), host_room, device_room))
    return found


def refuse_early(
    model: ModelQuantization,
    data: CalibrationDataModule,
    activations: ActivationOptions,
    width: int,
) -> None:
    """The cheap part of the checks, for ``fit``: hidden states in memory or on disk, beside the loaded model.

    Raises:
        ConfigurationError: they do not fit.
    """
    if "blocks" not in model.phases:
        return
    streams = num_streams(model) * stream_bytes(data, activations, width)
    if streams > activations.memory_limit_gb * 1e9:
        limits.refuse(_disk_problems(streams, activations))
    elif streams > (room := limits.host_bytes()):
        limits.refuse([_stream_problem(streams, room)])


def _problems(
    found: Estimate, activations: ActivationOptions, folder: Path, host_room: int, device_room: int | None
) -> list[str]:
    problems = []
    worst = max(found.phases, key=lambda phase: phase.needed(found.on_host))
    if (needed := worst.needed(found.on_host)) > host_room:
        problems.append(
            f"host memory: {_gigabytes(needed)} are needed ({worst.name}), {_gigabytes(host_room)} are available"
        )
    if not found.mapped and found.streams > host_room:
        problems.append(_stream_problem(found.streams, host_room))
    worst = max(found.phases, key=lambda phase: phase.total(found.on_host)[1])
    if device_room is not None and (needed := worst.total(found.on_host)[1]) > device_room:
        problems.append(
            f"device memory: {_gigabytes(needed)} are needed ({worst.name}), {_gigabytes(device_room)} are free"
        )
    if found.mapped or found.windows:
        problems += _disk_problems(max(found.streams if found.mapped else 0, found.windows), activations)
    needed, free = sum(found.run_folder.values()), limits.free_disk(folder)
    if needed > free:
        problems.append(
            f"trainer.default_root_dir: the run folder takes {_gigabytes(needed)}, the disk of {folder} has "
            f"{_gigabytes(free)} free"
        )
    return problems


def _stream_problem(streams: int, room: int) -> str:
    return (
        f"activations.memory_limit_gb: hidden states of {_gigabytes(streams)} would be kept in memory, of which "
        f"{_gigabytes(room)} are available; lower the limit, so that they live in files, or use "
        "--activations.dtype bfloat16 or fewer sequences"
    )


def _disk_problems(streams: int, activations: ActivationOptions) -> list[str]:
    free = limits.free_disk(activations.folder)
    if streams <= free:
        return []
    return [
        f"activations.folder: hidden states take {_gigabytes(streams)}, the disk of "
        f"{activations.folder or 'the temporary folder'} has {_gigabytes(free)} free; choose another folder, "
        "--activations.dtype bfloat16 or fewer sequences"
    ]


def _assign(model: ModelQuantization, skeleton: Skeleton) -> dict[int, Weights]:
    """The weights of every planned block with their schemes, as ``fit`` assigns them."""
    sites = {
        f"{skeleton.prefix}.{index}.{site.name}": (index, site)
        for index in model.selected_blocks(len(skeleton.blocks))
        for site in skeleton.blocks[index].sites
    }
    plan: dict[int, Weights] = defaultdict(dict)
    for name, scheme in assign_schemes(sites, model.scheme, model.include, model.exclude, model.overrides).items():
        index, site = sites[name]
        plan[index][site] = scheme
    return dict(plan)


def _by_scheme(plan: dict[int, Weights]) -> dict[QuantScheme, list[tuple[LinearSite, QuantScheme]]]:
    found: dict[QuantScheme, list[tuple[LinearSite, QuantScheme]]] = defaultdict(list)
    for weights in plan.values():
        for site, scheme in weights.items():
            found[scheme].append((site, scheme))
    return dict(found)


def _steps(trainer: Trainer, data: CalibrationDataModule) -> int:
    """Optimizer steps of one block."""
    batches = max(1, data.num_sequences // (data.batch_size * trainer.world_size))
    limit = trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    steps = epochs * math.ceil(batches / trainer.accumulate_grad_batches)
    return int(min(steps, trainer.max_steps if trainer.max_steps >= 0 else math.inf))


def _baseline(source: loading.ModelSource) -> int:
    """What this process takes with everything a run loads beside the model, once the probe's tensors are gone."""
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    here = Path(source.path).is_dir() and (source.gguf_file or any(Path(source.path).glob("tokenizer*")))
    tokenizer = loading.load_tokenizer(source) if here else None
    limits.give_back_freed_memory()
    taken = limits.own_bytes()
    del tokenizer
    return taken


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
