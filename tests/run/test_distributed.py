"""Runs on two processes (gloo, CPU): the result of one, torchrun, a process that dies, another number of them."""

from pathlib import Path
from typing import Any

import pytest

from lightning_gsq.cli import main
from tests.support.processes import kill_one, start_process
from tests.support.runs import block_files, summary_of, write_config

DDP = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
PHASES = ["--model.phases", "[init, blocks, end_to_end]"]


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on one process, two sequences more a step than each of two processes has."""
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(tiny_llama, corpus, folder, data__batch_size=4)
    assert main(["fit", "--config", str(config), *PHASES, "--end_to_end.batch_size", "4"]) == 0
    return folder


def _same_result(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert two["perplexity"]["full_precision"] == pytest.approx(one["perplexity"]["full_precision"], rel=1e-5)
    assert two["perplexity"]["warm_start"] == pytest.approx(one["perplexity"]["warm_start"], rel=1e-3)
    for name, block in one["blocks"].items():
        assert two["blocks"][name]["start"] == pytest.approx(block["start"], rel=0.1)
        assert two["blocks"][name]["final"] == pytest.approx(block["final"], rel=0.2)
    for name in ("start", "final"):
        assert two["end_to_end"][name] == pytest.approx(one["end_to_end"][name], rel=0.3)


def test_two_processes_end_as_one_does(alone: Path, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_config(tiny_llama, corpus, tmp_path)
    run = start_process("fit", "--config", str(config), *PHASES, *DDP, "--end_to_end.batch_size", "2")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("perplexity after the blocks:") == 1, "each line appears once"
    assert output.count("block 2/2") == 1
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) >= 1
    one, two = summary_of(alone), summary_of(tmp_path)
    _same_result(one, two)
    starts = [block_files(folder, "warm_start")["warm_start-000.safetensors"] for folder in (alone, tmp_path)]
    assert starts[0] == starts[1]
    assert all(block["made_by"]["processes"] == 2 for block in two["blocks"].values())


def test_torchrun(alone: Path, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_config(tiny_llama, corpus, tmp_path)
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m lightning_gsq"
    extra = ["--end_to_end.batch_size", "2", "--end_to_end.top_k", "258", "--evaluation.by_block", "true"]
    run = start_process("fit", "--config", str(config), *PHASES, *DDP, *extra, module=launcher)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("perplexity after the blocks:") == 1
    _same_result(summary_of(alone), summary_of(tmp_path))


@pytest.mark.parametrize("victim", ["first", "other"])
def test_a_process_that_dies_ends_the_run_which_one_process_resumes(
    victim: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path)
    many = ["--trainer.max_epochs", "1"]
    run = start_process("fit", "--config", str(config), *DDP, *many)
    kill_one(run, tmp_path, 0 if victim == "first" else 1)
    kept = block_files(tmp_path)
    assert list(kept) == ["block-000.safetensors"]
    assert main(["fit", "--config", str(config), *many]) == 0
    assert block_files(tmp_path)["block-000.safetensors"] == kept["block-000.safetensors"]
    assert len(block_files(tmp_path)) == 2


def test_more_processes_than_sequences(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path, data__num_validation_sequences=1)
    assert main(["fit", "--config", str(config), *DDP]) == 2
    assert "data.num_validation_sequences: 1 sequences cannot be shared by 2 processes" in capsys.readouterr().err


def test_spawned_processes_are_refused(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path)
    assert main(["fit", "--config", str(config), "--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"]) == 2
    assert "use ddp, or torchrun" in capsys.readouterr().err
