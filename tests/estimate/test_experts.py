"""Planning models of hundreds of experts: nothing of a block's size is made, and what would make it fit is counted."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_gsq.data import CalibrationDataModule, PythonDocumentation
from transformers import Qwen3MoeConfig

from lightning_gsq.estimate import advice, block_terms, simulate
from lightning_gsq.estimate.advice import LION, SHORTER, SPREAD, device_advice
from lightning_gsq.estimate.experts import most_experts, thinner
from lightning_gsq.estimate.quantities import Surroundings
from lightning_gsq.estimate.simulate import PassBytes, activation_bytes
from lightning_gsq.estimate.skeleton import Skeleton, make_skeleton
from lightning_gsq.models import loading
from lightning_gsq.quantizers import GumbelOptions
from lightning_gsq.run import forward_passes
from lightning_gsq.training import Lion, ModelQuantization
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.tiny import COMMON

CONFIGS = Path(__file__).parent / "configs"
PARAMETERS = {
    # as published, in billions; Kimi-K2.5 without its tower
    "deepseek-v3": 671.0,
    "kimi-k2.5": 1026.4,
    "qwen3-next-80b": 79.7,
    "gpt-oss-120b": 116.8,
}
AROUND = Surroundings(
    bf16=False, optimizer_state=2.0, file_bytes=0, device_room=None, accelerated=True, mapped=True, spread=1
)


def skeleton_of(folder: Path) -> Skeleton:
    source = loading.resolve(str(folder), need_weights=False)
    return make_skeleton(source, loading.load_config(source), "auto")


@pytest.fixture
def tiny(tmp_path: Path) -> Skeleton:
    config = Qwen3MoeConfig(
        **COMMON, head_dim=8, moe_intermediate_size=24, num_experts=40, num_experts_per_tok=2, dtype=torch.float32
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return skeleton_of(tmp_path)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configurations_in_little_memory(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    skeleton = skeleton_of(CONFIGS / name)
    assert skeleton.parameters / 1e9 == pytest.approx(PARAMETERS[name], abs=0.05)
    block = skeleton.blocks[-1]
    roles = {site.name: site.role for site in block.sites if site.role}
    assert all("gate" in role or "router" in role for role in roles), roles
    experts = next(site for site in block.sites if site.experts)
    gradient = 4 * experts.rows * experts.in_features
    assert activation_bytes(block, skeleton.width, 1, 64, True, training=True).peak > gradient
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 0.5e9


def test_what_some_experts_say_of_all(tiny: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    block = tiny.blocks[0]

    def peak(training: bool) -> int:
        return activation_bytes(block, tiny.width, 2, 64, False, training).peak

    few = [peak(training) for training in (False, True)]
    monkeypatch.setattr(simulate, "FEW_EXPERTS", (40, 40))
    assert few == [pytest.approx(peak(training), rel=0.05) for training in (False, True)]


def test_a_block_with_fewer_experts(tiny: Skeleton) -> None:
    block = tiny.blocks[0]
    fewer = thinner(block.module, 10)
    assert (most_experts(block.module), most_experts(fewer)) == (40, 10)
    whole, part = (dict(module.named_parameters()) for module in (block.module, fewer))
    assert all(4 * part[name].numel() == whole[name].numel() for name in whole if ".experts." in name)
    assert all(part[name].shape == whole[name].shape for name in whole if ".experts." not in name)


def test_a_block_of_a_trillion_parameters_on_eight_devices() -> None:
    """The published recipe: routed experts at 2 bits in groups of 128, here with bfloat16 logits and Lion."""
    model = ModelQuantization(
        "",
        gumbel=GumbelOptions(logits_dtype="bfloat16"),
        optimizer=lambda groups: Lion(groups, lr=1e-3),
        expert_parallel=True,
    )
    data = CalibrationDataModule(PythonDocumentation(), sequence_length=2048, batch_size=1)
    skeleton = skeleton_of(CONFIGS / "kimi-k2.5")
    scheme, last = QuantScheme(2, 128), len(skeleton.blocks) - 1
    plan = {last: {site: scheme for site in skeleton.blocks[last].sites if ".experts." in site.name}}
    weights = sum(site.rows * site.in_features for site in plan[last])
    assert weights == 384 * 3 * 2048 * 7168
    case = advice._Case(model, data, skeleton, plan, replace(AROUND, bf16=True, optimizer_state=1.0))
    assert case.bytes > 500e9
    share = case.spread(8).bytes
    assert 24 * weights / 8 < share < 80e9, "logits, their gradients and momentum of four levels, and the rest"


def _few_bytes(_: object, width: int, batch: int, tokens: int, *__: object, **___: object) -> PassBytes:
    return PassBytes(80 * batch * tokens * width, 40 * batch * tokens * width)


def test_what_would_make_a_block_fit(tiny: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beside what so few weights take otherwise, that of tokens is everything; and nothing here needs it exactly.
    monkeypatch.setattr(forward_passes, "FORWARD_TOKENS", 32)
    monkeypatch.setattr(block_terms, "activation_bytes", _few_bytes)
    model = ModelQuantization("", QuantScheme(2, 16))
    data = CalibrationDataModule(PythonDocumentation(), sequence_length=32, num_sequences=8)
    plan = {
        index: {site: QuantScheme(2, 16) for site in block.sites if not site.role}
        for index, block in enumerate(tiny.blocks)
    }

    def said(room: float, data: CalibrationDataModule = data, devices: int = 1) -> list[str]:
        return device_advice(model, data, tiny, plan, AROUND, int(room), devices)

    needed = advice._Case(model, data, tiny, plan, AROUND).bytes
    assert said(needed) == []
    assert f"with {LION} the training" in said(0.8 * needed)[0]
    alone, spread = said(0.4 * needed)
    assert alone.startswith("no option makes the largest block fit") and "share sequences and not weights" in alone
    assert spread.startswith(f"with {LION} {SHORTER} {SPREAD} and --trainer.devices 2 it takes")
    (fitting,) = said(0.4 * needed, devices=8)
    assert fitting.startswith(f"with {SPREAD} the training of the largest block takes")
    beyond, enough = said(0.25 * needed, devices=2)
    assert beyond.endswith("on each of 2 devices") and f"{SPREAD} and --trainer.devices 3" in enough
    assert len(said(0.05 * needed)) == 1  # what is not an expert is too large already
    large = CalibrationDataModule(PythonDocumentation(), sequence_length=32, num_sequences=256, batch_size=256)
    assert f"with {SHORTER} the training" in said(1.1 * needed, data=large)[0]
