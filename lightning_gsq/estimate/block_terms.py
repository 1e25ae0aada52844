"""Memory that one block takes while it is rounded and while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate.experts import exchanged_bytes, one_share
from lightning_gsq.estimate.quantities import Surroundings, Weights, candidate_bytes, num_logits, scale_numbers
from lightning_gsq.estimate.simulate import PassBytes, activation_bytes
from lightning_gsq.estimate.skeleton import BlockSkeleton, Skeleton
from lightning_gsq.models.experts import all_take
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import GPTQ, LeastSquares
from lightning_gsq.run.forward_passes import sequences_at_once
from lightning_gsq.run.perplexity import FP32
from lightning_gsq.training import ModelQuantization

CHOLESKY_COPIES = 6
"""Matrices ``I I`` alive at once while a Hessian is damped, factored and inverted."""
ROUNDING_COPIES = 3
"""fp32 matrices ``O I`` beside the weight while it is rounded: working copy, codes, positions."""
SWEEP_COPIES = 5
"""The same while sweeps go over codes and scales: codes, positions before and now, what they amount to, its slope."""


@dataclass
class BlockTerms:
    """Bytes on the device, by what they are.

    Args:
        start: During the warm start of the block.
        training: During its training.
        gradients: While the gradient of the end loss passes through it; empty where it does not.
    """

    start: dict[str, int]
    training: dict[str, int]
    gradients: dict[str, int]


def worst_block(
    model: ModelQuantization,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    around: Surroundings,
) -> BlockTerms:
    """Terms of the most expensive block; blocks of equal structure are looked at once."""
    terms: dict[object, BlockTerms] = {}
    for index, weights in plan.items():
        block = skeleton.blocks[index]
        key = (block.parameters, tuple(weights.items()))
        if key not in terms:
            if around.experts_over > 1:
                block, weights = one_share(block, weights, around.experts_over)
            terms[key] = block_terms(model, data, skeleton.width, block, weights, around)

    def most(kind: Callable[[BlockTerms], dict[str, int]]) -> dict[str, int]:
        return max(map(kind, terms.values()), key=lambda found: sum(found.values()))

    return BlockTerms(most(lambda t: t.start), most(lambda t: t.training), most(lambda t: t.gradients))


def block_terms(
    model: ModelQuantization,
    data: CalibrationDataModule,
    width: int,
    block: BlockSkeleton,
    weights: Weights,
    around: Surroundings,
) -> BlockTerms:
    """Terms of one block, or of a device's share of it."""
    tokens, sequences = data.sequence_length, sequences_at_once(data.sequence_length)
    forward = activation_bytes(block, width, sequences, tokens, around.bf16, training=False).peak
    narrow = frozenset(site.name for site in weights if _sample_bytes(model, around) < FP32)
    step = activation_bytes(block, width, data.batch_size, tokens, around.bf16, True, narrow)
    devices = around.experts_over
    if devices > 1:
        forward += exchanged_bytes(block.module, width, sequences * tokens, devices)
        exchanged = exchanged_bytes(block.module, width, data.batch_size * tokens, devices)
        step = PassBytes(step.peak + exchanged, step.kept)
    count = sum(site.rows * site.in_features for site in weights)
    groups = scale_numbers(weights.items())
    share = f", its experts over {devices} devices" if devices > 1 else ""
    copy = {f"block in fp32{share}": FP32 * block.parameters}
    working = {"codes and positions of the starts": 5 * count}
    following = all_take(block.module, weights) if model.follows else []
    working |= _rounding_terms(model, weights, following, forward, sequences * tokens)
    starts = {"start: codes (int8) and scales": count + FP32 * groups}
    training = _training_terms(model, weights, around, forward, step)
    gradients: dict[str, int] = {}
    if model.start.end_loss_weights:
        back = activation_bytes(block, width, sequences, tokens, around.bf16, training=True).peak
        gradients = copy | {"activations of a pass and its gradients": back}
    return BlockTerms(copy | working, copy | starts | training, gradients)


def _rounding_terms(
    model: ModelQuantization, weights: Weights, following: Sequence[LinearSite], forward: int, tokens: int
) -> dict[str, int]:
    """The Hessians, and the larger of what gathers them and what rounds with them.

    Weights that follow are taken stage by stage. Those of a stage read the same tensor, so that it has at most all of
    one width.

    Args:
        model: The settings.
        weights: The block's weights.
        following: Those that follow the full-precision model.
        forward: Bytes of a forward pass.
        tokens: How many tokens it has.
    """
    needs_hessian = model.start.warm_start.needs_hessian
    squares = {site: max(site.experts, 1) * site.in_features**2 * FP32 for site in weights}
    matrices = {site: site.out_features * site.in_features * FP32 for site in weights}
    factors = CHOLESKY_COPIES if isinstance(model.start.warm_start.rule, GPTQ) else 0
    copies = SWEEP_COPIES if isinstance(model.start.warm_start.rule, LeastSquares) else ROUNDING_COPIES
    rounding = max(
        squares[site] * needs_hessian + factors * site.in_features**2 * FP32 + copies * matrices[site]
        for site in weights
    )
    terms: dict[str, int] = {}
    gathering = 0
    if needs_hessian:
        gathering = forward + max(site.in_features for site in weights) * tokens * FP32
        if not following:
            terms["Hessians"] = sum(squares.values())
        else:
            widths = {site.in_features for site in following}
            stage = max(2 * sum(squares[site] for site in following if site.in_features == width) for width in widths)
            apart = sum(squares[site] for site in weights if site not in following)
            terms["Hessians and drifts of a stage"] = max(stage + max(matrices[site] for site in following), apart)
            terms["weights of the stages before"] = sum(matrices[site] for site in following)
            gathering += max(site.in_features + 2 * site.out_features for site in following) * tokens * FP32
    if gathering > rounding:
        return terms | {"activations of a forward pass": gathering}
    return terms | {"largest matrix: factors and rounding": rounding}


def _sample_bytes(model: ModelQuantization, around: Surroundings) -> int:
    """Bytes of a sampled weight: those of its logits under autocast, else of fp32."""
    return getattr(torch, model.block.gumbel.logits_dtype).itemsize if around.bf16 else FP32


def _training_terms(
    model: ModelQuantization, weights: Weights, around: Surroundings, forward: int, step: PassBytes
) -> dict[str, int]:
    """What trains, and the larger of what a step and a validation pass take beside it.

    The gradients of logits and scales come last, from those of the sampled weights, when the block's activations are
    gone; until the next step's backward pass begins they stay. A validation pass has none. Where several steps add up,
    they are always there.
    """
    count = sum(site.rows * site.in_features for site in weights)
    groups = scale_numbers(weights.items())
    logits = num_logits(weights.items(), model.block.gumbel)
    dtype = model.block.gumbel.logits_dtype
    trained = getattr(torch, dtype).itemsize * logits + FP32 * groups
    terms = {
        f"logits ({'fp32' if dtype == 'float32' else dtype}, {logits / count:.3g} a weight) and scales": trained,
        "their gradients": trained,
        "optimizer state": round(around.optimizer_state * trained),
    }
    vectors = candidate_bytes(weights.items(), model.block.gumbel)
    if vectors:
        terms["code vectors to choose from (int8)"] = vectors
    sampled = _sample_bytes(model, around) * count
    backward = step.peak + sampled  # the gradients of all sampled weights, of which the pass counts one at a time
    activations = backward if around.accumulates else max(step.kept, backward - trained, sampled)
    validated = 2 * FP32 * count
    gradients = terms["their gradients"]
    if gradients + sampled + activations >= validated + forward + gradients * around.accumulates:
        return terms | {"sampled weights": sampled, "activations of a step": activations}
    if not around.accumulates:
        del terms["their gradients"]
    return terms | {"two sets of weights (validation)": validated, "activations of a forward pass": forward}
