"""The Gumbel quantizer of code vectors: groups of weights choose together (ggml's I-types).

A group of four or eight weights chooses between the code vector of its start and near ones
(:mod:`lightning_gsq.quantizers.near_vectors`), signs and shifts included. All else is as for levels: in training, codes
are the mean of the candidates under a softmax of Gumbel-perturbed logits, at the end those of the largest logit; scales
train as they are stored. IQ1_S, whose shift is shared by four vectors, keeps the shifts of its start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.ops.gumbel_softmax.vectors import gumbel_softmax_vectors
from lightning_gsq.quantizers.gumbel import GumbelOptions, GumbelQuantizer
from lightning_gsq.quantizers.near_vectors import near_codes
from lightning_gsq.quantizers.warm_start import Start
from lightning_gsq.weights.quantized import expand_groups
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.vector_grid import VectorGrid

ONE_STEP = 0.5
"""What a candidate one step away is less probable by, in units of sigma and alpha: as among levels."""


class VectorQuantizer(GumbelQuantizer):
    """Logits and scales of one weight matrix ``O I`` of code vectors; logits are ``L O U``, one a group of weights."""

    candidates: Tensor

    @property
    def grid(self) -> VectorGrid:
        """The scheme's grid."""
        assert isinstance(self.scheme.grid, VectorGrid)
        return self.scheme.grid

    def find_candidates(self, start: Start) -> None:
        """The start's codes and the nearest others, int8 ``L O I``."""
        codes_LOI = near_codes(start.codes_OI, start.position_OI, self.grid, self.options.vectors)
        self.register_buffer("candidates", codes_LOI)

    def sample(self, s_OG: Tensor, kappa: float, tau: float, seed: int) -> Tensor:
        """``s`` times sampled codes, ``O I`` in the logits' dtype."""
        codes_OI = gumbel_softmax_vectors(
            self.logits,
            self.candidates,
            kappa=kappa,
            tau=tau,
            noise=self.options.noise,
            seed=seed,
            first_row=self.first_row,
        )
        return (expand_groups(s_OG, codes_OI.shape[1], self.group_length) * codes_OI).to(self.logits.dtype)

    def exact(self, values_OI: Tensor) -> Tensor:
        """See :meth:`GumbelQuantizer.exact`: codes are whole numbers."""
        return values_OI.round()

    @torch.no_grad()
    def codes_OI(self) -> Tensor:
        """The codes of the most probable candidates."""
        best_OU = self.logits.argmax(0)
        return self.candidates.gather(0, best_OU.repeat_interleave(self.grid.unit, 1)[None])[0]

    @torch.no_grad()
    def entropy_OI(self) -> Tensor:
        """See :meth:`GumbelQuantizer.entropy_OI`; that of a group, at each of its weights."""
        return super().entropy_OI().repeat_interleave(self.grid.unit, 1)

    def initial_logits(self, start: Start, generator: torch.Generator) -> Tensor:
        """See the base class; the start is one step before all others, or each as far as its position says."""
        shape = (len(self.candidates), len(start.codes_OI), start.codes_OI.shape[1] // self.grid.unit)
        alpha = self.grid.confidence if self.options.alpha is None else self.options.alpha
        affinity_LOU = torch.full(shape, -ONE_STEP)
        affinity_LOU[0] = 0
        affinity_LOU -= affinity_LOU.mean(0)
        noise = torch.randn(shape, generator=generator)
        return (self.options.sigma * (noise + alpha * affinity_LOU)).to(start.codes_OI.device)


def quantizer_of(
    start: Start, scheme: QuantScheme, options: GumbelOptions, *generators: torch.Generator, first_row: int = 0
) -> GumbelQuantizer:
    """The trainable form of a matrix: a choice of levels, or of code vectors; arguments as of both."""
    kind = VectorQuantizer if isinstance(scheme.grid, VectorGrid) else GumbelQuantizer
    return kind(start, scheme, options, *generators, first_row=first_row)
