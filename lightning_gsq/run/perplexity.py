"""How perplexity is measured: with the whole model on the device, or block by block where it does not fit there.

A quantized model's weights take the place of the original's. As a whole, all of them are on the host at once, or on the
device; block by block (:mod:`lightning_gsq.run.blockwise_perplexity`), those of one block are made from its file when
the windows pass through it. So it is block by block too where the host has no room for all of them.

Both ways add the same losses of the same positions to the same metric and differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gsq.data import PerplexityData
from lightning_gsq.data.evaluation import ByBlock
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.blockwise_perplexity import BlockwisePerplexity
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.standard_errors import Perplexity, standard_error
from lightning_gsq.run.substitution import Substitution
from lightning_gsq.system.bar import bar
from lightning_gsq.system.processes import Ranks
from lightning_gsq.training import ModelQuantization
from lightning_gsq.training.losses import LOSS_POSITIONS

FP32 = 4
SPARE = 0.1
"""Share of free memory that a whole model has to leave to activations, workspaces and fragmentation."""

Measure = Callable[[Substitution], Perplexity]
"""Measures the perplexity of all windows with other weights in the model."""


@dataclass(frozen=True)
class Room:
    """Free bytes.

    Args:
        device: Of the device; None if it is the host or does not say.
        host: Of the host; None for one that has room for everything.
    """

    device: int | None = None
    host: int | None = None


class _Windows(Callback):
    """Moves a bar by every window that a Trainer has evaluated."""

    def __init__(self, move: Callable[[], None]) -> None:
        self.move = move

    def on_validation_batch_end(self, *_: Any) -> None:
        self.move()


def whole_model_terms(weights: int, vocabulary: int, tokens: int, itemsize: int) -> dict[str, int]:
    """Bytes on the device while a whole model is evaluated, activations of its blocks aside.

    Args:
        weights: Bytes of the model.
        vocabulary: Rows of the head.
        tokens: Tokens of a window.
        itemsize: Bytes of a logit.
    """
    return {
        "model": weights,
        "logits of a window": tokens * vocabulary * itemsize,
        "log-probabilities of some positions": 2 * LOSS_POSITIONS * vocabulary * FP32,
    }


def replaced_bytes(quantized: int, parameters: int, dtype: torch.dtype, output_dtype: torch.dtype) -> int:
    """Bytes of what takes the place of a model's own weights, if all of it is there at once.

    Args:
        quantized: How many numbers are quantized.
        parameters: How many numbers the model has; those that are not quantized are rounded as the saved files have
            them.
        dtype: Dtype of the model.
        output_dtype: Dtype of the saved files.
    """
    return dtype.itemsize * (quantized if dtype == output_dtype else parameters)


def runs_by_block(choice: ByBlock, terms: dict[str, int], replaced: int, room: Room) -> bool:
    """Whether perplexity is measured block by block.

    Args:
        choice: What the user asked for.
        terms: Those of :func:`whole_model_terms`.
        replaced: Bytes of the weights that others take the place of; those are on the host then.
        room: What is free.
    """
    if isinstance(choice, bool):
        return choice
    needed = ((sum(terms.values()), room.device), (replaced, room.host))
    return any(free is not None and size > (1 - SPARE) * free for size, free in needed)


def make_measure(
    model: ModelQuantization,
    evaluation: PerplexityData,
    activations: ActivationOptions,
    make_trainer: Callable[[], Trainer],
    room: Room,
    say: Callable[[str], None],
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    plan: Sequence[BlockPlan] = (),
) -> Measure:
    """Decides how perplexity is measured.

    Args:
        model: The model, loaded.
        evaluation: The windows, tokenised, and the user's choice.
        activations: How hidden states are kept between blocks.
        make_trainer: Makes a Trainer that only evaluates.
        room: What is free on its device and on the host.
        say: Prints a line for the user.
        ranks: This process among those that share the windows; all of them measure at the same time.
        plan: The blocks whose weights will be replaced.

    Raises:
        ConfigurationError: it has to be block by block, and this model cannot be evaluated so.
    """
    ids_NT, network = ranks.share(evaluation.ids_NT, even=False), model.network
    trainer = make_trainer()
    device = trainer.strategy.root_device
    weights = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
    itemsize = 2 if trainer.precision in ("bf16-mixed", "16-mixed") else network.dtype.itemsize
    vocabulary = network.config.get_text_config(decoder=True).vocab_size
    terms = whole_model_terms(weights, vocabulary, ids_NT.shape[1], itemsize)
    quantized = sum(site.rows * site.in_features for part in plan for site in part.weights)
    parameters = sum(parameter.numel() for parameter in network.parameters()) if plan else 0
    replaced = replaced_bytes(quantized, parameters, network.dtype, model.storage.output_dtype)
    # One device with too little room is enough, because all processes have to go the same way.
    mine = torch.tensor(float(runs_by_block(evaluation.by_block, terms, replaced, room)), device=device)

    def with_its_error(measure: Callable[[], float]) -> Perplexity:
        model.window_losses.clear()
        value = measure()
        error = standard_error([total / count for total, count in model.window_losses.values()], ranks, device)
        return Perplexity(value, None if error is None else value * error)

    if not float(ranks.sum(mine)):

        def whole() -> float:
            windows: DataLoader[Tensor] = DataLoader(ids_NT, batch_size=1)  # type: ignore[arg-type]
            evaluator = make_trainer()
            # A model that was on an accelerator comes back as copies of what it was: mapped files stay mapped.
            before = [(parameter, parameter.data) for parameter in network.parameters()]
            with bar("perplexity", len(ids_NT), ranks.first) as move:
                evaluator.callbacks.append(_Windows(move))  # type: ignore[attr-defined]  # Lightning's connector
                (result,) = evaluator.validate(model, windows, verbose=False)
            for parameter, data in before:
                if parameter.dtype == data.dtype:
                    parameter.data = data
            return float(result["perplexity"])

        def with_all_of(weights: Substitution) -> Perplexity:
            with weights.everywhere():
                return with_its_error(whole)

        return with_all_of
    trainer.precision_plugin.convert_module(network)  # as the Trainer does before it evaluates a whole model
    blockwise = BlockwisePerplexity(network)
    free = "" if room.device is None else f", the device has {room.device / 1e9:.1f} GB free"
    free += "" if room.host is None else f", the host {room.host / 1e9:.1f} GB"
    say(f"perplexity is measured block by block: the model takes {weights / 1e9:.1f} GB{free}")
    return lambda weights: with_its_error(
        lambda: blockwise.measure(weights, ids_NT, make_trainer(), activations, shown=ranks.first)
    )
