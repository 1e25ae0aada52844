"""How perplexity is measured: with the whole model on the device, or block by block where it does not fit there.

A quantized model's weights take the place of the original's. As a whole, all of them are on the host at once, or on the
device; block by block, those of one block are made from its file when the windows pass through it. So it is block by
block too where the host has no room for all of them.

Block by block, the model stays on the host. Its own code embeds the windows; each block's weights visit the device in
turn and all windows pass through them; the model's own code computes what follows the last block; and the head, on the
device again, gives the logits of some positions at a time. So the device holds one block and some windows, or the head
and some logits, and the host (or a file, see ``ActivationOptions``) the hidden states of all windows:

    h <- embed(ids);   h <- block_l(h), l = 1 ... L;   log p = log_softmax(head(norm(h)))

What is outside of the blocks is no list of module names: it is the model's forward pass with every block replaced by a
function that hands hidden states on. Both ways add the same losses of the same positions to the same metric and differ
by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_gsq.data import PerplexityData
from lightning_gsq.data.evaluation import ByBlock
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import embed, find_blocks, run_block_giving
from lightning_gsq.models.head import TOLERANCE, find_head, last_hidden
from lightning_gsq.models.passing import calls_without_blocks, instead_of_blocks
from lightning_gsq.models.probe import probe_pair
from lightning_gsq.models.survey import survey
from lightning_gsq.ops.distillation import Head
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.forward_passes import (
    arguments_of,
    embedded,
    hidden_store,
    needed_after,
    pass_through,
    sequences_at_once,
)
from lightning_gsq.run.hidden_states import ActivationOptions, Stream
from lightning_gsq.run.standard_errors import Perplexity, standard_error
from lightning_gsq.run.substitution import Substitution
from lightning_gsq.system.bar import bar
from lightning_gsq.system.processes import Ranks
from lightning_gsq.system.slices import slices
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


class BlockwisePerplexity:
    """A model on the host that is evaluated through one block at a time.

    Args:
        network: The model.

    Raises:
        ConfigurationError: its blocks are no chain, or its logits are not those of a head applied to what follows the
            last block. Found out on a few tokens.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        self.network, self.blocks = network, find_blocks(network)[1]
        ids_BT, self._survey = probe_pair(network), survey(network)
        head = find_head(
            network, "evaluation.by_block: perplexity block by block", "set it to false, on a device that holds it all"
        )
        self._scale, self._softcap = head.scale, head.softcap
        with torch.no_grad():
            wanted_BTV = network(ids_BT, use_cache=False).logits.float()
        logits_BTV = head.logits(self._finish(ids_BT, self._survey.outputs_BTD[-1])).float()
        error = float((logits_BTV - wanted_BTV).abs().max() / wanted_BTV.abs().max())
        if not error < TOLERANCE:
            raise ConfigurationError(
                f"evaluation.by_block: something other than the hidden states of the last block reaches the head of "
                f"{type(network).__name__}, so that its perplexity cannot be measured block by block; set it to false, "
                "on a device that holds the whole model"
            )

    @torch.no_grad()
    def measure(
        self,
        weights: Substitution,
        ids_NT: Tensor,
        trainer: Trainer,
        activations: ActivationOptions,
        shown: bool = False,
    ) -> float:
        """The perplexity of the windows, and those of other processes if there are any.

        Args:
            weights: The model's module, whose metric adds up the losses, and what replaces its weights.
            ids_NT: This process's windows; a window's first token is context only.
            trainer: Gives the device and the precision.
            activations: How hidden states are kept.
            shown: Whether a terminal shows a bar over the blocks.
        """
        model, device, size = weights.model, trainer.strategy.root_device, sequences_at_once(ids_NT.shape[1])
        metric = model.negative_log_likelihood.to(device)
        with (
            trainer.precision_plugin.forward_context(),
            weights.outside(),
            self._embedded(ids_NT, activations) as embedding,
        ):
            stream, dtype = embedding
            with bar("perplexity, blocks", len(self.blocks), shown) as move:
                for index in range(len(self.blocks)):
                    with weights.block(index):
                        dtype = self._pass_through(index, stream, dtype, device)
                    move()
            head = self._head(device)
            for part in slices(len(ids_NT), size):
                last_BTD = self._finish(ids_NT[part], stream.hidden_NTD[part].to(dtype))
                for number, (last_TD, ids_T) in enumerate(zip(last_BTD, ids_NT[part], strict=True), part.start):
                    for positions in slices(len(ids_T) - 1, LOSS_POSITIONS):
                        logits_CV = head.logits(_fetch(last_TD[positions], device))
                        model.add_predictions(logits_CV, _fetch(ids_T[1:][positions], device), number)
        perplexity = float(metric.compute().exp())
        metric.reset()
        metric.cpu()
        return perplexity

    @contextmanager
    def _embedded(self, ids_NT: Tensor, activations: ActivationOptions) -> Iterator[tuple[Stream, torch.dtype]]:
        """The windows at the first block, as they are kept, and the dtype that the model gives them."""
        first_BTD = embed(self.network, ids_NT[:1])
        self._calls = self._calls_for(ids_NT[:1])
        with hidden_store((*ids_NT.shape, first_BTD.shape[-1]), activations, streams=1) as store:
            yield embedded(self.network, ids_NT, store), first_BTD.dtype

    def _pass_through(self, index: int, stream: Stream, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Passes all windows through a block; returns the dtype that the block computed them in.

        The block stays where it is: a copy of its weights on the device takes their place, and is gone afterwards.
        """
        block, call = self.blocks[index], self._calls[index].to(device)
        weights = {name: _fetch(t, device) for name, t in [*block.named_parameters(), *block.named_buffers()]}

        def through(hidden_BTD: Tensor, tensors: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            bound = call.bind(tensors, dtype)
            return run_block_giving(block, _fetch(hidden_BTD, device, dtype), bound, weights)

        arguments = arguments_of(self.network, self._survey.forms, call, index, stream)
        return pass_through(through, arguments, stream, stream, needed_after(self._calls, index), index)

    def _head(self, device: torch.device) -> Head:
        """The head as it is now, on the device, in the dtype that its product is computed in."""
        embedding = self.network.get_output_embeddings()
        head = Head(embedding.weight, getattr(embedding, "bias", None), self._scale, self._softcap)
        if torch.is_autocast_enabled(device.type):
            head = head.to(torch.get_autocast_dtype(device.type))
        bias_V = None if head.bias_V is None else _fetch(head.bias_V, device)
        return Head(_fetch(head.weight_VD, device), bias_V, head.scale, head.softcap)

    # -- the model's own code outside of the blocks

    def _calls_for(self, ids_BT: Tensor) -> list[BlockCall]:
        """What each block is called with beside the hidden states, for sequences of this length."""
        calls = calls_without_blocks(self.network, self._survey.forms, ids_BT)
        return [call.like(recorded) for call, recorded in zip(calls, self._survey.calls, strict=True)]

    def _finish(self, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """What enters the head if ``hidden_BTD`` leaves the last block."""
        forms = self._survey.forms
        with torch.no_grad(), instead_of_blocks(self.network, forms, ids_BT, lambda *_: hidden_BTD):
            return last_hidden(self.network, ids_BT)


def _fetch(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.to(device, dtype)
