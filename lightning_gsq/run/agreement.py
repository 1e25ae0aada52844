"""How far a model's next tokens are from those of another one, such as the model that it was quantized from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.standard_errors import standard_error
from lightning_gsq.system.processes import Ranks
from lightning_gsq.system.slices import slices
from lightning_gsq.training.losses import LOSS_POSITIONS


@dataclass(frozen=True)
class Agreement:
    """What two models say of the same text.

    Args:
        divergence: Mean of ``KL(other | model)`` over tokens, in nats.
        divergence_error: Its standard error, from how the means of windows differ; None for a single window.
        same_choice: Share of tokens for which both have the same most probable next token.
        perplexity: Of the other model.
        tokens: How many tokens that is.
    """

    divergence: float
    divergence_error: float | None
    same_choice: float
    perplexity: float
    tokens: int


@torch.no_grad()
def compare(
    network: PreTrainedModel,
    other: PreTrainedModel,
    ids_NT: Tensor,
    trainer: Trainer,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
) -> Agreement:
    """Runs both models over windows; a window's first token is context only.

    Args:
        network: The model.
        other: The model that it should be like.
        ids_NT: All windows.
        trainer: Gives the device and the precision.
        ranks: This process among those that share the windows.

    Raises:
        ConfigurationError: the two do not have the same vocabulary.
    """
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (network, other)]
    if sizes[0] != sizes[1]:
        raise ConfigurationError(f"against: its vocabulary has {sizes[1]:,} tokens, that of the model {sizes[0]:,}")
    device = trainer.strategy.root_device
    for model in (network, other):
        nn.Module.to(trainer.precision_plugin.convert_module(model), device)
    sums, means = torch.zeros(4, dtype=torch.float64, device=device), []
    for ids_T in ranks.share(ids_NT, even=False):
        before = sums.clone()
        ids_BT = ids_T[None].to(device)
        with trainer.precision_plugin.forward_context():
            own_TV, wanted_TV = (model(ids_BT, use_cache=False).logits[0, :-1] for model in (network, other))
        for part in slices(len(own_TV), LOSS_POSITIONS):
            sums += _sums(own_TV[part].float(), wanted_TV[part].float(), ids_BT[0, 1:][part])
        divergence, _, _, count = (sums - before).tolist()
        means.append(divergence / count)
    error = standard_error(means, ranks, device)
    divergence, same, loss, count = ranks.sum(sums).tolist()
    return Agreement(divergence / count, error, same / count, math.exp(loss / count), int(count))


def divergences(own_NV: Tensor, wanted_NV: Tensor) -> Tensor:
    """``KL(wanted | own)`` of each position ``N``, in nats, from log-probabilities ``N V``."""
    return (wanted_NV.exp() * (wanted_NV - own_NV)).sum(-1)


def _sums(own_NV: Tensor, wanted_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sums over positions of the divergence, of equal choices, of the other's loss, and of 1; fp64."""
    own_NV, wanted_NV = own_NV.log_softmax(-1), wanted_NV.log_softmax(-1)
    divergence = divergences(own_NV, wanted_NV).double().sum()
    same = (own_NV.argmax(-1) == wanted_NV.argmax(-1)).double().sum()
    loss = -wanted_NV.gather(-1, labels_N[:, None]).double().sum()
    return torch.stack([divergence, same, loss, loss.new_tensor(float(len(labels_N)))])
