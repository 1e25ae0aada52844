"""What a weight should be for what enters it in the quantized model, so that its outputs are those of the original.

When a matrix is quantized, blocks before it are already, and so are matrices before it in its block: what enters it,
``x``, is no longer what does in the full-precision model, ``f``, and nor are the hidden states that its outputs are
added to. With ``y`` what it leads to in the full-precision model, the sum where there is one, else ``W f``, and ``z``
the same for ``x``, the weights whose outputs come nearest are

    V = W + L (H + d)^-1,    L = mean of 2 (y - z) xᵀ,    H = mean of 2 x xᵀ,

which a quantizer that knows ``H`` is then asked to round: errors that came in are made up for, as far as one matrix
can. Without the sums it is the asymmetric calibration of GPTAQ (Li et al., arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.models.recording import Recording
from lightning_gsq.quantizers.gptq import factor
from lightning_gsq.quantizers.statistics import InputStatistics


class PairedStatistics:
    """Second moments of inputs, and how far outputs are off, from the same tokens in two models.

    Args:
        sites: Plain weights.
        device: Where to accumulate.
        summed: Names of those whose outputs are in a sum.
    """

    def __init__(self, sites: Iterable[LinearSite], device: torch.device, summed: Collection[str] = ()) -> None:
        self.sites, self.summed = list(sites), frozenset(summed)
        self.inputs = InputStatistics(self.sites, device)
        self._drift: dict[str, Tensor] = {}
        """Sums of ``(f - x) xᵀ``, ``I I``, of weights whose outputs are in no sum."""
        self._lack: dict[str, Tensor] = {}
        """Sums of ``(y - z) xᵀ``, ``O I``, of the others."""

    def add(self, original: Recording, quantized: Recording, weights: Mapping[str, Tensor] | None = None) -> None:
        """Takes in one run of the block in each model, over the same tokens.

        Args:
            original: That of the full-precision model.
            quantized: That of the quantized one.
            weights: How much each token counts, fp32 ``N``, by a weight's name; all alike where there is none.
        """
        weights, known = weights or {}, dict[tuple[int, int], Tensor]()  # queries, keys and values read one tensor
        self.inputs.weigh(weights)
        for site in self.sites:
            weight_N = weights.get(site.name)
            for full, own in zip(original.inputs[site.name], quantized.inputs[site.name], strict=True):
                self.inputs.see(site.name, 0, own)
                if site.name in self.summed:
                    off = original.sums[site.name], quantized.sums[site.name]
                    _sum(self._lack, site.name, _moment(*off, own, weight_N))
                    continue
                key = id(own), id(weight_N)
                if key not in known:
                    known[key] = _moment(full, own, own, weight_N)
                _sum(self._drift, site.name, known[key])

    def reduce(self, add: Callable[[Tensor], Tensor]) -> None:
        """Adds up what several processes have seen, some of them maybe nothing.

        Args:
            add: Sums a tensor over the processes, in place. Called in the same order everywhere.
        """
        self.inputs.reduce(add, self.sites)
        for site in self.sites:
            sums, rows = (self._lack, site.rows) if site.name in self.summed else (self._drift, site.in_features)
            if site.name not in sums:
                sums[site.name] = torch.zeros(rows, site.in_features, device=self.inputs.device)
            add(sums[site.name])

    def wanted(self, site: LinearSite, w_OI: Tensor, damping: float) -> Tensor:
        """``V`` of the module's first lines, fp32 ``O I``; the weight itself where no token came.

        Args:
            site: The weight.
            w_OI: fp32, what it is.
            damping: Added to the diagonal of ``H``, as a share of its mean.
        """
        count, (hessian_II,) = self.inputs.counts.get((site.name, 0), 0), self.inputs.hessians(site)
        if not count or not bool(hessian_II.any()):
            return w_OI
        lack_OI = self._lack[site.name] if site.name in self.summed else w_OI @ self._drift[site.name]
        return nearest(w_OI, lack_OI * (2 / count), hessian_II, damping)


def nearest(w_OI: Tensor, lack_OI: Tensor, hessian_II: Tensor, damping: float) -> Tensor:
    """``V`` of the module's first lines, fp32 ``O I``, from ``W``, ``L`` and ``H``."""
    return w_OI + torch.cholesky_solve(lack_OI.T, factor(hessian_II, damping)).T


def _moment(full: Tensor, own: Tensor, inputs: Tensor, weight_N: Tensor | None) -> Tensor:
    """The sum of ``(full - own) inputsᵀ`` over tokens."""
    with torch.autocast(inputs.device.type, enabled=False):
        off_NO = (full.float() - own.float()).flatten(0, -2)
        if weight_N is not None and len(weight_N) == len(off_NO):
            off_NO *= weight_N.to(off_NO.device)[:, None]
        return off_NO.T @ inputs.float().flatten(0, -2)


def _sum(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Adds a value that others may have a share in: the sum is a tensor of its own, which may be added to in place."""
    sums[name] = sums[name] + value if name in sums else value.clone()
