"""Memory of finding out what the choices of each matrix are worth, where a size is given.

:mod:`lightning_gsq.widths.worth` keeps what enters every block for all pieces of text on the host, and has one block
on the device: in fp32, with one change a choice for each of its matrices, and their gradients, of as many matrices at
once as stay within ``activations.memory_limit_gb``. What the head is worth needs its gradient for all pieces; what the
embedding is, one change.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate.block_terms import ROUNDING_COPIES
from lightning_gsq.estimate.quantities import Surroundings, Weights
from lightning_gsq.estimate.simulate import activation_bytes
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.run.perplexity import FP32
from lightning_gsq.system.slices import slices_within
from lightning_gsq.widths.ends import EVERY
from lightning_gsq.widths.rounding import ROWS
from lightning_gsq.widths.worth import SEQUENCES, TOKENS, change_bytes

BF16 = 2
LOGIT_COPIES = 4
"""fp32 tensors ``T V`` alive at once: logits, their probabilities, logarithms and gradient."""


@dataclass(frozen=True)
class WidthTerms:
    """Bytes, by what they are.

    Args:
        seen: On the host from the first pass on.
        ends: On the host while embedding and head are looked at.
        block: On the device while a block is.
    """

    seen: dict[str, int]
    ends: dict[str, int]
    block: dict[str, int]


def pieces_of(data: CalibrationDataModule) -> tuple[int, int]:
    """How many pieces of the calibration text are looked at, and how long they are, in tokens."""
    tokens = min(TOKENS, data.sequence_length)
    return min(SEQUENCES, data.num_sequences * (data.sequence_length // tokens)), tokens


def width_terms(
    data: CalibrationDataModule, skeleton: Skeleton, plan: dict[int, Weights], around: Surroundings, limit: float
) -> WidthTerms:
    """Terms of a model whose matrices choose among ``around.choices`` presets, their changes within a limit at once."""
    pieces, tokens = pieces_of(data)
    states = (len(skeleton.blocks) + 1) * pieces * tokens * skeleton.width * skeleton.dtype.itemsize
    matrix, logits = skeleton.vocabulary * skeleton.width, tokens * skeleton.vocabulary
    rows = min(ROWS, skeleton.vocabulary)
    head = {
        f"gradients of {pieces} pieces at the logits, of {EVERY} positions one (bf16)": BF16 * pieces * logits // EVERY,
        "logits of a piece": LOGIT_COPIES * FP32 * logits,
        "rows of the head in rounding": ROUNDING_COPIES * FP32 * rows * skeleton.width,
    }
    embedding = {"one change of the embedding (fp32)": FP32 * matrix}
    blocks: list[dict[str, int]] = []
    known = set()
    for index, weights in plan.items():
        block = skeleton.blocks[index]
        key = (block.parameters, tuple(site for site in weights))
        if key in known:
            continue
        known.add(key)
        sizes = [site.rows * site.in_features for site in weights]
        parts = slices_within([change_bytes(site, around.choices) for site in weights], limit)
        count = max(sum(sizes[part]) for part in parts)
        largest = max(sizes)
        blocks.append(
            {
                "block in fp32": FP32 * block.parameters,
                f"changes for {around.choices} choices (fp32)": FP32 * around.choices * count,
                "gradients of its matrices (fp32)": FP32 * count,
                "largest matrix in rounding, or activations of a pass": max(
                    ROUNDING_COPIES * FP32 * largest,
                    activation_bytes(block, skeleton.width, 1, tokens, False, training=True).peak,
                ),
            }
        )
    return WidthTerms(
        {f"what enters each block, {pieces} pieces of {tokens} tokens": states},
        max(head, embedding, key=lambda terms: sum(terms.values())),
        max(blocks, key=lambda terms: sum(terms.values())),
    )
