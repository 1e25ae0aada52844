"""Memory that measuring perplexity takes, with the whole model on the device or block by block."""

from __future__ import annotations

from lightning_gsq.data import PerplexityData
from lightning_gsq.estimate.quantities import Surroundings, Weights, window_bytes
from lightning_gsq.estimate.simulate import activation_bytes
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.run.forward_passes import sequences_at_once
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.perplexity import FP32, Room, replaced_bytes, runs_by_block, whole_model_terms


def by_block(evaluation: PerplexityData, skeleton: Skeleton, plan: dict[int, Weights], around: Surroundings) -> bool:
    """Whether ``fit`` will measure perplexity block by block."""
    room = Room(around.device_room, around.host_room)
    replaced = _replaced(skeleton, plan, around)
    return runs_by_block(evaluation.by_block, _whole_model(evaluation, skeleton, around), replaced, room)


def _replaced(skeleton: Skeleton, plan: dict[int, Weights], around: Surroundings) -> int:
    quantized = sum(map(count_of, plan.values()))
    return replaced_bytes(quantized, skeleton.parameters, skeleton.dtype, around.output_dtype)


def count_of(weights: Weights) -> int:
    """How many numbers of a block are quantized."""
    return sum(site.rows * site.in_features for site in weights)


def replaced_terms(
    evaluation: PerplexityData, skeleton: Skeleton, plan: dict[int, Weights], outer: int, around: Surroundings
) -> dict[str, int]:
    """Bytes on the host of quantized weights that take the place of a model's own while its perplexity is measured.

    Args:
        evaluation: How it is measured.
        skeleton: The model.
        plan: Weights to quantize of each block.
        outer: Quantized numbers outside of the blocks.
        around: Surroundings.
    """
    itemsize, counts = skeleton.dtype.itemsize, [count_of(weights) for weights in plan.values()]
    if not by_block(evaluation, skeleton, plan, around):
        return {"quantized weights beside the originals": _replaced(skeleton, plan, around) + outer * itemsize}
    rounded = max(block.parameters for block in skeleton.blocks) if skeleton.dtype != around.output_dtype else 0
    terms = {
        "codes of a block, and its quantized weights": max(counts) + max([*counts, rounded]) * itemsize,
        "a matrix of it in fp32": FP32 * max(map(largest_matrix, plan.values())),
    }
    return terms | ({"embedding and head, dequantized": outer * itemsize} if outer else {})


def largest_matrix(weights: Weights) -> int:
    """How many numbers the largest quantized matrix of a block has, or its experts together where they are fused."""
    return max((site.rows * site.in_features for site in weights), default=0)


def _whole_model(evaluation: PerplexityData, skeleton: Skeleton, around: Surroundings) -> dict[str, int]:
    weights = skeleton.parameters * skeleton.dtype.itemsize
    itemsize = 2 if around.bf16 else skeleton.dtype.itemsize
    return whole_model_terms(weights, skeleton.vocabulary, evaluation.sequence_length, itemsize)


def perplexity_terms(
    evaluation: PerplexityData,
    options: ActivationOptions,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    around: Surroundings,
) -> tuple[str, dict[str, int], dict[str, int]]:
    """How perplexity is measured, in words, and its terms on the host and on the device."""
    tokens, vocabulary, itemsize = evaluation.sequence_length, skeleton.vocabulary, skeleton.dtype.itemsize
    whole = _whole_model(evaluation, skeleton, around)
    cast = vocabulary * skeleton.width * 2 if around.bf16 and itemsize > 2 else 0

    def activations(windows: int) -> int:
        block = skeleton.blocks[0]
        return activation_bytes(block, skeleton.width, windows, tokens, around.bf16, training=False).peak

    if not by_block(evaluation, skeleton, plan, around):
        device = whole | {"head in bfloat16, activations of a block": cast + activations(1)}
        if not around.accelerated:
            device.pop("model")
            return "", {}, device
        return ", whole model", {"the model on its way back from the device": device["model"]}, device
    counted = evaluation.num_windows is not None
    windows = window_bytes(evaluation, options, skeleton.width)
    name = "hidden states of the windows" if counted else "hidden states of each window (all are taken)"
    host = {} if windows > options.limit else {name: windows}
    through = {"activations of some windows": activations(sequences_at_once(tokens))}
    some = "log-probabilities of some positions"
    last = {some: whole[some]}
    if around.accelerated:  # else the block is used where it is, and the head too unless it is cast
        through = {"largest block": max(block.parameters for block in skeleton.blocks) * itemsize} | through
    if around.accelerated or cast:
        last = {"head": cast or vocabulary * skeleton.width * itemsize} | last
    return ", block by block", host, max(through, last, key=lambda terms: sum(terms.values()))
