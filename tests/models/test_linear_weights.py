"""Which parameters are linear weights, however a block multiplies with them, and which of those are left out."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig

from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.left_out import lines, reasons
from lightning_gsq.models.linear_weights import LinearSite, find_all_sites, find_linear_sites, to_quantize, watch_inputs
from lightning_gsq.models.roles import GATE, INDEXER, ROUTER, STATE
from lightning_gsq.models.survey import survey
from tests.support.decoders import DECODERS
from tests.support.published import CONFIGS
from tests.support.tiny import FAMILIES, VOCABULARY, random_model

D, O, E, T = 16, 24, 3, 7  # noqa: E741 - out_features


class Block(nn.Module):
    """A block whose forward is a function of itself and its input."""

    def __init__(self, function: Callable[["Block", Tensor], object], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.function = function

    def forward(self, x_TD: Tensor) -> object:
        """Calls it."""
        return self.function(self, x_TD)


def sites_of(block: nn.Module) -> dict[str, LinearSite]:
    return {site.name: site for site in find_all_sites(block, lambda: block(torch.randn(T, D)))}


PLAIN: list[tuple[str, Callable[[Block, Tensor], object], tuple[int, ...], bool]] = [
    ("linear", lambda b, x: nn.functional.linear(x, b.w), (O, D), False),
    ("linear by name", lambda b, x: nn.functional.linear(x, weight=b.w), (O, D), False),
    ("all by name", lambda b, x: nn.functional.linear(input=x, weight=b.w), (O, D), False),
    ("x @ W", lambda b, x: x @ b.w, (D, O), True),
    ("x @ W.T", lambda b, x: x @ b.w.T, (O, D), False),
    ("W @ x", lambda b, x: b.w @ x.T, (O, D), False),
    ("W.T @ x", lambda b, x: b.w.T @ x.T, (D, O), True),
    ("W @ vector", lambda b, x: b.w @ x[0], (O, D), False),
    ("addmm", lambda b, x: torch.addmm(torch.zeros(O), x, b.w), (D, O), True),
    ("mm by name", lambda b, x: torch.mm(x, mat2=b.w), (D, O), True),
    ("expanded", lambda b, x: torch.bmm(x.expand(2, T, D), b.w.expand(2, D, O)), (D, O), True),
    ("einsum", lambda b, x: torch.einsum("td,od->to", x, b.w), (O, D), False),
    ("einsum, turned", lambda b, x: torch.einsum("do,td->to", b.w, x), (D, O), True),
    ("einsum of any batch", lambda b, x: torch.einsum("...d, do -> ...o", x, b.w), (D, O), True),
    ("einsum of heads", lambda b, x: torch.einsum("thd,hdo->to", x.view(T, 2, 8), b.w), (2, 8, O), True),
    ("in two pieces", lambda b, x: (x @ b.w[:8].T, x @ b.w[8:].T), (O, D), False),
    ("in three equal pieces", lambda b, x: [x @ part.T for part in b.w.chunk(3)], (O, D), False),
]


@pytest.mark.parametrize(("function", "shape", "transposed"), [p[1:] for p in PLAIN], ids=[p[0] for p in PLAIN])
def test_every_way_to_multiply(
    function: Callable[[Block, Tensor], object], shape: tuple[int, ...], transposed: bool
) -> None:
    block, seen = Block(function, w=shape), list[Tensor]()
    site = sites_of(block)["w"]
    assert (site.experts, site.out_features, site.in_features, site.transposed) == (0, O, D, transposed)
    assert torch.equal(site.from_matrix(site.to_matrix(block.w)), block.w)
    x_TD = torch.randn(T, D)
    with watch_inputs(block, lambda _, __, inputs: seen.append(inputs)):
        block(x_TD)
    assert seen and all(torch.equal(inputs.reshape(-1, D)[0], x_TD[0]) for inputs in seen)


def _each(block: Block, x: Tensor) -> object:
    return [x[e : e + 2] @ block.w.view(E, O, D)[e].T for e in range(E)]


EXPERTS: list[tuple[str, Callable[[Block, Tensor], object], tuple[int, ...], bool]] = [
    ("bmm", lambda b, x: torch.bmm(x[:6].view(E, 2, D), b.w), (E, D, O), True),
    ("bmm, turned", lambda b, x: torch.bmm(x[:6].view(E, 2, D), b.w.transpose(1, 2)), (E, O, D), False),
    ("baddbmm", lambda b, x: torch.baddbmm(torch.zeros(E, 2, O), x[:6].view(E, 2, D), b.w), (E, D, O), True),
    ("matmul", lambda b, x: x[:6].view(E, 2, D) @ b.w, (E, D, O), True),
    ("einsum", lambda b, x: torch.einsum("etd,eod->eto", x[:6].view(E, 2, D), b.w), (E, O, D), False),
    ("einsum, batch last", lambda b, x: torch.einsum("tde,eod->teo", x[:6].view(2, D, E), b.w), (E, O, D), False),
    ("one by one", lambda b, x: [x[e : e + 2] @ b.w[e] for e in range(E)], (E, D, O), True),
    ("fused along rows", _each, (E * O, D), False),
]


@pytest.mark.parametrize(("function", "shape", "transposed"), [p[1:] for p in EXPERTS], ids=[p[0] for p in EXPERTS])
def test_every_way_to_fuse_experts(
    function: Callable[[Block, Tensor], object], shape: tuple[int, ...], transposed: bool
) -> None:
    block, seen = Block(function, w=shape), dict[int, Tensor]()
    site = sites_of(block)["w"]
    assert (site.experts, site.out_features, site.in_features, site.transposed) == (E, O, D, transposed)
    assert torch.equal(site.from_matrix(site.to_matrix(block.w)), block.w)
    with watch_inputs(block, lambda _, expert, inputs: seen.update({expert: inputs})):
        block(torch.randn(T, D))
    assert sorted(seen) == [0, 1, 2] and all(inputs.shape == (2, D) for inputs in seen.values())
    assert not torch.equal(seen[0], seen[1])


def test_what_is_no_matrix_is_left_alone() -> None:
    def run(block: Block, x: Tensor) -> object:
        return nn.functional.conv1d(x.T[None], block.kernel, groups=D), x * block.factors[:T], x @ x.T

    block = Block(run, kernel=(D, 1, 2), factors=(T, D))
    assert sites_of(block) == {}
    assert reasons(block, [], []) == dict.fromkeys(["kernel", "factors"], "no matrix product with it was seen")


# -- experts in a list


class ListedExperts(nn.Module):
    """Top-2 of many small experts in a list, as models with code of their own have them."""

    def __init__(self, experts: int = 16) -> None:
        super().__init__()
        self.router = nn.Linear(D, experts, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, O), nn.SiLU(), nn.Linear(O, D)) for _ in range(experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Runs the chosen experts alone."""
        weights_TK, chosen_TK = self.router(x_TD).softmax(-1).topk(2)
        output_TD = torch.zeros_like(x_TD)
        for index in chosen_TK.unique().tolist():
            token, rank = (chosen_TK == index).nonzero(as_tuple=True)
            output_TD[token] += weights_TK[token, rank, None] * self.experts[index](x_TD[token])
        return output_TD


def test_experts_that_no_token_reaches_are_known_by_their_siblings() -> None:
    block, reached = ListedExperts(), set[str]()
    x_TD = torch.randn(3, D)
    with watch_inputs(block, lambda name, _, __: reached.add(name)):
        block(x_TD)
    sites = {site.name: site for site in find_all_sites(block, lambda: block(x_TD))}
    assert len(reached) < 1 + 2 * 16 == len(sites)
    assert sites["router.weight"].role == ROUTER
    assert sites["experts.15.0.weight"] == LinearSite("experts.15.0.weight", 0, O, D, False)


def test_rows_that_happen_to_be_as_many_as_experts_are_no_router() -> None:
    """Qwen3-Next-80B has as many experts as its key projection has rows."""
    model = DECODERS["qwen3_next"]()
    block, surveyed = find_blocks(model)[1][1], survey(model)
    sites = find_all_sites(block, lambda: run_block(block, surveyed.inputs_BTD[1], surveyed.bound_call(1)))
    rows = {site.name: site.rows for site in sites}
    assert rows["self_attn.k_proj.weight"] == rows["mlp.shared_expert.up_proj.weight"] == rows["mlp.gate.weight"] == 16
    assert {site.name: site.role for site in sites if site.role} == {
        "mlp.gate.weight": ROUTER,
        "mlp.shared_expert_gate.weight": GATE,
    }


# -- roles


ROLES_OF = {
    "dbrx": {"ffn.router.layer.weight": ROUTER},
    "gemma3n": {
        "altup.correction_coefs.weight": GATE,
        "altup.prediction_coefs.weight": GATE,
        "altup.modality_router.weight": GATE,
    },
    "llama4": {"feed_forward.router.weight": ROUTER},
    "mamba": {"mixer.x_proj.weight": STATE, "mixer.dt_proj.weight": STATE},
    "mixtral": {"mlp.gate.weight": ROUTER},
    "qwen3_next": {
        "linear_attn.in_proj_ba.weight": STATE,
        "mlp.gate.weight": ROUTER,
        "mlp.shared_expert_gate.weight": GATE,
    },
    "bloom": {},
    "llama": {},
}


@pytest.mark.parametrize("name", ROLES_OF)
def test_roles(name: str) -> None:
    model = {**FAMILIES, **DECODERS}[name]()
    block, surveyed = find_blocks(model)[1][0], survey(model)
    sites = find_all_sites(block, lambda: run_block(block, surveyed.inputs_BTD[0], surveyed.bound_call(0)))
    assert {site.name: site.role for site in sites if site.role} == ROLES_OF[name]


@pytest.mark.parametrize("state_size", [8, 16])
def test_mambas_output_has_no_role_even_in_the_shape_of_its_input_to_the_state(state_size: int) -> None:
    """With states of 16 both are 64 by 128."""
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, state_size=state_size, time_step_rank=32
    )
    model = random_model(config)
    block, surveyed = find_blocks(model)[1][0], survey(model)
    sites = find_all_sites(block, lambda: run_block(block, surveyed.inputs_BTD[0], surveyed.bound_call(0)))
    assert {site.name: site.role for site in sites if site.role} == ROLES_OF["mamba"]


def test_a_partner_of_a_time_step_is_one_of_its_inputs() -> None:
    def run(block: Block, x: Tensor) -> object:
        step = nn.functional.softplus(x @ block.step.weight.T)
        decay = (x @ block.decay.weight.T).sigmoid()
        return (step * decay) @ block.out.weight.T

    block = Block(run)
    for name in ("step", "decay", "out"):
        setattr(block, name, nn.Linear(D, D, bias=False))
    roles = {site.name: site.role for site in find_all_sites(block, lambda: block(torch.randn(T, D)))}
    assert roles == {"step.weight": STATE, "decay.weight": STATE, "out.weight": ""}


def test_an_indexer_is_several_weights_behind_one_choice() -> None:
    def run(block: Block, x: Tensor) -> object:
        score = ((x @ block.q) @ nn.functional.layer_norm(x @ block.k, (O,)).T).relu() * (x @ block.heads).mean(-1)
        chosen = score.topk(2).indices
        return (x @ block.v)[chosen]

    block = Block(run, q=(D, O), k=(D, O), heads=(D, 8), v=(D, O))
    roles = {site.name: site.role for site in find_all_sites(block, lambda: block(torch.randn(T, D)))}
    assert roles == {"q": INDEXER, "k": INDEXER, "heads": INDEXER, "v": ""}


def test_a_largest_value_is_no_choice_and_a_largest_position_is() -> None:
    def scaled(block: Block, x: Tensor) -> object:
        y = x @ block.w
        return y / y.abs().max(-1, keepdim=True).values

    def chosen(block: Block, x: Tensor) -> object:
        scores = x @ block.w
        best = scores.max(-1).indices
        return scores.gather(-1, best[:, None])

    roles = [
        find_all_sites(b := Block(f, w=(D, O)), lambda b=b: b(torch.randn(T, D)))[0].role for f in (scaled, chosen)
    ]
    assert roles == ["", ROUTER]


def test_what_has_a_role_is_taken_in_by_name() -> None:
    names = ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
    sites = {name: LinearSite("mlp.gate.weight", 0, 16, 32, False, role=ROUTER) for name in names}
    sites["model.layers.0.mlp.up_proj.weight"] = LinearSite("mlp.up_proj.weight", 0, 16, 32, False)
    up = ["model.layers.0.mlp.up_proj.weight"]
    for pattern in ("*", "*.mlp.*", "model.layers.?.*", "*gat*", "*.weight"):
        assert to_quantize(sites, [pattern]) == up, pattern
    for pattern in ("*.mlp.gate", "*.gate", "*gate.weight", "model.layers.[01].mlp.gate"):
        assert to_quantize(sites, ["*", pattern]) == [*names, *up], pattern
    assert to_quantize(sites, ["*", "model.layers.1.mlp.gate"]) == [names[1], *up]


def test_lines_on_what_stays() -> None:
    left = {f"model.layers.{i}.mlp.gate.weight": (ROUTER, 512) for i in range(10)}
    (line,) = lines(left, 512_000)
    assert line == (
        "not quantized: model.layers.*.mlp.gate.weight (10 with 5,120 weights, 1.00% of the blocks): it chooses, as "
        "routers do; a pattern in model.include that names it takes it in"
    )


def test_the_default_set_has_no_roles() -> None:
    block = ListedExperts()
    assert "router.weight" not in {site.name for site in find_linear_sites(block, lambda: block(torch.randn(T, D)))}


def test_a_router_that_is_multiplied_with_in_fp32_is_one_in_half_precision_too() -> None:
    """Its product is with a copy then, and what comes before it must not be taken for what chooses."""
    model = random_model(CONFIGS["deepseek_v3"])
    ids = torch.arange(13)[None]
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        traced = trace(model, ids)
        block = find_blocks(model)[1][1]
        sites = find_all_sites(block, functools.partial(run_block, block, traced.inputs_BTD[1], traced.calls[1]))
        roles = {site.name: site.role for site in sites if site.role}
        assert list(roles) == ["mlp.gate.weight"], dtype
