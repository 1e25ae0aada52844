"""Memory that the end-to-end phase takes on each device."""

from __future__ import annotations

import math

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate.quantities import Surroundings, Weights, num_logits, scale_numbers
from lightning_gsq.estimate.simulate import activation_bytes
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.run.perplexity import FP32
from lightning_gsq.training import EndToEndOptions, ModelQuantization
from lightning_gsq.weights.quantized import BitsLedger


def end_to_end_terms(
    model: ModelQuantization,
    data: CalibrationDataModule,
    options: EndToEndOptions,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    ledger: BitsLedger,
    outer: BitsLedger,
    around: Surroundings,
) -> dict[str, int]:
    """Teacher and student in one network; of the student, codes, and dense weights as long as a block's graph lives."""
    batch, tokens = options.passes.batch_size, data.sequence_length
    itemsize = 2 if around.bf16 else FP32
    scale_bits = 8 * model.storage.scale_dtype.itemsize
    trained = _trained(model, options, skeleton, plan)
    trained += outer.scale_bits // scale_bits if "embedding" in options.train else 0
    one = activation_bytes(skeleton.blocks[0], skeleton.width, batch, tokens, around.bf16, training=True)
    states = trained * FP32 * (2 + around.optimizer_state)
    terms = _full_precision(skeleton, around)
    if around.spread > 1:
        terms["codes and what trains of a block, gathered"] = (ledger.weights + 2 * FP32 * trained) // len(plan)
    terms |= {
        "codes": math.ceil(ledger.weights / around.spread),
        "what trains, gradients, optimizer state": math.ceil(states / around.spread),
        "last hidden states, their gradients": 4 * batch * tokens * skeleton.width * FP32,
        "head of teacher and student": 2 * skeleton.vocabulary * skeleton.width * (2 if around.bf16 else 0),
        "logits of a chunk of positions": (2 * itemsize + 4 * FP32) * options.loss.chunk * skeleton.vocabulary,
    }
    if outer.weights:
        gradients = 2 if "embedding" in options.train else 1
        terms["codes of embedding and head"] = math.ceil(outer.weights / around.spread)
        terms["embedding and head, dense"] = gradients * outer.weights * FP32
    if options.recompute:
        terms["inputs of all blocks"] = len(skeleton.blocks) * batch * tokens * skeleton.width * FP32
        terms["activations of one block"] = one.peak
        return terms
    if not around.bf16:  # under autocast the cast weights are among the activations
        terms["dense weights"] = ledger.weights * FP32
    terms["activations of all blocks"] = len(skeleton.blocks) * one.kept
    terms["backward pass of one block"] = one.peak - one.kept
    return terms


def _trained(
    model: ModelQuantization,
    options: EndToEndOptions,
    skeleton: Skeleton,
    plan: dict[int, Weights],
) -> int:
    """Numbers that train, without the norms."""
    pairs = [pair for weights in plan.values() for pair in weights.items()]
    count = scale_numbers(pairs) if "scales" in options.train else 0
    if "head" in options.train:
        count += skeleton.vocabulary * skeleton.width
    if "logits" in options.train:
        count += num_logits(pairs, model.block.gumbel)
    return count


def _full_precision(skeleton: Skeleton, around: Surroundings) -> dict[str, int]:
    """The full-precision weights on the device: all, or its share of them and what is gathered at a time."""
    itemsize = skeleton.dtype.itemsize
    if around.spread == 1:
        return {"model": skeleton.parameters * itemsize} if around.accelerated else {}
    blocks = [block.parameters for block in skeleton.blocks]
    return {
        f"model, one of {around.spread} shares": math.ceil(skeleton.parameters * itemsize / around.spread),
        "a block, and what lies outside, gathered": (skeleton.parameters - sum(blocks) + max(blocks)) * itemsize,
    }
