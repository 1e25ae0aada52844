"""What a plan says of a size: memory of the predictions, and a model that is a configuration alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning_gsq.data import CalibrationDataModule

from lightning_gsq.cli import main
from lightning_gsq.commands.menu import Free
from lightning_gsq.estimate import limits, make_skeleton, width_probe
from lightning_gsq.estimate.quantities import Weights
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.estimate.width_probe import width_seconds
from lightning_gsq.models.ends import end_names
from lightning_gsq.models.loading import ModelSource, load_config
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.runs import write_config
from tests.support.tiny import FAMILIES

CONFIGS = Path(__file__).parents[1] / "estimate" / "configs"
WITHOUT: dict[str, object] = {"model__size": None, "model__choices": None}
CHOICES = {"model__size": "32kB", "model__choices": ["w2g16", "w4g16", "w8g16"]}


def _plan(model: Path, corpus: Path, folder: Path, *arguments: str, **changes: object) -> int:
    config = write_config(model, corpus, folder, **{**CHOICES, **changes})
    return main(["plan", "--config", str(config), "--probe", "false", *arguments])


def test_memory_and_time_of_the_predictions_are_told(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _plan(tiny_llama, corpus, tmp_path, "--probe", "true") == 0
    told = _told(capsys)
    assert "widths: what embedding and head are worth" in told
    assert "changes for 3 choices (fp32)" in told
    assert re.search(r"choosing the widths about \d+ s; done, fit takes the choice as it is", told)
    without = _without_size(tiny_llama, corpus, tmp_path / "other", capsys)
    assert "widths:" not in without and "choosing" not in without


def _told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, tables without their lines."""
    return " ".join(re.sub("[│┃]", " ", capsys.readouterr().out).split())


def _without_size(model: Path, corpus: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert _plan(model, corpus, folder, **WITHOUT) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "blocks", "gigabytes", "parts"), [("8b", 32, 2.6, 1), ("70b", 80, 10.3, 3)])
def test_the_time_of_large_models_from_their_configurations(
    name: str, blocks: int, gigabytes: float, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds of the parts over all pieces and blocks; and why there are none where a block does not fit."""
    source = ModelSource(str(CONFIGS / f"llama-3.1-{name}"))
    skeleton = make_skeleton(source, load_config(source), "auto")
    data, cpu = CalibrationDataModule(sequence_length=2048, num_sequences=128), torch.device("cpu")
    plan, choices = _offered(skeleton, {f"w{bits}g64": QuantScheme(bits, 64) for bits in (2, 3, 4, 8)})
    monkeypatch.setattr(limits, "host_bytes", lambda: 10**9)
    seconds, reason = width_seconds(data, skeleton, plan, choices, cpu, torch.float16, 8e9)
    assert seconds is None and reason == f"one block with gradients takes {gigabytes} GB, 1.0 GB are free here"
    monkeypatch.setattr(limits, "host_bytes", lambda: 10**12)
    monkeypatch.setattr(width_probe, "_passes", lambda *_: (1.0, 3.0, 7.0))
    monkeypatch.setattr(width_probe, "_rounding", lambda free, *_: 100.0 * len(next(iter(free.values()))))
    monkeypatch.setattr(width_probe, "_head", lambda *_: 2.0)
    slices = 128_256 / 8192
    seconds, reason = width_seconds(data, skeleton, plan, choices, cpu, torch.float16, 8e9)
    all_blocks = blocks * (64 * (1 + 7 * parts) + 16 * 3 * parts + 400)
    assert seconds == pytest.approx(all_blocks + 64 * 2 * slices + 400 * (slices + 1)) and not reason


def _offered(skeleton: Skeleton, schemes: dict[str, QuantScheme]) -> tuple[dict[int, Weights], Free]:
    """Every matrix of a model, and the same choices for all."""
    plan = {i: dict.fromkeys(block.sites, next(iter(schemes.values()))) for i, block in enumerate(skeleton.blocks)}
    names = [f"{skeleton.prefix}.{index}.{site.name}" for index in plan for site in plan[index]]
    return plan, dict.fromkeys([*names, *end_names(skeleton.model)], schemes)


def test_the_parts_are_timed_on_the_code_that_does_the_work() -> None:
    """One piece of text, experts, with and without choices for embedding and head."""
    skeleton = make_skeleton(ModelSource("tiny"), FAMILIES["qwen3_moe"]().config, "auto")
    data, cpu = CalibrationDataModule(sequence_length=32, num_sequences=1), torch.device("cpu")
    plan, choices = _offered(skeleton, {f"w{bits}g8": QuantScheme(bits, 8) for bits in (2, 4)})
    last = {name: schemes for name, schemes in choices.items() if ".1.mlp" in name}
    for offered in (choices, last):
        seconds, reason = width_seconds(data, skeleton, plan, offered, cpu, torch.float16, 8e9)
        assert seconds is not None and seconds > 0 and not reason


def test_a_configuration_alone_is_planned_with_one_width_for_all(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert _plan(bare, corpus, tmp_path, "--probe", "true") == 0
    told = _told(capsys)
    assert re.search(r"choosing the widths about \d+ s measured on", told)
    assert "has no weights" in told and "What follows is for w4g16, the widest choice that fits for all" in told
    assert "changes for 3 choices (fp32)" in told
    assert not (tmp_path / "run").exists()
    assert _plan(bare, corpus, tmp_path, model__size="12kB") == 2
    assert "give at least" in capsys.readouterr().err
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert _plan(bare, corpus, tmp_path, "--export", "gguf", model__choices=["q4_0", "q8_0"]) == 2
    assert "a GGUF file holds the tokenizer" in capsys.readouterr().err
