"""Experts that few tokens reach: more sequences for them, every token to every one of them, and what a run says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import GptOssConfig, PreTrainedModel, Qwen3MoeConfig

from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.all_experts import all_experts, unreachable
from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.experts import find_experts
from lightning_gsq.models.linear_weights import LinearSite, find_linear_sites
from lightning_gsq.quantizers import RTN, InputStatistics
from lightning_gsq.run.calibration import tokens_of_experts
from lightning_gsq.training import ModelQuantization
from tests.support.decoders import DECODERS
from tests.support.runs import summary_of, write_config
from tests.support.tiny import COMMON, FAMILIES, byte_tokenizer, random_model

KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_moe": FAMILIES["qwen3_moe"],
    "dbrx": DECODERS["dbrx"],
    "gpt_oss": lambda: random_model(
        GptOssConfig(**COMMON, head_dim=8, num_local_experts=4, layer_types=["sliding_attention", "full_attention"])
    ),
}


def _block(model: PreTrainedModel) -> tuple[nn.Module, list[LinearSite], Tensor, Any]:
    traced = trace(model, torch.arange(16)[None])
    block, hidden_BTD, call = find_blocks(model)[1][0], traced.inputs_BTD[0], traced.calls[0]
    return block, find_linear_sites(block, lambda: run_block(block, hidden_BTD, call)), hidden_BTD, call


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_goes_to_every_expert_and_the_block_gives_what_it_gave(kind: str) -> None:
    block, sites, hidden_BTD, call = _block(KINDS[kind]())
    (place,) = find_experts(block, sites)
    assert unreachable(block, [place], lambda: run_block(block, hidden_BTD, call)) is None
    before = run_block(block, hidden_BTD, call)
    ours = {part for parts in place.parts for part in parts}
    routed, everything = (InputStatistics(sites, torch.device("cpu")) for _ in range(2))
    with routed.watching(block):
        run_block(block, hidden_BTD, call)
    others = {(site.name, 0) for site in sites if not site.experts}
    with all_experts(block, [place], lambda: everything.watching(block, ours)), everything.watching(block, others):
        assert torch.equal(run_block(block, hidden_BTD, call), before)
    first = next(site for site in sites if site.name == place.parts[0][0][0])
    assert everything.tokens(first) == [16] * 4  # all of them
    hessians = everything.hessians(first)
    assert all(torch.equal(hessian, hessians[0]) for hessian in hessians)
    wanted = sum(h * n for h, n in zip(routed.hessians(first), routed.tokens(first), strict=True))
    top = sum(routed.tokens(first)) // 16  # each token was counted as often as it has experts
    torch.testing.assert_close(hessians[0] * 16 * top, wanted, rtol=1e-4, atol=1e-4)
    assert tokens_of_experts(everything, [place])[place.name] == routed.tokens(first)
    for site in sites:
        if not site.experts:
            assert torch.equal(everything.hessians(site)[0], routed.hessians(site)[0])


class _Listed(nn.Module):
    """A mixture whose experts lie in a list; ``shifted`` ones get something else than what enters."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Module()
        self.mlp.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.mlp.forward = self._mix
        self.shifted = shifted

    def _mix(self, x_ND: Tensor) -> Tensor:
        first = self.mlp.experts[0]((x_ND + 1 if self.shifted else x_ND)[:2])
        return x_ND + first.sum(0) + self.mlp.experts[1](x_ND[2:]).sum(0)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.mlp(x_ND)


def test_experts_in_a_list_get_what_enters_the_module_around_them() -> None:
    x_ND = torch.randn(5, 8)
    block = _Listed(shifted=False)
    sites = [LinearSite(f"mlp.experts.{i}.weight", 0, 8, 8, False) for i in range(3)]
    (place,) = find_experts(block, sites)
    assert unreachable(block, [place], lambda: block(x_ND)) is None
    statistics = InputStatistics(sites, torch.device("cpu"))
    ours = {part for parts in place.parts for part in parts}
    with all_experts(block, [place], lambda: statistics.watching(block, ours)), statistics.watching(block, set()):
        block(x_ND)
    assert [statistics.tokens(site) for site in sites] == [[5], [5], [5]]
    assert tokens_of_experts(statistics, [place]) == {"mlp.experts": [2, 3, 0]}
    other = _Listed(shifted=True)
    assert "not those that enter" in str(unreachable(other, [place], lambda: other(x_ND)))


def test_experts_that_are_given_their_tokens_already_are_refused() -> None:
    block, sites, hidden_BTD, call = _block(DECODERS["llama4"]())
    places = find_experts(block, sites)
    reason = unreachable(block, places, lambda: run_block(block, hidden_BTD, call))
    assert reason is not None and "numbers of the experts" in reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"moe_min_tokens_per_expert": 0}, "moe_min_tokens_per_expert must be at least 1"),
        ({"moe_max_extra_sequences": 0}, "moe_max_extra_sequences must be at least 1"),
        ({"moe_min_tokens_per_expert": 9, "moe_calibrate_all_experts": True}, "leave one of them out"),
        ({"moe_calibrate_all_experts": True, "warm_start": RTN(weighted=False)}, "looks at no calibration inputs"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ModelQuantization("m", **settings)


def test_a_run_with_more_sequences_for_rare_experts(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Qwen3MoeConfig(**COMMON, head_dim=8, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2)
    random_model(config).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    settings = {"model__hessian_sequences": 2, "trainer__max_steps": 2, "data__num_sequences": 8}
    for name, more in (("few", {"model__phases": ["init"]}), ("enough", {"model__moe_min_tokens_per_expert": 30})):
        path = write_config(tmp_path / "m", corpus, tmp_path / name, **settings, **more)
        assert main(["fit", "--config", str(path)]) == 0
    printed = capsys.readouterr().out
    few, enough = (summary_of(tmp_path / name) for name in ("few", "enough"))
    places = [f"model.layers.{index}.mlp.experts" for index in (0, 1)]
    assert list(few["experts"]) == list(enough["experts"]) == places
    for place in places:
        before, after = few["experts"][place]["tokens"], enough["experts"][place]["tokens"]
        assert sum(before) == 2 * 64 and min(before) < 30 <= min(after)
    # The first block's inputs are the same in both: experts with enough tokens saw no more.
    pairs = zip(few["experts"][places[0]]["tokens"], enough["experts"][places[0]]["tokens"], strict=True)
    assert all(after == before for before, after in pairs if before >= 30)
    assert "experts saw fewer than 30 tokens in 2 sequences; with" in printed
    assert "16 in 2 blocks" in " ".join(printed.split())
    assert not any("experts" in block for block in enough["blocks"].values())
    board = EventAccumulator(str(tmp_path / "enough" / "run" / "tensorboard"))
    board.Reload()
    least = [event.value for event in board.Scalars("experts/fewest_tokens")]
    assert least == [min(enough["experts"][place]["tokens"]) for place in places]
    assert "experts/tokens" in board.Tags()["images"]
    recipe = (tmp_path / "few" / "run" / "recipe.yaml").read_text()
    assert "moe_" not in recipe


def test_a_model_without_experts_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    path = write_config(tmp_path / "m", corpus, tmp_path / "r", model__moe_calibrate_all_experts=True)
    assert main(["fit", "--config", str(path)]) != 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "model.moe_calibrate_all_experts: LlamaForCausalLM has no experts" in said
