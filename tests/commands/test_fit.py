"""Whole runs on a tiny model: what they write, resuming after a kill, repeating to the same bits."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_gsq.cli import main
from lightning_gsq.run.recipe import settings_of
from lightning_gsq.training import BlockQuantization
from tests.support.runs import block_files, write_config
from tests.support.tiny import FAMILIES, save_tiny_model


def test_a_run_leaves_everything_it_promises(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    assert main(["fit", "--config", str(write_config(tiny_llama, corpus, tmp_path))]) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["perplexity"]) == {"full_precision", "warm_start", "blocks"}
    assert summary["bits_per_weight"] == pytest.approx({"codes": 2.0, "scales": 1.0, "positions": 0.0, "total": 3.0})
    stored = sum(file.stat().st_size for file in (run / "blocks").glob("block-*"))
    assert summary["bytes"]["blocks"] == stored
    assert summary["bytes"]["original"] == (tiny_llama / "model.safetensors").stat().st_size
    assert summary["bytes"]["quantized"] == stored + 2 * (258 * 32 * 2 + 5 * 32)  # embedding, head and norms in bf16
    for key in ("seconds", "seconds_per_block", "peak_memory_bytes", "scheme", "seed", "versions"):
        assert key in summary
    spent = summary["seconds_of_block"]
    assert set(spent["init"]) == {"statistics", "warm_start", "streams"}
    assert set(spent["blocks"]) == {*spent["init"], "training", "check"}
    assert 0 < sum(spent["blocks"].values()) <= summary["seconds_per_block"]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["settings"]["model"]["scheme"]["bits"] == 2
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert "recipe/text_summary" in board.Tags()["tensors"]
    (guide,) = board.Tensors("what_you_see_here/text_summary")
    (pages,) = guide.tensor_proto.string_val
    assert b"block/loss_soft" in pages and b"end_to_end/" not in pages and b"widths" not in pages
    assert {"perplexity/blocks", "result/perplexity_blocks", "result/bits_per_weight"} <= set(board.Tags()["scalars"])
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.dtype == torch.bfloat16
    assert len(model.model.layers[0].mlp.down_proj.weight[0, :16].unique()) <= 4
    assert AutoTokenizer.from_pretrained(run / "model").decode([10, 11])
    arguments = ["--model.pretrained", str(run), "--trainer.accelerator", "cpu"]
    assert main(["validate", "--config", str(tmp_path / "config.yaml"), *arguments]) == 0


def test_same_seed_same_bits_and_another_seed_others(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(["fit", "--config", str(write_config(tiny_llama, corpus, tmp_path / name))]) == 0
    assert (
        main(["fit", "--config", str(write_config(tiny_llama, corpus, tmp_path / "c")), "--seed_everything", "5"]) == 0
    )
    assert block_files(tmp_path / "a") == block_files(tmp_path / "b")
    assert block_files(tmp_path / "a") != block_files(tmp_path / "c")


@pytest.mark.parametrize("target", ["stream", "local"])
def test_killed_and_resumed_to_the_same_bits(target: str, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    whole = write_config(tiny_llama, corpus, tmp_path / "whole", model__target=target)
    assert main(["fit", "--config", str(whole)]) == 0
    killed = write_config(tiny_llama, corpus, tmp_path / "killed", model__target=target)
    command = [sys.executable, "-m", "lightning_gsq", "fit", "--config", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    first = tmp_path / "killed" / "run" / "blocks" / "block-000.safetensors"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first.exists() and not (tmp_path / "killed" / "run" / "summary.json").exists()
    assert main(["fit", "--config", str(killed)]) == 0
    assert block_files(tmp_path / "killed") == block_files(tmp_path / "whole")


def test_finished_run_is_reused(
    tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path)
    assert main(["fit", "--config", str(config)]) == 0
    before = json.loads((tmp_path / "run" / "summary.json").read_text())

    def fail(*_: object) -> None:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(BlockQuantization, "training_step", fail)
    assert main(["fit", "--config", str(config)]) == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert after["perplexity"] == before["perplexity"]


def test_a_recipe_is_a_configuration_of_the_same_run(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With relative addresses, and phases that the recipe does not decide; from another folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "model")
    text = {"class_path": "lightning_gsq.data.TextFile", "init_args": {"path": "corpus.txt"}}
    shutil.copy(corpus, tmp_path / "corpus.txt")
    changes = {"data__source": text, "evaluation__source": text, "end_to_end__max_steps": 3}
    phases = ["init", "end_to_end"]
    config = write_config(Path("model"), corpus, tmp_path, model__phases=phases, trainer__callbacks=[], **changes)
    assert main(["fit", "--config", str(config)]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = ["--config", str(tmp_path / "run" / "recipe.yaml")]
    capsys.readouterr()
    assert main(["fit", *recipe, "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    assert "warm start: finished already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", *recipe, "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["model"]["phases"] == phases and settings["end_to_end"]["max_steps"] == 3
    names = {callback["class_path"].rsplit(".", 1)[-1] for callback in settings["trainer"]["callbacks"]}
    assert "BlockProgress" in names and "GumbelAnnealing" not in names
    assert main(["validate", *recipe]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["plan", *recipe, "--probe", "false"]) == 0


def test_a_recipe_runs_no_code_of_a_model() -> None:
    recipe = {"settings": {"model": {"pretrained": "a/b", "trust_remote_code": True}}, "addresses": {"x.0.y": 1}}
    assert settings_of(recipe)["model"] == {"pretrained": "a/b", "trust_remote_code": False}


def test_memory_of_finished_blocks_is_freed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python's own collector: what is freed is freed by the run."""
    alive: list[weakref.ref[BlockQuantization]] = []
    real = BlockQuantization.on_train_start

    def started(self: BlockQuantization) -> None:
        alive.append(weakref.ref(self))
        assert sum(ref() is not None for ref in alive) == 1, "earlier blocks stay in memory"
        real(self)

    monkeypatch.setattr(BlockQuantization, "on_train_start", started)
    gc.disable()
    try:
        model = save_tiny_model("deep_llama", tmp_path / "model")
        assert main(["fit", "--config", str(write_config(model, corpus, tmp_path / "fit"))]) == 0
    finally:
        gc.enable()
    assert len(alive) == 5


def test_another_recipe_is_refused(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path)
    assert main(["fit", "--config", str(config)]) == 0
    kept = block_files(tmp_path)
    assert main(["fit", "--config", str(config), "--model.scheme.bits", "3"]) == 2
    error = capsys.readouterr().err
    assert "another recipe" in error
    assert "--model.scheme.bits: the run has 2, asked for 3" in error
    assert block_files(tmp_path) == kept


def test_loss_that_is_not_finite_stops_with_the_blocks_name(
    tiny_llama: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path)
    real = BlockQuantization.loss

    def broken(self: BlockQuantization, *arguments: object) -> torch.Tensor:
        loss = real(self, *arguments)  # type: ignore[arg-type]
        return loss * torch.nan if self.index == 1 and torch.is_grad_enabled() else loss

    monkeypatch.setattr(BlockQuantization, "loss", broken)
    assert main(["fit", "--config", str(config)]) == 1
    assert "the loss of model.layers.1 at step 0 is nan" in capsys.readouterr().err
    assert set(block_files(tmp_path)) == {"block-000.safetensors"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str, corpus: Path, tmp_path: Path) -> None:
    model = save_tiny_model(family, tmp_path / family)
    phases = ["init", "blocks", "end_to_end"]
    config = write_config(model, corpus, tmp_path, data__num_sequences=16, trainer__logger=False, model__phases=phases)
    assert main(["fit", "--config", str(config)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # Random weights: the original knows nothing of the text, and two bits take nothing away from that.
    assert all(200 < value < 360 for value in summary["perplexity"].values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("bits", [1, "ternary", 3, 4, 8])
def test_every_width(bits: object, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    scheme = {"bits": bits, "group_size": -1}
    config = write_config(tiny_llama, corpus, tmp_path, model__scheme=scheme, trainer__logger=False)
    assert main(["fit", "--config", str(config)]) == 0
    blocks = json.loads((tmp_path / "run" / "summary.json").read_text())["blocks"]
    assert all(block["final"] <= block["start"] for block in blocks.values())


def test_a_block_that_training_made_worse_keeps_its_warm_start(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e9}}
    config = write_config(tiny_llama, corpus, tmp_path, model__optimizer=optimizer, model__scale_learning_rate=1e-9)
    assert main(["fit", "--config", str(config)]) == 0
    assert "model.layers.0: training raised the held-out error" in capsys.readouterr().out
    blocks = json.loads((tmp_path / "run" / "summary.json").read_text())["blocks"]
    assert all(block["final"] <= block["start"] < block["trained"] for block in blocks.values())


def test_trainer_flags_work(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_config(
        tiny_llama,
        corpus,
        tmp_path,
        trainer__accumulate_grad_batches=2,
        trainer__gradient_clip_val=1.0,
        trainer__precision="bf16-mixed",
        trainer__max_steps=3,
        model__blocks="1:2",
        model__overrides={"*.down_proj": {"bits": 4}},
        model__optimizer={"class_path": "lion_pytorch.Lion", "init_args": {"lr": 1e-3, "weight_decay": 1.0}},
        model__warm_start={"class_path": "lightning_gsq.quantizers.RTN"},
    )
    assert main(["fit", "--config", str(config)]) == 0
    assert list(block_files(tmp_path)) == ["block-001.safetensors"]
    bits = json.loads((tmp_path / "run" / "summary.json").read_text())["bits_per_weight"]
    assert bits["codes"] == (2 * 6144 + 4 * 1536) / 7680


def test_activations_in_files(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    for name, limit in (("memory", 8.0), ("files", 0.0)):
        config = write_config(tiny_llama, corpus, tmp_path / name)
        extra = ["--activations.memory_limit_gb", str(limit), "--activations.folder", str(tmp_path)]
        assert main(["fit", "--config", str(config), *extra]) == 0
    assert block_files(tmp_path / "memory") == block_files(tmp_path / "files")
    assert not list(tmp_path.glob("lightning-gsq-*"))


def test_exports_are_the_last_step(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = [
        "fit",
        "--config",
        str(write_config(tiny_llama, corpus, tmp_path)),
        "--export",
        "[native, dequantized]",
    ]
    assert main([*arguments[:-1], "[nativ]"]) == 2
    assert not (tmp_path / "run" / "blocks").exists()
    assert main(arguments) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["exports"]) == {"native", "dequantized"}
    assert summary["ledger"]["bytes"]["total"] == summary["bytes"]["quantized"]
    files = sum(file.stat().st_size for file in (run / "blocks").glob("block-*"))
    assert sum(summary["ledger"]["headers"].values()) < files < summary["bytes"]["quantized"]
    native = run / "export" / "native" / "model.safetensors"
    before = native.stat().st_mtime_ns
    assert main(arguments) == 0
    assert native.stat().st_mtime_ns == before
    assert "exports" in json.loads((run / "summary.json").read_text())


def test_the_reported_perplexity_is_that_of_the_file(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path, model__output_dtype="bfloat16", model__dtype="float32")
    assert main(["fit", "--config", str(config), "--export", "[native]"]) == 0
    reported = json.loads((tmp_path / "run" / "summary.json").read_text())["perplexity"]["blocks"]
    capsys.readouterr()
    folder = str(tmp_path / "run" / "export" / "native")
    for choice in ("false", "true"):
        arguments = ["--model.pretrained", folder, "--evaluation.by_block", choice]
        assert main(["validate", "--config", str(config), *arguments]) == 0
        output = capsys.readouterr().out
        assert f"perplexity {reported:.3f} " in output and ("block by block" in output) == (choice == "true")


def test_perplexity_block_by_block(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    found = []
    for choice in ("false", "true"):
        phases = ["init", "blocks", "end_to_end"]
        config = write_config(tiny_llama, corpus, tmp_path / choice, model__phases=phases, trainer__max_steps=4)
        assert main(["fit", "--config", str(config), "--evaluation.by_block", choice]) == 0
        found.append(json.loads((tmp_path / choice / "run" / "summary.json").read_text())["perplexity"])
    assert set(found[0]) == {"full_precision", "warm_start", "blocks", "end_to_end"}
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    config = tmp_path / "true" / "config.yaml"
    assert main(["fit", "--config", str(config)]) == 0, "the way of measuring is not part of the recipe"
