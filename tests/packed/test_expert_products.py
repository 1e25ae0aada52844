"""Packed fused experts over sorted tokens against the loops of transformers' own classes."""

import copy
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_gsq.models.expert_parallel import fused_parameters
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.packed.expert_products import NAME
from lightning_gsq.packed.layers import PackedExperts
from lightning_gsq.quantizers import RTN
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.weights.grid import Bits
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32}
EXPERTS = 6
KINDS = {
    "gated": (Qwen3MoeExperts, Qwen3MoeConfig(**SIZES, num_experts=EXPERTS)),
    "transposed, biases": (GptOssExperts, GptOssConfig(**SIZES, num_local_experts=EXPERTS)),
    "no gate": (NemotronHExperts, NemotronHConfig(**SIZES, n_routed_experts=EXPERTS, mlp_hidden_act="relu2")),
}


def _experts(kind: str, scheme: QuantScheme, only: str | None = None) -> Any:
    """Experts whose weights, or only one of them, are packed, and that run as their class says until told otherwise."""
    owner, config = KINDS[kind]
    module: Any = owner(copy.deepcopy(config))
    module.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    for name, parameter in fused_parameters(module).items():
        if parameter.ndim != 3 or only not in (None, name):
            continue
        shape = parameter.shape[1:][::-1] if module.is_transposed else parameter.shape[1:]
        site = LinearSite(name, EXPERTS, *shape, module.is_transposed)
        levels = torch.tensor(scheme.grid.levels, dtype=torch.int8)
        codes = levels[torch.randint(len(levels), (site.rows, site.in_features), generator=generator)]
        scales = torch.rand(site.rows, scheme.num_groups(site.in_features), generator=generator) / 8
        delattr(module, name)
        setattr(module, name, PackedExperts(scheme, site, torch.float32, dtype=torch.float32))
        getattr(module, name).fill(QuantizedTensor(codes, scales, scheme))
    return module.requires_grad_(False)


def _routed(tokens: int, chosen: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, their experts and weights; nobody chooses the last expert."""
    index = torch.rand(tokens, EXPERTS - 1, generator=generator).argsort(1)[:, :chosen]
    hidden, weights = torch.randn(tokens, 64, generator=generator), torch.rand(tokens, chosen, generator=generator)
    return hidden, index, weights


def _both(module: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    module.config._experts_implementation = "eager"
    loop = module(*inputs)
    module.config._experts_implementation = NAME
    return module(*inputs), loop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [1, 3])
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_what_the_loop_computes(kind: str, chosen: int, tokens: int) -> None:
    module = _experts(kind, QuantScheme(3, 32))
    grouped, loop = _both(module, *_routed(tokens, chosen, torch.Generator().manual_seed(tokens)))
    torch.testing.assert_close(grouped, loop, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gated", "transposed, biases"])
def test_the_same_numbers_where_experts_have_many_tokens(kind: str) -> None:
    """More than the C++ library takes: both make the weight dense, and add experts in the same order."""
    module = _experts(kind, QuantScheme(2, 32))
    hidden, index, weights = _routed(400, 4, torch.Generator().manual_seed(0))
    assert torch.bincount(index.flatten()).min() > 100
    if module.is_transposed:  # its loop multiplies by a transposed view
        torch.testing.assert_close(*_both(module, hidden, index, weights), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(*_both(module, hidden, index, weights))


@pytest.mark.parametrize("bits", [1, "ternary", 5])
def test_other_widths(bits: Bits) -> None:
    module = _experts("gated", QuantScheme(bits, 16))  # groups that the C++ library does not take
    grouped, loop = _both(module, *_routed(9, 2, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(grouped, loop, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["Q4_1", "IQ4_NL"])
def test_presets_of_ggml(preset: str) -> None:
    """Layouts that no kernel takes are made dense, expert by expert, as the loop has them."""
    module, scheme = _experts("gated", QuantScheme(3, 32)), QuantScheme(preset=preset)
    for name in ("gate_up_proj", "down_proj"):
        site = getattr(module, name).site
        tensor = quantized(RTN()(torch.randn(site.rows, site.in_features), None, scheme), scheme, torch.float16)
        delattr(module, name)
        setattr(module, name, PackedExperts(scheme, site, dtype=torch.float32).fill(tensor))
    assert torch.equal(*_both(module, *_routed(9, 2, torch.Generator().manual_seed(0))))


@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
def test_one_weight_of_two_is_packed(only: str) -> None:
    module = _experts("gated", QuantScheme(4, 16), only)
    grouped, loop = _both(module, *_routed(9, 2, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(grouped, loop, rtol=1e-5, atol=1e-5)


def test_experts_that_are_not_packed_run_as_their_class_says() -> None:
    module = _experts("gated", QuantScheme(4, 16), only="none")
    assert torch.equal(*_both(module, *_routed(9, 2, torch.Generator().manual_seed(0))))


def test_a_number_beyond_the_last_expert_is_no_expert() -> None:
    module = _experts("gated", QuantScheme(4, 16))
    hidden, index, weights = _routed(9, 2, torch.Generator().manual_seed(0))
    index[2:5, 1] = EXPERTS
    grouped, loop = _both(module, hidden, index, weights)
    torch.testing.assert_close(grouped, loop, rtol=1e-5, atol=1e-5)


def test_half_precision_autocast_gradients_and_no_token() -> None:
    module = _experts("gated", QuantScheme(3, 32))
    hidden, index, weights = _routed(40, 3, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(*_both(module, hidden, index, weights), rtol=4e-2, atol=4e-2)
    hidden.requires_grad_()
    own, usual = (torch.autograd.grad(y.square().sum(), hidden)[0] for y in _both(module, hidden, index, weights))
    torch.testing.assert_close(own, usual, rtol=1e-4, atol=1e-4)
    assert module(hidden[:0], index[:0], weights[:0]).shape == (0, 64)
    half = module.to(torch.bfloat16)
    grouped, loop = _both(half, hidden.bfloat16(), index, weights.bfloat16())
    assert grouped.dtype == torch.bfloat16
    torch.testing.assert_close(grouped, loop, rtol=4e-2, atol=4e-2)


def test_it_compiles_as_one_graph() -> None:
    module = _experts("gated", QuantScheme(3, 32))
    inputs = _routed(9, 2, torch.Generator().manual_seed(0))
    module.config._experts_implementation = NAME
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
