"""One block of the quantized model during the end-to-end phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.training.student_weights import trainable_weight
from lightning_gsq.weights.quantized import QuantizedWeight


class _OwnForward(nn.Module):
    """The block's own forward as a module, also while another one stands in for it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it."""
        return type(self.block).forward(self.block, *args, **kwargs)


class StudentBlock(nn.Module):
    """Runs a full-precision block with quantized weights, and with norms of its own if these train.

    The full-precision block runs through it as well: where the model is spread over processes, this is the unit whose
    parameters, the original ones and these, are gathered while it runs.

    Args:
        block: The full-precision block; frozen, left as it is.
        tensors: The quantized weights; none for a block that is not quantized.
        norms: Names of the block's parameters to train beside them.
        codes: Whether the codes train too.
        recompute: Run forward again in the backward pass instead of keeping activations.
    """

    def __init__(
        self,
        block: nn.Module,
        tensors: Mapping[LinearSite, QuantizedWeight],
        norms: list[str],
        codes: bool,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.own = _OwnForward(block)
        self.sites, self.recompute = list(tensors), recompute
        self.weights = nn.ModuleList(
            trainable_weight(tensor, site.to_matrix(block.get_parameter(site.name).detach()) if codes else None)
            for site, tensor in tensors.items()
        )
        self.norm_names = norms
        self.norms = nn.ParameterList(
            nn.Parameter(block.get_parameter(name).detach().float().clone()) for name in norms
        )

    def forward(self, *args: Any, as_teacher: bool = False, **kwargs: Any) -> Any:
        """What the block returns, computed with the quantized weights, or with its own for the teacher."""
        if as_teacher:
            return self.own(*args, **kwargs)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        weights = dict(zip((f"block.{name}" for name in self.norm_names), self.norms, strict=True))
        for site, weight in zip(self.sites, self.weights, strict=True):
            original = self.own.block.get_parameter(site.name)
            device = original.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else original.dtype
            weights[f"block.{site.name}"] = site.from_matrix(weight(dtype))
        return torch.func.functional_call(self.own, weights, args, kwargs)

    def tensors(self) -> dict[str, QuantizedWeight]:
        """The quantized weights as they stand, by name inside the block."""
        return {
            site.name: weight.tensor()  # type: ignore[operator]
            for site, weight in zip(self.sites, self.weights, strict=True)
        }
