"""What the student is compared with, and how logits come from hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """A language-model head: ``logits = cap(scale * (hidden @ weightᵀ + bias))``, ``cap(z) = c tanh(z / c)``.

    Args:
        weight_VD: Its matrix.
        bias_V: Its bias, or None.
        scale: Factor on the logits.
        softcap: ``c``, or None for none.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def to(self, dtype: torch.dtype) -> Head:
        """The head in another dtype; itself where it has it already."""
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return Head(self.weight_VD.to(dtype), bias_V, self.scale, self.softcap)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """``N V``, in the dtype of the hidden states."""
        return self.finish(nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V))

    def finish(self, raw_NV: Tensor) -> Tensor:
        """Scale and cap of a raw product."""
        if self.scale != 1.0:
            raw_NV = raw_NV * self.scale
        return raw_NV if self.softcap is None else self.softcap * torch.tanh(raw_NV / self.softcap)


@dataclass(frozen=True)
class HiddenTarget:
    """The teacher by its last hidden states: exact, its logits are computed chunk by chunk.

    Args:
        hidden_ND: What enters the teacher's head.
        head: The teacher's head.
    """

    hidden_ND: Tensor
    head: Head

    def part(self, positions: slice) -> HiddenTarget:
        """Some of the positions."""
        return HiddenTarget(self.hidden_ND[positions], self.head)


@dataclass(frozen=True)
class TopKTarget:
    """The teacher by its most probable tokens.

    What they leave of the probability counts as one event more, "any other token": the divergence is that of the two
    distributions over ``K + 1`` events. It never exceeds that of the whole vocabularies, is zero where they agree, and
    leaves the student free in how it spreads the rest.

    Args:
        tokens_NK: The tokens, distinct in each row.
        log_probs_NK: Their log-probabilities at the loss's own temperature.
    """

    tokens_NK: Tensor
    log_probs_NK: Tensor

    def part(self, positions: slice) -> TopKTarget:
        """Some of the positions."""
        return TopKTarget(self.tokens_NK[positions], self.log_probs_NK[positions])


Target = HiddenTarget | TopKTarget
