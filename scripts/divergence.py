"""How far networks are from the one that they were made of, on the same windows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.run.agreement import divergences


@torch.no_grad()
def measured(
    original: PreTrainedModel, networks: Mapping[str, PreTrainedModel], ids_NT: Tensor
) -> dict[str, dict[str, float]]:
    """KL divergence, nats a token, and perplexity of each network; perplexity of the original beside it.

    Args:
        original: In fp32, for figures that depend on nothing else than the weights.
        networks: By name.
        ids_NT: Windows of tokens, int64; all but the first of each are predicted.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in networks}
    entropy = 0.0
    for ids_T in ids_NT:
        expected_TV = logprobs(original, ids_T)
        entropy -= float(expected_TV.gather(1, ids_T[1:, None]).double().sum())
        for name, network in networks.items():
            own_TV = logprobs(network, ids_T)
            divergence = divergences(own_TV, expected_TV).double().sum()
            sums[name] += torch.stack([divergence, -own_TV.gather(1, ids_T[1:, None]).double().sum()])
    count = len(ids_NT) * (ids_NT.shape[1] - 1)
    return {
        name: {
            "kl": float(total[0]) / count,
            "perplexity": math.exp(float(total[1]) / count),
            "full_precision": math.exp(entropy / count),
            "tokens": count,
        }
        for name, total in sums.items()
    }


def logprobs(network: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """Log-probabilities of what follows each token but the last, ``T - 1, V``."""
    return network(ids_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
