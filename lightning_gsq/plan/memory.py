"""The terms of a run's memory, phase by phase.

Every term is a product of sizes that the configuration gives, or measured in this process (what Python and the
libraries take), or simulated (activations); nothing is scaled to fit. A phase's peak is the sum of its terms. Terms
of the ``device`` lie on the accelerator; without one, host and device are the same memory and everything counts there.

What is not modelled: the allocator's fragmentation, and what libraries cache (packed weights, kernels).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from lightning_gsq.data import ActivationOptions, CalibrationDataModule, PerplexityData
from lightning_gsq.modules import ModelQuantization
from lightning_gsq.modules.model import LOSS_POSITIONS
from lightning_gsq.packing import packed_words
from lightning_gsq.pipeline import FORWARD_TOKENS
from lightning_gsq.plan.simulate import activation_bytes
from lightning_gsq.plan.skeleton import BlockSkeleton, Skeleton
from lightning_gsq.qtensor import BitsLedger
from lightning_gsq.quantizers import GPTQ
from lightning_gsq.sage.budget import planned_ledger
from lightning_gsq.scheme import QuantScheme
from lightning_gsq.sites import LinearSite

FP32 = 4
MAPPED_MODEL = "model (mapped files)"
CHOLESKY_COPIES = 6
"""Matrices ``I I`` alive at once while a Hessian is damped, factored and inverted."""
ROUNDING_COPIES = 3
"""fp32 matrices ``O I`` beside the weight while it is rounded: working copy, codes, positions."""

Weights = dict[LinearSite, QuantScheme]


@dataclass
class Phase:
    """Terms of one phase, in bytes, by what they are.

    Args:
        name: The phase.
        host: Terms in the host's memory.
        device: Terms in the accelerator's memory.
    """

    name: str
    host: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)

    def total(self, on_host: bool) -> tuple[int, int]:
        """Bytes on the host and on the device; ``on_host``: the device is the host, so the second is 0."""
        host, device = sum(self.host.values()), sum(self.device.values())
        return (host + device, 0) if on_host else (host, device)

    def needed(self, on_host: bool) -> int:
        """Bytes on the host without what the system can drop."""
        return self.total(on_host)[0] - self.host.get(MAPPED_MODEL, 0)


@dataclass(frozen=True)
class Surroundings:
    """What this machine and the settings add to the model's sizes.

    Args:
        bf16: Matrix products in bfloat16.
        optimizer_state: Bytes of optimizer state for each byte of parameters.
        file_bytes: Size of a GGUF file, which is mapped while the model loads; 0 for safetensors.
        accelerated: The device has a memory of its own.
        mapped: The model's weights are a mapping of their files, which the system can drop and read again.
        spread: Devices that share the whole model where a phase takes all of it; 1 for a copy on each.
    """

    bf16: bool
    optimizer_state: float
    file_bytes: int
    accelerated: bool
    mapped: bool
    spread: int = 1


def stream_bytes(data: CalibrationDataModule, options: ActivationOptions, width: int) -> int:
    """Hidden states of all sequences at one depth."""
    return data.wanted * data.sequence_length * width * getattr(torch, options.dtype).itemsize


def num_streams(model: ModelQuantization) -> int:
    """How many of them the blocks phase holds."""
    return 3 if model.target == "stream" else 2


def candidates(scheme: QuantScheme, shifts: int) -> int:
    """Logits of one weight, ``L``."""
    if scheme.bits == 1:
        return 1
    return len(scheme.levels) if len(scheme.levels) <= 4 else 2 * shifts + 1


def optimizer_state(model: ModelQuantization) -> float:
    """Bytes of state for each byte of parameters, found by one step of the user's optimizer on a small tensor."""
    parameter = torch.nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = model.optimizer([{"params": [parameter], "name": "logits"}])
    optimizer.step()
    state = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    return sum(value.nbytes for value in state) / parameter.nbytes


def ledger_of(weights: Iterable[tuple[LinearSite, QuantScheme]], scale_bytes: int) -> BitsLedger:
    """What quantized weights will cost, without quantizing them."""
    total = BitsLedger()
    for site, scheme in weights:
        if scheme.mixed:
            total += planned_ledger(site.rows, site.in_features, scheme, 8 * scale_bytes)
            continue
        words = site.rows * packed_words(site.in_features, scheme.storage_bits)
        scales = site.rows * scheme.num_groups(site.in_features)
        total += BitsLedger(site.rows * site.in_features, 32 * words, 8 * scale_bytes * scales)
    return total


def phases_of(
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
    options: ActivationOptions,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    around: Surroundings,
) -> list[Phase]:
    """The phases of ``fit`` with these settings, in order, without what the process takes by itself."""
    names = set(model.phases)
    weights = skeleton.parameters * skeleton.dtype.itemsize
    held = {MAPPED_MODEL if around.mapped else "model": weights}
    largest = max(p.numel() for p in skeleton.model.parameters())
    quantized = sum(site.rows * site.in_features for own in plan.values() for site in own)
    ledger = ledger_of(((s, q) for own in plan.values() for s, q in own.items()), model.scale_dtype.itemsize)
    results = {"codes and scales of all blocks": quantized + ledger.scale_bits // 8}
    installed = {"quantized weights beside the originals": quantized * skeleton.dtype.itemsize}
    stream = stream_bytes(data, options, skeleton.width)
    streams = num_streams(model) * stream
    mapped = streams > options.memory_limit_gb * 1e9
    hessian = min(model.hessian_sequences, data.num_sequences) if model.warm_start.needs_hessian else 0
    worst = _worst_block(model, data, skeleton, plan, around)

    loading = Phase("load", held | {"file and largest tensor": around.file_bytes + 2 * FP32 * largest})
    if around.file_bytes == 0:
        loading = Phase("load", dict(held))
    found = [loading]
    evaluate = _evaluation(evaluation, skeleton, around)
    evaluate = _whole_model(skeleton, around) | evaluate
    found.append(Phase("perplexity", dict(held), evaluate))
    if "init" in names:
        own = {"hidden states": stream * hessian // data.wanted}
        found.append(Phase("warm start", held | own | results, worst.start))
        found.append(Phase("perplexity of the warm start", held | results | installed, evaluate))
    if "blocks" in names:
        own = {} if mapped else {f"hidden states, {num_streams(model)} streams": streams}
        found.append(Phase("blocks: warm start of a block", held | own, worst.start))
        found.append(Phase("blocks: training of a block", held | own, worst.training))
    if "end_to_end" in names:
        terms = _whole_model(skeleton, around) | _end_to_end(data, skeleton, ledger, around)
        found.append(Phase("end to end (estimate, blocks recomputed)", dict(held), terms))
    output = {"model in the saved dtype": skeleton.parameters * model.output_dtype.itemsize}
    found.append(Phase("save", held | results | installed | output))
    return found


@dataclass
class _BlockTerms:
    start: dict[str, int]
    training: dict[str, int]


def _worst_block(
    model: ModelQuantization,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    around: Surroundings,
) -> _BlockTerms:
    """Terms of the most expensive block; blocks of equal structure are looked at once."""
    terms: dict[object, _BlockTerms] = {}
    for index, weights in plan.items():
        block = skeleton.blocks[index]
        key = (block.parameters, tuple(weights.items()))
        if key not in terms:
            terms[key] = _block_terms(model, data, skeleton.width, block, weights, around)
    starts, trainings = [t.start for t in terms.values()], [t.training for t in terms.values()]
    return _BlockTerms(max(starts, key=lambda t: sum(t.values())), max(trainings, key=lambda t: sum(t.values())))


def _block_terms(
    model: ModelQuantization,
    data: CalibrationDataModule,
    width: int,
    block: BlockSkeleton,
    weights: Weights,
    around: Surroundings,
) -> _BlockTerms:
    tokens, sequences = data.sequence_length, max(1, FORWARD_TOKENS // data.sequence_length)
    forward = activation_bytes(block, width, sequences, tokens, around.bf16, training=False)
    backward = activation_bytes(block, width, data.batch_size, tokens, around.bf16, training=True)
    count = sum(site.rows * site.in_features for site in weights)
    groups = sum(site.rows * scheme.num_groups(site.in_features) for site, scheme in weights.items())
    logits = sum(
        candidates(scheme, model.gumbel.shifts) * site.rows * site.in_features for site, scheme in weights.items()
    )
    trained = FP32 * (logits + groups)
    copy = {"block in fp32": FP32 * block.parameters}
    starts = {"start: codes (int8) and scales": count + FP32 * groups}

    working = {"codes and positions of the starts": 5 * count}
    squares = {site: max(site.experts, 1) * site.in_features**2 * FP32 for site in weights}
    matrices = {site: site.out_features * site.in_features * FP32 for site in weights}
    factors = CHOLESKY_COPIES if isinstance(model.warm_start, GPTQ) else 0
    rounding = max(
        squares[site] * model.warm_start.needs_hessian
        + factors * site.in_features**2 * FP32
        + ROUNDING_COPIES * matrices[site]
        for site in weights
    )
    gathering = 0
    if model.warm_start.needs_hessian:
        working["Hessians"] = sum(squares.values())
        gathering = forward + max(site.in_features for site in weights) * sequences * tokens * FP32
    if gathering > rounding:
        working["activations of a forward pass"] = gathering
    else:
        working["largest matrix: factors and rounding"] = rounding

    training = {
        f"logits (fp32, {logits / count:.3g} a weight) and scales": trained,
        "their gradients": trained,
        "optimizer state": round(around.optimizer_state * trained),
    }
    # A step holds one sample of the weights and what its backward pass needs; a validation pass, two sets of weights.
    if FP32 * count + backward >= 2 * FP32 * count + forward:
        training |= {"sampled weights": FP32 * count, "activations of a step": backward}
    else:
        training |= {"two sets of weights (validation)": 2 * FP32 * count, "activations of a forward pass": forward}
    return _BlockTerms(copy | working, copy | starts | training)


def _evaluation(evaluation: PerplexityData, skeleton: Skeleton, around: Surroundings) -> dict[str, int]:
    """One window at a time, on the device that holds the whole model."""
    tokens, vocabulary = evaluation.sequence_length, skeleton.vocabulary
    itemsize = 2 if around.bf16 else skeleton.dtype.itemsize
    head = vocabulary * skeleton.width * 2 if around.bf16 and skeleton.dtype.itemsize > 2 else 0
    block = activation_bytes(skeleton.blocks[0], skeleton.width, 1, tokens, around.bf16, training=False)
    return {
        "logits of a window": tokens * vocabulary * itemsize,
        "log-probabilities of some positions": 2 * LOSS_POSITIONS * vocabulary * FP32,
        "head in bfloat16, activations of a block": head + block,
    }


def _whole_model(skeleton: Skeleton, around: Surroundings) -> dict[str, int]:
    """All weights on the device, or its share of them and what is gathered at a time."""
    itemsize = skeleton.dtype.itemsize
    if around.spread == 1:
        return {"model": skeleton.parameters * itemsize} if around.accelerated else {}
    blocks = [block.parameters for block in skeleton.blocks]
    return {
        f"model, one of {around.spread} shares": math.ceil(skeleton.parameters * itemsize / around.spread),
        "a block, and what lies outside, gathered": (skeleton.parameters - sum(blocks) + max(blocks)) * itemsize,
    }


def _end_to_end(
    data: CalibrationDataModule, skeleton: Skeleton, ledger: BitsLedger, around: Surroundings
) -> dict[str, int]:
    """Scales of the whole model under an Adam-like optimizer, each block run again in the backward pass."""
    tokens = data.batch_size * data.sequence_length
    groups = ledger.scale_bits // 16
    block = activation_bytes(
        skeleton.blocks[0], skeleton.width, data.batch_size, data.sequence_length, around.bf16, training=True
    )
    scales = groups * FP32 * (2 + around.optimizer_state)
    gathered = {"codes of a block, gathered": ledger.weights // len(skeleton.blocks)} if around.spread > 1 else {}
    return gathered | {
        "codes": math.ceil(ledger.weights / around.spread),
        "scales, gradients, optimizer state": math.ceil(scales / around.spread),
        "inputs of all blocks": len(skeleton.blocks) * tokens * skeleton.width * FP32,
        "activations of one block": block,
        "logits of a chunk of positions": 3 * LOSS_POSITIONS * skeleton.vocabulary * FP32,
    }
