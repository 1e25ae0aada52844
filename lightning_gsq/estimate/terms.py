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

from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.estimate.simulate import activation_bytes
from lightning_gsq.estimate.skeleton import BlockSkeleton, Skeleton
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import GPTQ
from lightning_gsq.run.blocks import FORWARD_TOKENS
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.perplexity import FP32, runs_by_block, whole_model_terms
from lightning_gsq.saliency.budget import planned_ledger
from lightning_gsq.training import EndToEndOptions, ModelQuantization
from lightning_gsq.weights.packing import packed_words
from lightning_gsq.weights.quantized import BitsLedger
from lightning_gsq.weights.scheme import QuantScheme

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
        device_room: Bytes of the accelerator; None if the device is the host or does not say.
        accelerated: The device has a memory of its own.
        mapped: The model's weights are a mapping of their files, which the system can drop and read again.
        spread: Devices that share the model in the end-to-end phase; 1 for a copy on each.
    """

    bf16: bool
    optimizer_state: float
    file_bytes: int
    device_room: int | None
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
    return scheme.grid.candidates(shifts).logits


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
    end_to_end: EndToEndOptions,
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
    way, windows, evaluate = _evaluation(evaluation, options, skeleton, around)
    found.append(Phase(f"perplexity{way}", held | windows, evaluate))
    if "init" in names:
        own = {"hidden states": stream * hessian // data.wanted}
        found.append(Phase("warm start", held | own | results, worst.start))
        found.append(Phase(f"perplexity of the warm start{way}", held | results | installed | windows, evaluate))
    if "blocks" in names:
        own = {} if mapped else {f"hidden states, {num_streams(model)} streams": streams}
        found.append(Phase("blocks: warm start of a block", held | own, worst.start))
        found.append(Phase("blocks: training of a block", held | own, worst.training))
    if "end_to_end" in names:
        terms = _model_end_to_end(skeleton, around)
        terms |= _end_to_end(model, data, end_to_end, skeleton, plan, ledger, around)
        found.append(Phase("end to end", dict(held), terms))
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
    forward = activation_bytes(block, width, sequences, tokens, around.bf16, training=False).peak
    backward = activation_bytes(block, width, data.batch_size, tokens, around.bf16, training=True).peak
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


def window_bytes(evaluation: PerplexityData, options: ActivationOptions, width: int) -> int:
    """Hidden states of the evaluation windows at one depth; of one window where their number depends on the text."""
    count = evaluation.num_windows or 1
    return count * evaluation.sequence_length * width * getattr(torch, options.dtype).itemsize


def by_block(evaluation: PerplexityData, skeleton: Skeleton, around: Surroundings) -> bool:
    """Whether ``fit`` will measure perplexity block by block."""
    return runs_by_block(evaluation.by_block, _whole_model(evaluation, skeleton, around), around.device_room)


def _whole_model(evaluation: PerplexityData, skeleton: Skeleton, around: Surroundings) -> dict[str, int]:
    weights = skeleton.parameters * skeleton.dtype.itemsize
    itemsize = 2 if around.bf16 else skeleton.dtype.itemsize
    return whole_model_terms(weights, skeleton.vocabulary, evaluation.sequence_length, itemsize)


def _evaluation(
    evaluation: PerplexityData, options: ActivationOptions, skeleton: Skeleton, around: Surroundings
) -> tuple[str, dict[str, int], dict[str, int]]:
    """How perplexity is measured, in words, and its terms on the host and on the device."""
    tokens, vocabulary, itemsize = evaluation.sequence_length, skeleton.vocabulary, skeleton.dtype.itemsize
    whole = _whole_model(evaluation, skeleton, around)
    cast = vocabulary * skeleton.width * 2 if around.bf16 and itemsize > 2 else 0

    def activations(windows: int) -> int:
        block = skeleton.blocks[0]
        return activation_bytes(block, skeleton.width, windows, tokens, around.bf16, training=False).peak

    if not by_block(evaluation, skeleton, around):
        device = whole | {"head in bfloat16, activations of a block": cast + activations(1)}
        if not around.accelerated:
            device.pop("model")
        return ", whole model" if around.accelerated else "", {}, device
    known = evaluation.num_windows is not None
    windows = window_bytes(evaluation, options, skeleton.width)
    name = "hidden states of the windows" if known else "hidden states of each window (all are taken)"
    host = {} if windows > options.memory_limit_gb * 1e9 else {name: windows}
    through = {"activations of some windows": activations(max(1, FORWARD_TOKENS // tokens))}
    some = "log-probabilities of some positions"
    last = {some: whole[some]}
    if around.accelerated:  # else the block is used where it is, and the head too unless it is cast
        through = {"largest block": max(block.parameters for block in skeleton.blocks) * itemsize} | through
    if around.accelerated or cast:
        last = {"head": cast or vocabulary * skeleton.width * itemsize} | last
    return ", block by block", host, max(through, last, key=lambda terms: sum(terms.values()))


def _model_end_to_end(skeleton: Skeleton, around: Surroundings) -> dict[str, int]:
    """The full-precision weights on the device: all, or its share of them and what is gathered at a time."""
    itemsize = skeleton.dtype.itemsize
    if around.spread == 1:
        return {"model": skeleton.parameters * itemsize} if around.accelerated else {}
    blocks = [block.parameters for block in skeleton.blocks]
    return {
        f"model, one of {around.spread} shares": math.ceil(skeleton.parameters * itemsize / around.spread),
        "a block, and what lies outside, gathered": (skeleton.parameters - sum(blocks) + max(blocks)) * itemsize,
    }


def _end_to_end(
    model: ModelQuantization,
    data: CalibrationDataModule,
    options: EndToEndOptions,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    ledger: BitsLedger,
    around: Surroundings,
) -> dict[str, int]:
    """Teacher and student in one network; of the student, codes, and dense weights as long as a block's graph lives."""
    batch, tokens = options.batch_size, data.sequence_length
    itemsize = 2 if around.bf16 else FP32
    trained = ledger.scale_bits // (8 * model.scale_dtype.itemsize) if "scales" in options.train else 0
    if "head" in options.train:
        trained += skeleton.vocabulary * skeleton.width
    if "logits" in options.train:
        weights = ((site, scheme) for own in plan.values() for site, scheme in own.items())
        trained += sum(candidates(q, model.gumbel.shifts) * s.rows * s.in_features for s, q in weights)
    one = activation_bytes(skeleton.blocks[0], skeleton.width, batch, tokens, around.bf16, training=True)
    states = trained * FP32 * (2 + around.optimizer_state)
    gathered = {"codes and what trains of a block, gathered": (ledger.weights + 2 * FP32 * trained) // len(plan)}
    terms = (gathered if around.spread > 1 else {}) | {
        "codes": math.ceil(ledger.weights / around.spread),
        "what trains, gradients, optimizer state": math.ceil(states / around.spread),
        "last hidden states, their gradients": 4 * batch * tokens * skeleton.width * FP32,
        "head of teacher and student": 2 * skeleton.vocabulary * skeleton.width * (2 if around.bf16 else 0),
        "logits of a chunk of positions": (2 * itemsize + 4 * FP32) * options.chunk * skeleton.vocabulary,
    }
    if options.recompute:
        terms["inputs of all blocks"] = len(skeleton.blocks) * batch * tokens * skeleton.width * FP32
        terms["activations of one block"] = one.peak
        return terms
    if not around.bf16:  # under autocast the cast weights are among the activations
        terms["dense weights"] = ledger.weights * FP32
    terms["activations of all blocks"] = len(skeleton.blocks) * one.kept
    terms["backward pass of one block"] = one.peak - one.kept
    return terms
