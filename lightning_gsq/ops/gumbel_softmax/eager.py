"""The sampling op in eager PyTorch, with its gradient written out, a slice of rows at a time.

The slices keep the dozen temporaries of a softmax inside the cache, which on a CPU is most of the time, and keep
peak memory at one slice on an accelerator. The forward pass stores nothing but its inputs: the backward pass draws
the same noise again from the same seed.

With ``r = dloss/dw``, ``p`` the probabilities and ``m = sum_l p_l v_l``:
``dlogit_l = r * s * (kappa / tau) * p_l * (v_l - m)`` and ``dscale = sum over the group of r * (base + m)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_gsq.qtensor import expand_groups, reduce_groups

SLICE_ELEMENTS = 1 << 17
"""Logits handled at once."""


class GumbelSoftmaxWeight(torch.autograd.Function):
    """See :func:`lightning_gsq.ops.gumbel_softmax.gumbel_softmax_weight`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_LOI: Tensor,
        scales_OG: Tensor,
        levels_L: Tensor,
        base_OI: Tensor | None,
        kappa: float,
        tau: float,
        noise: float,
        seed: int,
        group_length: int,
    ) -> Tensor:
        """Samples the weight; see the module's docstring."""
        ctx.save_for_backward(logits_LOI, scales_OG, levels_L, *(() if base_OI is None else (base_OI,)))
        ctx.settings = (kappa, tau, noise, seed, group_length)
        w_OI = logits_LOI.new_empty(logits_LOI.shape[1:])
        for rows, z_LRI in _noisy_logits(logits_LOI, kappa, tau, noise, seed):
            _, m_RI = _relax(z_LRI, levels_L)
            if base_OI is not None:
                m_RI += base_OI[rows]
            torch.mul(m_RI, expand_groups(scales_OG[rows], m_RI.shape[1], group_length), out=w_OI[rows])
        return w_OI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, r_OI: Tensor) -> tuple[Tensor | None, ...]:
        """The exact gradient; see the module's docstring."""
        logits_LOI, scales_OG, levels_L, *base = ctx.saved_tensors
        kappa, tau, noise, seed, group_length = ctx.settings
        d_logits_LOI = torch.empty_like(logits_LOI)
        d_scales_OG = torch.empty_like(scales_OG)
        v_L11 = levels_L.view(-1, 1, 1)
        for rows, z_LRI in _noisy_logits(logits_LOI, kappa, tau, noise, seed):
            p_LRI, m_RI = _relax(z_LRI, levels_L)
            r_RI = r_OI[rows].to(m_RI.dtype)
            value_RI = m_RI if not base else m_RI + base[0][rows]
            d_scales_OG[rows] = reduce_groups(r_RI * value_RI, group_length)
            r_RI = r_RI * expand_groups(scales_OG[rows], r_RI.shape[1], group_length)
            if len(logits_LOI) == 1:
                torch.mul(r_RI, (1 - m_RI.square_()).mul_(kappa / tau), out=d_logits_LOI[0, rows])
            else:
                p_LRI.mul_(r_RI.mul_(kappa / tau))
                torch.mul(p_LRI, v_L11 - m_RI, out=d_logits_LOI[:, rows])
        return d_logits_LOI, d_scales_OG, None, None, None, None, None, None, None


def _noisy_logits(
    logits_LOI: Tensor, kappa: float, tau: float, noise: float, seed: int
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with ``(kappa * logits + noise * g) / tau``; binary: twice the logits, logistic noise."""
    levels, rows, columns = logits_LOI.shape
    step = max(1, SLICE_ELEMENTS // (levels * columns))
    generator = torch.Generator(logits_LOI.device).manual_seed(seed) if noise else None
    binary = levels == 1
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        l_LRI = logits_LOI[:, part]
        if generator is None:
            yield part, l_LRI * ((2 if binary else 1) * kappa / tau)
            continue
        g_LRI = uniform(l_LRI.shape, generator, l_LRI.dtype)
        if binary:
            g_LRI.logit_().mul_(noise / tau)
        else:
            g_LRI.log_().neg_().log_().mul_(-noise / tau)
        yield part, g_LRI.add_(l_LRI, alpha=(2 if binary else 1) * kappa / tau)


def uniform(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Draws strictly inside (0, 1): the centres of 2^23 cells, fp32 at least whatever ``dtype`` is asked for."""
    bits = torch.randint(0, 1 << 23, shape, generator=generator, device=generator.device, dtype=torch.int32)
    return bits.to(torch.promote_types(dtype, torch.float32)).add_(0.5).mul_(2.0**-23)


def _relax(z_LRI: Tensor, levels_L: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (overwriting ``z``) and the expected level of each weight."""
    if len(z_LRI) == 1:
        return z_LRI, torch.tanh(z_LRI[0].mul_(0.5))
    z_LRI.sub_(z_LRI.amax(0)).exp_()
    z_LRI.div_(z_LRI.sum(0))
    return z_LRI, torch.einsum("lri,l->ri", z_LRI, levels_L)
