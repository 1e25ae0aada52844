"""The memory of a run, phase by phase.

Every term is a product of sizes that the configuration gives, or measured in this process (what Python and the
libraries take), or simulated (activations); nothing is scaled to fit. A phase's peak is the sum of its terms. Terms
of the ``device`` lie on the accelerator; without one, host and device are the same memory and everything counts there.

What is not modelled: the allocator's fragmentation, and what libraries cache (packed weights, kernels).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.estimate.block_terms import worst_block
from lightning_gsq.estimate.end_to_end_terms import end_to_end_terms
from lightning_gsq.estimate.perplexity_terms import count_of, largest_matrix, perplexity_terms, replaced_terms
from lightning_gsq.estimate.quantities import (
    Surroundings,
    Weights,
    ledger_of,
    num_streams,
    outer_ledgers,
    stream_bytes,
)
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.estimate.width_terms import width_terms
from lightning_gsq.models.experts import all_take
from lightning_gsq.run.end_loss import BESIDE, sequences_together
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.perplexity import FP32
from lightning_gsq.training import EndToEndOptions, ModelQuantization
from lightning_gsq.weights.quantized import BitsLedger

MAPPED_MODEL = "model (mapped files)"


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
    held = {MAPPED_MODEL if around.mapped else "model": skeleton.parameters * skeleton.dtype.itemsize}
    pairs = [pair for weights in plan.values() for pair in weights.items()]
    ledger = ledger_of(pairs, model.storage.scale_dtype)
    outer = sum((bits for _, bits in outer_ledgers(model, skeleton.model).values()), BitsLedger())
    installed = replaced_terms(evaluation, skeleton, plan, outer.weights, around)
    stream = stream_bytes(data, options, skeleton.width)
    hessian = min(model.start.hessian_sequences, data.num_sequences) if model.start.watches_inputs else 0
    spare = stream * model.start.experts.extra_sequences // data.wanted
    more = {"hidden states of sequences for rare experts": spare} if spare else {}
    worst = worst_block(model, data, skeleton, plan, around)
    shown = _shown(data, options, skeleton, plan, hessian) if model.follows else {}
    way, windows, evaluate = perplexity_terms(evaluation, options, skeleton, plan, around)

    phases = [_loading(held, skeleton, around)]
    if around.choices:
        widths = width_terms(data, skeleton, plan, around, options.limit)
        phases.append(Phase("widths: what embedding and head are worth", held | widths.seen | widths.ends))
        phases.append(Phase("widths: what the matrices of a block are worth", held | widths.seen, widths.block))
    phases.append(Phase(f"perplexity{way}", held | windows, evaluate))
    if outer.weights:
        held = held | {"codes and scales of embedding and head": outer.weights + outer.scale_bits // 8}
    if model.start.end_loss_weights and {"init", "blocks"} & set(model.phases):
        held = held | _token_weights(data, plan, hessian)
        states = _at_all_blocks(data, options, skeleton, hessian)
        phases.append(Phase("gradients of the end loss", held | states, worst.gradients))
    if "init" in model.phases:
        streams = 1 + model.follows
        states = {"hidden states": streams * stream * hessian // data.wanted} | more | shown
        phases.append(Phase("warm start", held | states, worst.start))
        phases.append(Phase(f"perplexity of the warm start{way}", held | installed | windows, evaluate))
    if "blocks" in model.phases:
        streams = num_streams(model) * stream
        mapped = streams > options.limit
        states = ({} if mapped else {f"hidden states, {num_streams(model)} streams": streams}) | more
        phases.append(Phase("blocks: warm start of a block", held | states | shown, worst.start))
        phases.append(Phase("blocks: training of a block", held | states, worst.training))
        phases.append(Phase(f"perplexity of the blocks{way}", held | installed | windows, evaluate))
    if "end_to_end" in model.phases:
        terms = end_to_end_terms(model, data, end_to_end, skeleton, plan, ledger, outer, around)
        phases.append(Phase("end to end", held | _beside_end_to_end(data, skeleton, around), terms))
        phases.append(Phase(f"perplexity after it{way}", held | installed | windows, evaluate))
    return [*phases, Phase("save", held | _saving(model, skeleton, plan))]


def _shown(
    data: CalibrationDataModule, options: ActivationOptions, skeleton: Skeleton, plan: dict[int, Weights], hessian: int
) -> dict[str, int]:
    """What a full-precision block shows of the weights that follow it: their inputs, and sums of their results.

    Kept while it is within the limit. Counted for each weight, though some read the same tensor.
    """
    shown = [
        sum(site.in_features for site in all_take(skeleton.blocks[index].module, weights)) + 2 * skeleton.width
        for index, weights in plan.items()
    ]
    kept = FP32 * hessian * data.sequence_length * max(shown, default=0)
    return {} if kept > options.limit else {"what the full-precision block shows": kept}


def _token_weights(data: CalibrationDataModule, plan: dict[int, Weights], sequences: int) -> dict[str, int]:
    """How much each token counts for each matrix but those of experts."""
    matrices = sum(not site.experts for weights in plan.values() for site in weights)
    return {"weights of tokens": FP32 * sequences * data.sequence_length * matrices}


def _at_all_blocks(
    data: CalibrationDataModule, options: ActivationOptions, skeleton: Skeleton, sequences: int
) -> dict[str, int]:
    """Hidden states of the sequences that pass backwards together."""
    blocks, tokens = len(skeleton.blocks), data.sequence_length
    together = min(sequences, sequences_together(options, tokens, skeleton.width, blocks))
    kept = together * tokens * skeleton.width * options.itemsize * (blocks + BESIDE)
    return {} if kept > options.limit else {"hidden states at all blocks": kept}


def _beside_end_to_end(data: CalibrationDataModule, skeleton: Skeleton, around: Surroundings) -> dict[str, int]:
    """What the host holds where every device has the whole model: the teacher's states, and the model on its way."""
    if around.spread > 1:
        return {}
    itemsize, tokens = skeleton.dtype.itemsize, data.num_validation_sequences * data.sequence_length
    terms = {"what the teacher says of held-out text": tokens * skeleton.width * itemsize}
    if around.accelerated:
        terms["the model on its way back from the device"] = skeleton.parameters * itemsize
    return terms


def _saving(model: ModelQuantization, skeleton: Skeleton, plan: dict[int, Weights]) -> dict[str, int]:
    """What is outside of the blocks, then a block: its codes, its quantized weights, a matrix of these in fp32, all of
    it in the saved dtype."""
    dtype = model.storage.output_dtype
    written = dtype.itemsize * (dtype != skeleton.dtype)  # what has it already is written from the model
    inside = sum(block.parameters for block in skeleton.blocks)
    outside = (skeleton.parameters - inside) * (skeleton.dtype.itemsize + written)
    blocks = [
        count_of(plan.get(index, {})) * (1 + skeleton.dtype.itemsize)
        + max(written * block.parameters, FP32 * largest_matrix(plan.get(index, {})))
        for index, block in enumerate(skeleton.blocks)
    ]
    if outside > max(blocks):
        return {"what is outside of the blocks, in the saved dtype": outside}
    return {"a block: its codes, its weights, these in the saved dtype": max(blocks)}


def _loading(held: dict[str, int], skeleton: Skeleton, around: Surroundings) -> Phase:
    """The model comes; a GGUF file is mapped beside it, and its largest tensor unpacked."""
    if around.file_bytes == 0:
        return Phase("load", dict(held))
    largest = max(p.numel() for p in skeleton.model.parameters())
    return Phase("load", held | {"file and largest tensor": around.file_bytes + 2 * FP32 * largest})
