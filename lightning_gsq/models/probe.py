"""The short sequence that shows how a model calls its blocks and which weights they multiply with.

One home, so that ``plan``, which runs a model without weights, looks at the same tokens as ``fit``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

PROBE_TOKENS = 13
"""A length that no other dimension has, so that the dimensions of tokens can be told from the others."""


def probe_ids(model: PreTrainedModel) -> Tensor:
    """Token ids ``1 T``, all different where the vocabulary allows it, on the device of the embedding."""
    embedding = model.get_input_embeddings()
    ids_T = torch.arange(PROBE_TOKENS, device=embedding.weight.device)  # type: ignore[arg-type]
    return ids_T[None] % int(embedding.num_embeddings)  # type: ignore[arg-type]


def probe_pair(model: PreTrainedModel) -> Tensor:
    """Token ids ``2 T``: those of :func:`probe_ids`, and a sequence that differs from it at every position."""
    ids_BT = probe_ids(model)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    return torch.cat([ids_BT, (ids_BT + PROBE_TOKENS // 2) % vocabulary])
