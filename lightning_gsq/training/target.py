"""What a block learns to output, and what that needs.

With ``F`` the full-precision stream, ``Q`` the quantized one (hidden states of all sequences at one depth):

    "stream"   target = block(F): what the full-precision model has at that depth, so that a block also repairs the
               error of those before it
    "local"    target = block(Q): the full-precision block on the quantized model's own activations, as published
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TargetName = Literal["stream", "local"]


@dataclass(frozen=True)
class Target:
    """A kind of target.

    Args:
        name: As in the option ``model.target``.
        follows_original: Whether the full-precision stream is kept beside the quantized one.
    """

    name: TargetName
    follows_original: bool

    @property
    def streams(self) -> int:
        """Hidden states of all sequences that are held at once: inputs, targets, and the original's where followed."""
        return 3 if self.follows_original else 2


TARGETS: dict[TargetName, Target] = {"stream": Target("stream", True), "local": Target("local", False)}
