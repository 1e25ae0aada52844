"""A model on the host that is evaluated through one block at a time.

The model's own code embeds the windows; each block's weights visit the device in turn and all windows pass through
them; the model's own code computes what follows the last block; and the head, on the device again, gives the logits of
some positions at a time. So the device holds one block and some windows, or the head and some logits, and the host (or
a file, see ``ActivationOptions``) the hidden states of all windows:

    h <- embed(ids);   h <- block_l(h), l = 1 ... L;   log p = log_softmax(head(norm(h)))

What is outside of the blocks is no list of module names: it is the model's forward pass with every block replaced by a
function that hands hidden states on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import embed, find_blocks, run_block_giving
from lightning_gsq.models.head import TOLERANCE, find_head, last_hidden
from lightning_gsq.models.passing import calls_without_blocks, instead_of_blocks
from lightning_gsq.models.probe import probe_pair
from lightning_gsq.models.survey import survey
from lightning_gsq.ops.distillation import Head
from lightning_gsq.run.forward_passes import (
    arguments_of,
    embedded,
    hidden_store,
    needed_after,
    pass_through,
    sequences_at_once,
)
from lightning_gsq.run.hidden_states import ActivationOptions, Stream
from lightning_gsq.run.substitution import Substitution
from lightning_gsq.system.bar import bar
from lightning_gsq.system.slices import slices
from lightning_gsq.training.losses import LOSS_POSITIONS


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
