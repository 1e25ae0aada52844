"""The distillation loss and its gradient, chunk by chunk of positions, from hidden states.

With ``z`` the student's logits, ``q = softmax(z / T)``, ``p`` the teacher's at the same temperature and ``y`` the next
token, the loss of a position is ``(1 - m) T² KL(p | q) + m CE(y | softmax(z))``, and

    dT² KL / dz = T (q - p)                          the whole vocabulary
    dT² KL / dz = T (q_v - p_v)                      v among the top k
                  T q_v (1 - p_rest / q_rest)        v among the rest
    dCE / dz    = softmax(z) - onehot(y)

Both sides of the head are three matrix products of a chunk; the gradient of the hidden states is complete when the
forward pass ends, so that nothing of size ``N V`` outlives its chunk. What the loss costs beside the products is memory
traffic, kept low in three ways: few rows at a time, so that they stay in the cache; the same buffers for all of them,
since fresh pages cost more than the arithmetic; and the logarithm of the normaliser from the softmax itself,
``max z - log max q``, instead of from one more pass of exponentials.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gsq.ops.distillation.targets import Head, HiddenTarget, Target, TopKTarget

IGNORED = -100
"""Label of a position without a next token."""
ROWS = {"cpu": 16}
"""Rows that go through the elementwise part at once where caches are small; elsewhere the whole chunk."""


class DistillationLoss(torch.autograd.Function):
    """``(hidden, weight, bias) -> loss, kl, ce``; only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        target: Target,
        labels_N: Tensor,
        temperature: float,
        mix: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the module; the gradients are computed here and only scaled in the backward pass."""
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_VD = torch.zeros_like(weight_VD) if need_weight else None
        grad_V = torch.zeros_like(bias_V) if bias_V is not None and need_bias else None
        count, labelled = len(hidden_ND), max(1, int((labels_N != IGNORED).sum()))
        with torch.autocast(device, enabled=False):
            student = Head(weight_VD, bias_V, head.scale, head.softcap).to(dtype)
            if isinstance(target, HiddenTarget):
                target = HiddenTarget(target.hidden_ND.to(dtype), target.head.to(dtype))
            rows = _Rows(student, temperature, mix, count / labelled)
            sums_2 = torch.zeros(2, dtype=torch.promote_types(dtype, torch.float32), device=hidden_ND.device)
            for start in range(0, count, chunk):
                chunk_N = slice(start, min(start + chunk, count))
                hidden_CD = hidden_ND[chunk_N].to(dtype)
                raw_CV = rows.product("student", hidden_CD, student)
                teacher = target.part(chunk_N)
                if isinstance(teacher, HiddenTarget):
                    teacher_raw_CV = rows.product("teacher", teacher.hidden_ND, teacher.head)
                size = ROWS.get(device, chunk)
                for first in range(0, len(hidden_CD), size):
                    few = slice(first, first + size)
                    if isinstance(teacher, HiddenTarget):
                        sums_2 += rows.losses(raw_CV[few], labels_N[chunk_N][few], teacher.head, teacher_raw_CV[few])
                    else:
                        sums_2 += rows.losses(raw_CV[few], labels_N[chunk_N][few], teacher.part(few))
                # The gradient is largest where student and teacher disagree, about 1: safe in half precision until the
                # share of a position in the mean is applied, after the product.
                if grad_ND is not None:
                    grad_ND[chunk_N] = (raw_CV @ student.weight_VD).to(grad_ND.dtype) / count
                if grad_VD is not None:
                    grad_VD += (raw_CV.T @ hidden_CD).to(grad_VD.dtype) / count
                if grad_V is not None:
                    grad_V += raw_CV.sum(0).to(grad_V.dtype) / count
        ctx.save_for_backward(grad_ND, grad_VD, grad_V)
        kl, ce = temperature**2 * sums_2[0] / count, sums_2[1] / labelled
        ctx.mark_non_differentiable(kl, ce)
        ctx.set_materialize_grads(False)
        return (1 - mix) * kl + mix * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients that the forward pass left."""
        scale = grad_outputs[0]
        grads = (None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None, None, None)


class _Rows:
    """The elementwise part, over buffers that all rows share.

    Args:
        student: The student's head.
        temperature: ``T``.
        mix: ``m``.
        label_weight: Factor on the gradient of the cross-entropy, whose mean is over fewer positions.
    """

    def __init__(self, student: Head, temperature: float, mix: float, label_weight: float) -> None:
        self.student, self.temperature, self.mix, self.label_weight = student, temperature, mix, label_weight
        self.buffers: dict[str, Tensor] = {}

    def product(self, name: str, hidden_CD: Tensor, head: Head) -> Tensor:
        """``hidden @ weightᵀ + bias``, in a buffer of that name."""
        raw_CV = self._buffer(name, len(hidden_CD), hidden_CD.dtype)
        torch.mm(hidden_CD, head.weight_VD.T, out=raw_CV)
        return raw_CV if head.bias_V is None else raw_CV.add_(head.bias_V)

    def losses(
        self, raw_RV: Tensor, labels_R: Tensor, teacher: Head | TopKTarget, teacher_raw_RV: Tensor | None = None
    ) -> Tensor:
        """Sums of divergence (without the factor T²) and cross-entropy over some rows.

        Afterwards ``raw`` holds the gradient of ``(1 - m) T² KL + m * label_weight * CE`` over what it held before.
        """
        z_RV = self._logits("z", raw_RV, self.student)
        tempered_RV = z_RV
        if self.temperature != 1:
            tempered_RV = torch.div(z_RV, self.temperature, out=self._buffer("tempered", len(z_RV), z_RV.dtype))
        q_RV, log_norm_R = self._softmax("q", tempered_RV)
        if isinstance(teacher, Head):
            assert teacher_raw_RV is not None
            kl_R, grad_RV = self._from_logits(tempered_RV, q_RV, log_norm_R, teacher, teacher_raw_RV)
        else:
            kl_R, grad_RV = self._from_top_k(tempered_RV, q_RV, log_norm_R, teacher)
        grad_RV *= (1 - self.mix) * self.temperature
        if self.temperature != 1:
            q_RV, log_norm_R = self._softmax("q", z_RV)
        known_R, label_R1 = labels_R != IGNORED, labels_R.clamp_min(0)[:, None]
        ce_R = torch.where(known_R, log_norm_R - z_RV.gather(1, label_R1)[:, 0], 0)
        if self.mix:
            share_R1 = (self.mix * self.label_weight * known_R.to(z_RV.dtype))[:, None]
            grad_RV.addcmul_(q_RV, share_R1).scatter_add_(1, label_R1, -share_R1)
        if self.student.softcap is not None:
            grad_RV *= z_RV.div_(self.student.softcap).square_().neg_().add_(1)
        if self.student.scale != 1:
            grad_RV *= self.student.scale
        raw_RV.copy_(grad_RV)
        return torch.stack([kl_R.sum(), ce_R.sum()])

    def _from_logits(
        self, z_RV: Tensor, q_RV: Tensor, log_norm_R: Tensor, head: Head, raw_RV: Tensor
    ) -> tuple[Tensor, Tensor]:
        own_RV = self._logits("own", raw_RV, head)
        if self.temperature != 1:
            own_RV /= self.temperature
        p_RV, own_log_norm_R = self._softmax("p", own_RV)
        kl_R = own_RV.sub_(z_RV).mul_(p_RV).sum(-1) - own_log_norm_R + log_norm_R
        return kl_R, torch.sub(q_RV, p_RV, out=own_RV)

    def _from_top_k(self, z_RV: Tensor, q_RV: Tensor, log_norm_R: Tensor, target: TopKTarget) -> tuple[Tensor, Tensor]:
        tokens_RK, log_p_RK = target.tokens_NK.long(), target.log_probs_NK.to(z_RV.dtype)
        p_RK = log_p_RK.exp()
        rest_p_R = (1 - p_RK.sum(-1)).clamp_min(0)
        others_RV = self._buffer("own", len(q_RV), q_RV.dtype).copy_(q_RV).scatter_(1, tokens_RK, 0)
        rest_q_R = others_RV.sum(-1).clamp_min(torch.finfo(z_RV.dtype).tiny)
        kl_R = (p_RK * (log_p_RK - z_RV.gather(1, tokens_RK) + log_norm_R[:, None])).sum(-1)
        kl_R += torch.xlogy(rest_p_R, rest_p_R / rest_q_R)
        others_RV *= (1 - rest_p_R / rest_q_R)[:, None]
        return kl_R, others_RV.scatter_(1, tokens_RK, q_RV.gather(1, tokens_RK) - p_RK)

    def _logits(self, name: str, raw_RV: Tensor, head: Head) -> Tensor:
        exact = torch.promote_types(raw_RV.dtype, torch.float32)
        z_RV = self._buffer(name, len(raw_RV), exact).copy_(raw_RV)
        if head.scale != 1:
            z_RV *= head.scale
        return z_RV if head.softcap is None else z_RV.div_(head.softcap).tanh_().mul_(head.softcap)

    def _softmax(self, name: str, z_RV: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax, and the logarithm of its normaliser."""
        q_RV = torch.softmax(z_RV, dim=-1, out=self._buffer(name, len(z_RV), z_RV.dtype))
        return q_RV, z_RV.amax(-1) - q_RV.amax(-1).log()

    def _buffer(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        if name not in self.buffers:
            weight_VD = self.student.weight_VD
            self.buffers[name] = torch.empty(rows, len(weight_VD), dtype=dtype, device=weight_VD.device)
        return self.buffers[name][:rows]
