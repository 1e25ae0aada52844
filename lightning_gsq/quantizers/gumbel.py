"""The Gumbel quantizer: one weight matrix as a trainable choice of levels (GSQ, arXiv 2604.18556).

Every weight has one logit per candidate level. Candidates are the whole grid where it is small (1 bit, ternary,
2 bits), and above that *local shifts* around the warm start's code, those that leave the grid ruled out with a logit
of :data:`NEVER`. During training a weight is a softmax over Gumbel-perturbed logits; at the end, the candidate with the
largest logit. The group's scale trains as ``s = s_0 exp(delta)``, so that one learning rate fits every group.

Logits start at ``sigma * (N(0, 1) + alpha * c)`` with ``c_l = -(v_l - start)^2 / 2``, centred over the candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.ops.gumbel_softmax import Backend, gumbel_softmax_values, gumbel_softmax_weight
from lightning_gsq.quantizers.trained_scales import TrainedScales
from lightning_gsq.quantizers.warm_start import Start, unstack
from lightning_gsq.weights.layout import SCALES
from lightning_gsq.weights.quantized import QuantizedTensor, expand_groups
from lightning_gsq.weights.scheme import QuantScheme

NEVER = -1e18
"""Logit of a candidate outside of the grid. Its probability is zero, and so is its gradient; it is finite, because
weight decay added to a gradient (torch.optim.Adam) would make NaN of -inf."""
MAX_VECTORS = 16


@dataclass(frozen=True)
class GumbelOptions:
    """How logits start.

    Args:
        sigma: Standard deviation of the logits' initial noise, and unit of their confidence in the warm start.
        alpha: Confidence in the warm start, in units of sigma; null for 6 (3 for ternary).
        shifts: Candidates on each side of the warm start's code above 2 bits, in levels (2 as published).
        center: What the initial logits favour: "code", the warm start's rounded code, the same for every weight; or
            "position", the weight before rounding, so that a weight near a rounding boundary changes sides easily.
        noise: Factor on the Gumbel noise; 1 is the distribution itself (as published), 0 a plain softmax. Runs of few
            steps do better with little.
        vectors: Candidates of weights that have a code vector (iq3_xxs and the like), the warm start's included.
        backend: How weights are sampled: "triton" (CUDA), "compile" (one fused loop by torch.compile), "eager" (plain
            PyTorch, slower), or "auto" for the first of them that works on the machine.
        logits_dtype: "bfloat16" halves the memory of logits and optimizer; it needs an optimizer that rounds
            stochastically, lightning_gsq.training.Lion or Adam.
    """

    sigma: float = 0.01
    alpha: float | None = None
    shifts: int = 1
    center: Literal["code", "position"] = "code"
    noise: float = 0.1
    vectors: int = 4
    backend: Backend = "auto"
    logits_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise ConfigurationError(f"sigma must be positive, got {self.sigma}")
        if self.alpha is not None and self.alpha < 0:
            raise ConfigurationError(f"alpha must not be negative, got {self.alpha}; null for the grid's own")
        if self.shifts < 1:
            raise ConfigurationError(f"shifts must be at least 1, got {self.shifts}")
        if not 2 <= self.vectors <= MAX_VECTORS:
            raise ConfigurationError(f"vectors must be 2 to {MAX_VECTORS}, got {self.vectors}")
        if self.noise < 0:
            raise ConfigurationError(f"noise must not be negative, got {self.noise}")
        if self.logits_dtype not in ("float32", "bfloat16"):
            raise ConfigurationError(f"logits_dtype must be float32 or bfloat16, got {self.logits_dtype!r}")


class GumbelQuantizer(TrainedScales):
    """Logits and scales of one weight matrix ``O I``.

    Attributes:
        logits: fp32 or bfloat16, ``L O I``; ``L = 1`` for 1 bit, whose sign is the sign of the weight.
        log_scale: fp32 ``O G`` (``O B``), the logarithm of each scale's change since the warm start; other numbers that
            the layout stores have parameters of their own.
        temperature: tau.
        logit_scale: kappa.
        hard: Return the rounded weight instead of samples.

    Args:
        start: The warm start.
        scheme: Grid and group size.
        options: How logits start.
        generators: Sources of the logits' initial noise, on the CPU: one, or one for each expert.
        first_row: Number of the first row in the whole matrix, where a process holds some experts of it.
    """

    start_codes: Tensor

    def __init__(
        self,
        start: Start,
        scheme: QuantScheme,
        options: GumbelOptions,
        *generators: torch.Generator,
        first_row: int = 0,
    ) -> None:
        super().__init__(scheme, start.scale_parts)
        self.options, self.first_row = options, first_row
        self.temperature, self.logit_scale, self.hard = 1.0, 1.0, False
        self.register_buffer("start_codes", start.codes_OI)
        self.find_candidates(start)
        self.logits = nn.Parameter(self._all_logits(start, generators))

    def find_candidates(self, start: Start) -> None:
        """What each weight chooses from: levels of the grid, or shifts around the start's code."""
        candidates = self.scheme.grid.candidates(self.options.shifts)
        self.local, self.levels = candidates.local, tuple(float(level) for level in candidates.levels)

    def parts(self) -> Iterator[tuple[str, GumbelQuantizer]]:
        """This quantizer alone; one with salient columns has two parts, each with a suffix for the weight's name."""
        yield "", self

    @property
    def group_length(self) -> int:
        """Weights in a full group."""
        return self.scheme.group_length(self.start_codes.shape[1])

    def forward(self, seed: int) -> Tensor:
        """Samples the weight ``O I``; the same seed draws the same noise. Rounded where ``hard`` is set."""
        if self.hard:
            return self.harden().dequantize()
        layout, parts = self.scheme.layout, self.scale_parts()
        w_OI = self.sample(layout.scales(parts), self.logit_scale, self.temperature, seed)
        o_OG = layout.offsets(parts)
        if o_OG is not None:
            w_OI = w_OI + expand_groups(o_OG, w_OI.shape[1], self.group_length).to(w_OI.dtype)
        # Under autocast a bfloat16 weight goes into the matrix product as it is; a block in fp32 takes fp32.
        return w_OI if torch.is_autocast_enabled(w_OI.device.type) else w_OI.float()

    def sample(self, s_OG: Tensor, kappa: float, tau: float, seed: int) -> Tensor:
        """``s`` times a sampled value of the grid, ``O I`` in the logits' dtype; without the offset."""
        settings: dict[str, Any] = {
            "kappa": kappa,
            "tau": tau,
            "noise": self.options.noise,
            "seed": seed,
            "first_row": self.first_row,
            "group_length": self.group_length,
            "backend": self.options.backend,
        }
        if self.scheme.grid.table is not None:
            return gumbel_softmax_values(self.logits, s_OG, self._candidate_values(), **settings)
        base_OI = self.start_codes if self.local else None
        return gumbel_softmax_weight(self.logits, s_OG, self.levels, base_OI, **settings)

    def exact(self, values_OI: Tensor) -> Tensor:
        """Nearly hard samples of the grid's values, without what is left of other candidates."""
        return self.scheme.grid.value_of(self.scheme.grid.nearest(values_OI))

    def _candidate_values(self) -> list[Tensor]:
        """What each candidate of each weight is worth, fp32 ``O I``; those outside of the grid, its ends."""
        grid = self.scheme.grid
        shifted = ((self.start_codes + int(shift)).clamp(grid.low, grid.high) for shift in self.levels)
        return [grid.value_of(codes_OI) for codes_OI in shifted]

    @torch.no_grad()
    def codes_OI(self) -> Tensor:
        """The most probable level of each weight, int8."""
        if len(self.logits) == 1:
            return torch.where(self.logits[0] < 0, -1, 1).to(self.start_codes.dtype)
        # Plane by plane: argmax over a leading dimension of a few entries is ten times slower on a CPU.
        best_OI, choice_OI = self.logits[0], torch.full_like(self.start_codes, int(self.levels[0]))
        for level, plane_OI in zip(self.levels[1:], self.logits[1:], strict=True):
            better_OI = plane_OI > best_OI
            best_OI = torch.where(better_OI, plane_OI, best_OI)
            choice_OI = choice_OI.masked_fill(better_OI, int(level))
        return choice_OI + self.start_codes if self.local else choice_OI

    def harden(self, scale_dtype: torch.dtype = torch.float32) -> QuantizedTensor:
        """The quantized weight as it stands: most probable levels, scales as stored (in ``scale_dtype``)."""
        return _tensor(self.codes_OI(), self.stored_parts(scale_dtype), self.scheme)

    def start_tensor(self, scale_dtype: torch.dtype = torch.float32) -> QuantizedTensor:
        """The quantized weight of the warm start."""
        return _tensor(self.start_codes, self.start_parts(scale_dtype), self.scheme)

    @torch.no_grad()
    def blend(self, trained_O: Tensor, scale_dtype: torch.dtype = torch.float32) -> QuantizedTensor:
        """Rows as they stand where ``trained_O`` (bool) is true, as the warm start left them elsewhere."""
        trained_O1 = trained_O.to(self.start_codes.device)[:, None]
        start, now = self.start_parts(scale_dtype), self.stored_parts(scale_dtype)
        parts = {name: torch.where(trained_O1, value, start[name]) for name, value in now.items()}
        return _tensor(torch.where(trained_O1, self.codes_OI(), self.start_codes), parts, self.scheme)

    @torch.no_grad()
    def entropy_OI(self) -> Tensor:
        """Entropy of each weight's choice at the current temperature, in bits, without noise."""
        if len(self.logits) == 1:
            p = torch.sigmoid(2 * self.logit_scale * self.logits[0].float() / self.temperature)
            p_LOI = torch.stack([p, 1 - p])
        else:
            p_LOI = torch.softmax(self.logit_scale * self.logits.float() / self.temperature, dim=0)
        return -torch.xlogy(p_LOI, p_LOI).sum(0) / torch.log(torch.tensor(2.0))

    def _all_logits(self, start: Start, generators: tuple[torch.Generator, ...]) -> Tensor:
        """Those of all experts in their dtype, each from its own generator, so that few are in fp32 at once."""
        dtype, experts = getattr(torch, self.options.logits_dtype), unstack(start, len(generators))
        parts = (self.initial_logits(*pair).to(dtype) for pair in zip(experts, generators, strict=True))
        logits_LOI = next(parts)
        if len(generators) == 1:
            return logits_LOI
        rows = logits_LOI.shape[1]
        all_LOI = logits_LOI.new_empty(len(logits_LOI), rows * len(generators), logits_LOI.shape[2])
        for expert, part_LOI in enumerate(itertools.chain([logits_LOI], parts)):
            all_LOI[:, expert * rows : (expert + 1) * rows] = part_LOI
        return all_LOI

    def initial_logits(self, start: Start, generator: torch.Generator) -> Tensor:
        """The logits that training starts from, fp32."""
        grid, sigma = self.scheme.grid, self.options.sigma
        alpha = grid.confidence if self.options.alpha is None else self.options.alpha
        origin_OI = start.codes_OI.float()
        if self.options.center == "position":
            # Beyond the grid's ends a position means nothing more than the end itself.
            origin_OI = start.position_OI.clamp(grid.low - 0.5, grid.high + 0.5)
        levels_LOI = torch.tensor(self.levels, device=origin_OI.device).view(-1, 1, 1)
        if self.local:
            levels_LOI = levels_LOI + start.codes_OI
        inside_LOI = (levels_LOI >= grid.low) & (levels_LOI <= grid.high)
        affinity_LOI = -0.5 * (levels_LOI - origin_OI).square()
        count_OI = inside_LOI.sum(0)
        affinity_LOI -= torch.where(inside_LOI, affinity_LOI, 0).sum(0) / count_OI
        shape = (1, *origin_OI.shape) if grid.binary else affinity_LOI.shape
        noise = torch.randn(shape, generator=generator).to(origin_OI.device)
        if grid.binary:
            # One logit stands for the pair (-l, +l): half the difference of the two.
            return sigma * (noise + alpha * 0.5 * (affinity_LOI[1:] - affinity_LOI[:1]))
        return torch.where(inside_LOI, sigma * (noise + alpha * affinity_LOI), NEVER)


def _tensor(codes_OI: Tensor, parts: dict[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    return QuantizedTensor(codes_OI, parts.pop(SCALES), scheme, parts)
