"""Packed experts of classes that leave no choice how they are run, against the same classes with dense weights."""

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.inkling.modeling_inkling import InklingSharedExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.packed.exchange import why_no_packed_form
from lightning_gsq.packed.layers import PackedExperts
from lightning_gsq.packed.own_experts import FORWARDS, class_name, run_own_experts
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

EXPERTS, WIDTH, INNER = 6, 64, 32
CONFIG: Any = SimpleNamespace(
    hidden_size=WIDTH,
    hidden_act="silu",
    intermediate_size=INNER,
    moe_intermediate_size=INNER,
    expert_ffn_hidden_size=INNER,
    num_local_experts=EXPERTS,
    n_shared_experts=EXPERTS,
    n_routed_experts=EXPERTS - 2,
    zero_expert_num=2,
)
MAKE: dict[str, Callable[[], nn.Module]] = {
    "dbrx": lambda: DbrxExperts(DbrxFFNConfig(hidden_size=WIDTH, ffn_hidden_size=INNER, moe_num_experts=EXPERTS)),
    "inkling": lambda: InklingSharedExperts(CONFIG),
    "jetmoe": lambda: JetMoeParallelExperts(EXPERTS, WIDTH, INNER),
    "llama4": lambda: Llama4TextExperts(CONFIG),
    "longcat": lambda: LongcatFlashExperts(CONFIG),
    "step3p7": lambda: Step3p7Experts(CONFIG, swiglu_limit=0.5),
}


def _both(kind: str, only: str = "") -> tuple[Any, Any]:
    """The class with packed weights, or with one of them packed, and with the same weights dense."""
    generator = torch.Generator().manual_seed(0)
    module: Any = MAKE[kind]().requires_grad_(False)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    dense, scheme = copy.deepcopy(module), QuantScheme(3, 16)
    levels = torch.tensor(scheme.grid.levels, dtype=torch.int8)
    for name, parameter in dense.named_parameters():
        if only not in name:
            continue
        owner, _, attribute = name.rpartition(".")
        transposed = kind == "llama4" or attribute == "w2"
        first, second = parameter.shape[-2] // (EXPERTS if kind == "dbrx" else 1), parameter.shape[-1]
        experts = EXPERTS if kind == "dbrx" else len(parameter)
        shape = tuple(parameter.shape) if kind == "dbrx" else ()
        sizes = (second, first) if transposed else (first, second)
        site = LinearSite(name, experts, *sizes, transposed, shape)
        codes = levels[torch.randint(len(levels), (site.rows, site.in_features), generator=generator)]
        scales = torch.rand(site.rows, scheme.num_groups(site.in_features), generator=generator) / 8
        packed = PackedExperts(scheme, site, torch.float32, dtype=torch.float32)
        parameter.data = packed.fill(QuantizedTensor(codes, scales, scheme)).dequantize()
        delattr(module.get_submodule(owner), attribute)
        setattr(module.get_submodule(owner), attribute, packed)
    return module, dense


def _inputs(kind: str, tokens: int = 9) -> tuple[Any, ...]:
    """What the class is called with; nobody chooses the fourth expert."""
    generator = torch.Generator().manual_seed(1)
    hidden_ND, scores_NE = (torch.randn(tokens, size, generator=generator) for size in (WIDTH, EXPERTS))
    scores_NE[:, 3] = -torch.inf
    weights_NK, index_NK = scores_NE.sigmoid().topk(2)
    if kind == "inkling":
        return hidden_ND[None], scores_NE.sigmoid()
    if kind == "jetmoe":
        counts = torch.bincount(index_NK.flatten(), minlength=EXPERTS).tolist()
        return hidden_ND.repeat(2, 1), counts
    if kind == "llama4":  # its router gives 0 to those that were not chosen
        chosen_NE = torch.zeros_like(scores_NE).scatter(1, index_NK, weights_NK)
        return ((hidden_ND.repeat(EXPERTS, 1) * chosen_NE.T.reshape(-1, 1)),)
    return hidden_ND[None] if kind == "dbrx" else hidden_ND, index_NK, weights_NK


@pytest.mark.parametrize("tokens", [1, 9, 60])
@pytest.mark.parametrize("kind", MAKE)
def test_what_the_class_computes(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = _both(kind)
    inputs = _inputs(kind, tokens)
    expected = dense(*inputs)
    run_own_experts(packed)
    for method in ("__getitem__", "dequantize"):  # nobody asks for a dense matrix of the packed weight
        monkeypatch.setattr(PackedExperts, method, None)
    torch.testing.assert_close(packed(*inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(packed)(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "only"),
    [
        ("dbrx", "w1"),
        ("dbrx", "w2"),
        ("llama4", "down"),
        ("llama4", "gate_up"),
        ("longcat", "down"),
        ("step3p7", "down"),
    ],
)
def test_one_weight_of_several_is_packed(kind: str, only: str) -> None:
    packed, dense = _both(kind, only)
    run_own_experts(packed)
    torch.testing.assert_close(packed(*_inputs(kind)), dense(*_inputs(kind)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MAKE)
def test_gradients_reach_the_inputs(kind: str) -> None:
    """Of Llama 4 as well those of tokens that are zeros."""
    packed, dense = _both(kind)
    run_own_experts(packed)
    gradients = []
    for module in (packed, dense):
        first, *others = _inputs(kind)
        hidden = first.requires_grad_()
        gradients.append(
            torch.autograd.grad(module(hidden, *others).square().sum() + module(hidden, *others).sum(), hidden)[0]
        )
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_no_token_chooses_any_expert() -> None:
    packed, _ = _both("llama4")
    run_own_experts(packed)
    assert torch.equal(packed(torch.zeros(EXPERTS, WIDTH)), torch.zeros(EXPERTS, WIDTH))
    assert packed(torch.zeros(0, WIDTH)).shape == (0, WIDTH)


class _Unknown(nn.Module):
    """Experts of a class that is nowhere listed: by number, in one product, and as a tensor's methods give them."""

    def __init__(self, weight_EOI: Any) -> None:
        super().__init__()
        self.weight = weight_EOI

    def forward(self, x_ENI: Tensor) -> Tensor:
        one_by_one = torch.stack([x_NI @ self.weight[e].T for e, x_NI in enumerate(x_ENI)])
        return one_by_one + torch.bmm(x_ENI, self.weight.transpose(1, 2)) + torch.matmul(x_ENI, self.weight.mT)


def test_other_classes_get_dense_matrices_and_a_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    listed, dense = _both("step3p7")
    with caplog.at_level(logging.WARNING):
        run_own_experts(listed)
    assert not caplog.records
    module, x_ENI = _Unknown(listed.gate_up_proj), torch.randn(EXPERTS, 5, WIDTH)
    with caplog.at_level(logging.WARNING):
        run_own_experts(nn.ModuleList([module, _Unknown(listed.down_proj)]))
    assert len(caplog.records) == 1 and "experts of _Unknown run by their class's own code" in caplog.text
    torch.testing.assert_close(module(x_ENI), 3 * torch.bmm(x_ENI, dense.gate_up_proj.mT), rtol=1e-5, atol=1e-5)


def test_rows_of_a_class_that_is_not_listed_have_no_packed_form() -> None:
    site = LinearSite("mlp.w1", EXPERTS, INNER, WIDTH, False, (EXPERTS * INNER, WIDTH))
    assert why_no_packed_form(MAKE["dbrx"]().get_submodule("mlp"), "w1", site) is None
    reason = why_no_packed_form(nn.Module(), "w1", site)
    assert reason == "holds experts in rows of one matrix of a Module, which has no packed form"


def test_the_list_names_every_such_class_of_transformers() -> None:
    """Classes with a parameter of all experts that are not run through transformers' interface."""
    of_experts = re.compile(
        r"nn\.Parameter\(\s*torch\.(?:empty|zeros|rand|randn|ones)\(\(?[^)]*experts[^)]*,[^)]*,[^)]*\)"
    )
    in_rows = re.compile(r"nn\.Parameter\(\s*torch\.empty\([^)]*experts \* [^)]*\)")
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        for part in re.split(r"(?m)^(?=class )", text):
            name = re.match(r"class (\w+)\(nn\.Module\)", part)
            if (
                name
                and not name[1].endswith(("Router", "Statics"))
                and (of_experts.search(part) or in_rows.search(part))
            ):
                before = text[: text.index(part)].rstrip().rpartition("\n\n")[2]
                if "use_experts_implementation" not in before:
                    found.add(f"transformers.models.{file.parent.name}.{file.stem}.{name[1]}")
    own = [module for make in MAKE.values() for module in make().modules()]
    assert set(FORWARDS) <= {class_name(module) for module in own}
    assert found == {class_name(module) for module in own if [*module.parameters(recurse=False)]}
