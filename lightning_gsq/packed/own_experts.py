"""Packed experts of those classes of transformers that run their experts by a loop or a batched product of their own.

What a class computes is written here once more, over tokens sorted by expert, and takes the place of its forward pass
where its weights are packed. Classes are known by where they are defined, so that no model's code is imported for it;
those that are not listed get dense matrices where they ask for them, and a line says so when the model is loaded.

    DbrxExperts             experts in rows of one matrix, down projections ``I O``
    InklingSharedExperts    every token to every expert
    JetMoeParallelExperts   tokens come sorted, of the feed-forward and of the attention's experts
    Llama4TextExperts       every token to every expert, times 0 where it was not chosen
    LongcatFlashExperts     experts beyond the last give a token back as it is
    Step3p7Experts          a gate of its own
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gsq.packed.expert_products import over_sorted, product
from lightning_gsq.packed.layers import PackedExperts

ROWS = ("transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU",)
"""Classes whose parameters hold experts in rows of one matrix, and whose products are made here."""
_log = logging.getLogger(__name__)


def class_name(module: nn.Module) -> str:
    """Where a module's class is defined, and its name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def run_own_experts(model: nn.Module) -> None:
    """Lets the listed classes run over sorted tokens where they have packed weights, and names others that have."""
    taken: set[nn.Module] = set()
    for module in model.modules():
        forward = FORWARDS.get(class_name(module))
        packed = [part for part in module.modules() if isinstance(part, PackedExperts)] if forward else []
        if forward is not None and packed:
            module.forward = MethodType(forward, module)
            taken.update(packed)
    others = {
        type(owner).__name__: None
        for owner in model.modules()
        if not hasattr(owner, "has_gate")  # transformers' interface runs those that have
        and any(isinstance(part, PackedExperts) and part not in taken for part in owner.children())
    }
    if others:
        _log.warning(
            "experts of %s run by their class's own code, with their matrices made dense for each product: "
            "slower, and with more memory, than experts that transformers runs through its interface",
            ", ".join(others),
        )


def _dbrx(self: Any, hidden: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    gate, up, down = (
        weight if isinstance(weight, PackedExperts) else weight.view(-1, self.ffn_hidden_size, self.hidden_size)
        for weight in (self.mlp.w1, self.mlp.v1, self.mlp.w2)
    )

    def compute(x_SD: Tensor, _: Tensor, offsets_E: Tensor) -> Tensor:
        hidden_SF = self.mlp.activation_fn(product(gate, x_SD, offsets_E)) * product(up, x_SD, offsets_E)
        return product(down, hidden_SF, offsets_E, transposed=True)

    total_ND = over_sorted(hidden.reshape(-1, self.hidden_size), index_NK, weights_NK, int(self.num_experts), compute)
    return total_ND.view(len(hidden), -1, self.hidden_size)


def _inkling_shared(self: Any, hidden: Tensor, gammas: Tensor) -> Tensor:
    experts, x_ND = int(self.n_shared_experts), hidden.reshape(-1, hidden.shape[-1])
    x_SD, offsets_E = x_ND.repeat(experts, 1), _equal_shares(len(x_ND), experts, hidden.device)
    gammas_S1 = gammas.reshape(-1, experts, 1).transpose(0, 1).reshape(-1, 1)
    hidden_SF = self.act_fn(product(self.gate_proj, x_SD, offsets_E)) * product(self.up_proj, x_SD, offsets_E)
    output_SD = product(self.down_proj, hidden_SF * gammas_S1, offsets_E)
    total_ND = output_SD.view(experts, *x_ND.shape).float().sum(dim=0)
    return total_ND.to(hidden.dtype).view(hidden.shape)


def _jetmoe(self: Any, inputs_SI: Tensor, expert_size: Sequence[int]) -> Tensor:
    offsets_E = torch.tensor([0, *expert_size], device=inputs_SI.device).cumsum(0)
    return product(self.weight, inputs_SI, offsets_E)


def _llama4(self: Any, hidden_SD: Tensor) -> Tensor:
    """As the class does, but for tokens that are all zeros: those come out as zeros without a product.

    They are the tokens that did not choose an expert. Gradients with respect to them are no zeros, so that all tokens
    are multiplied where gradients are asked for.
    """
    experts, order_S = int(self.num_experts), torch.arange(len(hidden_SD), device=hidden_SD.device)
    offsets_E = _equal_shares(len(hidden_SD) // experts, experts, hidden_SD.device)
    if not (torch.is_grad_enabled() and hidden_SD.requires_grad):
        expert_S = order_S // max(1, len(hidden_SD) // experts)
        expert_S, order_S = torch.where(hidden_SD.any(dim=1), expert_S, experts).sort(stable=True)
        offsets_E = torch.searchsorted(expert_S, torch.arange(experts + 1, device=hidden_SD.device))
    gate_SF, up_SF = product(self.gate_up_proj, hidden_SD[order_S], offsets_E, transposed=True).chunk(2, dim=-1)
    output_SD = product(self.down_proj, up_SF * self.act_fn(gate_SF), offsets_E, transposed=True)
    return torch.empty_like(output_SD).index_copy(0, order_S, output_SD)


def _longcat(self: Any, hidden_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    routed, more = int(self.num_routed_experts), int(self.zero_expert_num)

    def compute(x_SD: Tensor, _: Tensor, offsets_E: Tensor) -> Tensor:
        of_all = torch.cat([offsets_E, offsets_E[-1:].expand(more)])  # this weight has matrices for those as well
        gate_SF, up_SF = product(self.gate_up_proj, x_SD, of_all).chunk(2, dim=-1)
        return product(self.down_proj, self.act_fn(gate_SF) * up_SF, offsets_E)

    total_ND = over_sorted(hidden_ND, index_NK, weights_NK, routed, compute)
    return total_ND + (hidden_ND * weights_NK.masked_fill(index_NK < routed, 0).sum(1, keepdim=True)).to(total_ND.dtype)


def _step3p7(self: Any, hidden_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    def compute(x_SD: Tensor, _: Tensor, offsets_E: Tensor) -> Tensor:
        hidden_SF = self._apply_gate(product(self.gate_up_proj, x_SD, offsets_E))
        return product(self.down_proj, hidden_SF, offsets_E)

    return over_sorted(hidden_ND, index_NK, weights_NK, int(self.num_experts), compute)


def _equal_shares(tokens: int, experts: int, device: torch.device) -> Tensor:
    """Where each expert's tokens begin, if each has so many."""
    return torch.arange(experts + 1, device=device) * tokens


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "transformers.models.dbrx.modeling_dbrx.DbrxExperts": _dbrx,
    "transformers.models.inkling.modeling_inkling.InklingSharedExperts": _inkling_shared,
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": _jetmoe,
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": _llama4,
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": _longcat,
    "transformers.models.step3p7.modeling_step3p7.Step3p7Experts": _step3p7,
}
"""What takes the place of a class's own forward pass, by where the class is defined."""
