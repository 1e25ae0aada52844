"""The end-to-end phase inside whole runs on a tiny model: files, resuming, alone, never worse."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_gsq.cli import main
from lightning_gsq.training import EndToEndQuantization
from tests.support.runs import summary_of, write_config


def _fit(model: Path, corpus: Path, folder: Path, phases: str, *arguments: str) -> int:
    config = write_config(model, corpus, folder, data__num_sequences=24, trainer__max_steps=4)
    return main(["fit", "--config", str(config), "--model.phases", phases, *arguments])


@pytest.fixture(scope="module")
def blocks(tiny_llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that ended with its blocks."""
    folder = tmp_path_factory.mktemp("blocks") / "own"
    assert _fit(tiny_llama, corpus, folder, "[blocks]") == 0
    return folder


@pytest.fixture
def folder(blocks: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    shutil.copytree(blocks, tmp_path / "own")
    return tmp_path / "own"


def test_alone_on_the_folder_of_finished_blocks(tiny_llama: Path, corpus: Path, folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in (folder / "run" / "blocks").iterdir()}
    assert _fit(tiny_llama, corpus, folder, "[end_to_end]") == 0
    summary = summary_of(folder)
    assert set(summary["perplexity"]) == {"full_precision", "blocks", "end_to_end"}
    phase = summary["end_to_end"]
    assert phase["final"] < phase["start"] and not phase["rejected"]
    run = folder / "run"
    for name, content in before.items():
        assert (run / "blocks" / name).read_bytes() == content, "the blocks' result stays"
    old, new = (load_file(run / "blocks" / f"{kind}-000.safetensors") for kind in ("block", "end_to_end"))
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith(".codes"))
    assert any(not torch.equal(old[name], new[name]) for name in old if name.endswith(".scales"))
    trained = load_file(run / "end_to_end.safetensors")
    assert {"model.norm.weight", "model.layers.1.input_layernorm.weight"} <= set(trained)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    torch.testing.assert_close(model.model.norm.weight, trained["model.norm.weight"].bfloat16())


def test_a_finished_phase_is_not_run_again(
    tiny_llama: Path, corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fit(tiny_llama, corpus, folder, "[end_to_end]", "--end_to_end.max_steps", "2") == 0
    first = summary_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(EndToEndQuantization, "training_step", lambda *_: pytest.fail("nothing is left to train"))
        assert _fit(tiny_llama, corpus, folder, "[end_to_end]", "--end_to_end.max_steps", "2") == 0
    assert summary_of(folder)["perplexity"] == first["perplexity"]
    assert _fit(tiny_llama, corpus, folder, "[end_to_end]", "--end_to_end.max_steps", "3") == 2
    error = capsys.readouterr().err
    assert "end_to_end.max_steps: the run has 2, asked for 3" in error and "delete" in error
    (folder / "run" / "end_to_end.safetensors").unlink()
    assert _fit(tiny_llama, corpus, folder, "[end_to_end]", "--end_to_end.max_steps", "3") == 0
    assert summary_of(folder)["perplexity"]["end_to_end"] != first["perplexity"]["end_to_end"]


def test_what_got_worse_is_rejected(
    tiny_llama: Path, corpus: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = [
        "--end_to_end.optimizer.init_args.lr",
        "3",
        "--end_to_end.max_steps",
        "3",
        "--end_to_end.train",
        "[scales]",
    ]
    assert _fit(tiny_llama, corpus, folder, "[end_to_end]", *worse) == 0
    assert "what it began with stands" in capsys.readouterr().out
    summary = summary_of(folder)
    assert summary["end_to_end"]["rejected"] and summary["end_to_end"]["trained"] > summary["end_to_end"]["start"]
    assert "end_to_end" not in summary["perplexity"]
    assert not list((folder / "run" / "blocks").glob("end_to_end*"))


def test_without_blocks_there_is_nothing_to_go_on_from(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fit(tiny_llama, corpus, tmp_path, "[end_to_end]") == 2
    assert "add blocks" in capsys.readouterr().err
    assert _fit(tiny_llama, corpus, tmp_path, "[init, end_to_end]") == 0
    assert set(summary_of(tmp_path)["perplexity"]) == {"full_precision", "warm_start", "end_to_end"}


def test_stored_teacher(tiny_llama: Path, corpus: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _fit(tiny_llama, corpus, folder, "[end_to_end]", "--end_to_end.top_k", "16") == 0
    files = {file: file.stat().st_mtime_ns for file in (folder / "run" / "teacher").iterdir()}
    content = load_file(next(iter(files)))
    assert content["tokens"].shape == content["log_probs"].shape == (24, 32, 16)
    assert content["log_probs"].exp().sum(-1).max() <= 1.01
    assert summary_of(folder)["end_to_end"]["final"] < summary_of(folder)["end_to_end"]["start"]
    (folder / "run" / "end_to_end.safetensors").unlink()
    assert _fit(tiny_llama, corpus, folder, "[end_to_end]", "--end_to_end.top_k", "16") == 0
    assert {file: file.stat().st_mtime_ns for file in files} == files, "the stored tokens are used again"
    assert _fit(tiny_llama, corpus, folder / "other", "[init, end_to_end]", "--end_to_end.top_k", "9999") == 2
    assert "the vocabulary has 258" in capsys.readouterr().err


def test_codes_and_a_head_of_its_own(tiny_llama: Path, corpus: Path, folder: Path) -> None:
    arguments = ["--end_to_end.train", "[scales, head, codes]", "--end_to_end.max_steps", "4"]
    assert _fit(tiny_llama, corpus, folder, "[end_to_end]", *arguments) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
    stored = load_file(folder / "run" / "end_to_end.safetensors")
    torch.testing.assert_close(model.lm_head.weight, stored["lm_head.weight"].bfloat16())


def test_killed_in_the_middle_it_starts_the_phase_again(tiny_llama: Path, corpus: Path, folder: Path) -> None:
    config = write_config(tiny_llama, corpus, folder, data__num_sequences=24, trainer__max_steps=4)
    arguments = ["fit", "--config", str(config), "--model.phases", "[end_to_end]", "--end_to_end.max_epochs"]
    command = [sys.executable, "-m", "lightning_gsq", *arguments, "500"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    for line in process.stderr:
        if "step" in line or time.monotonic() > deadline:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "run" / "end_to_end.safetensors").exists()
    assert main([*arguments, "1"]) == 0
    assert "end_to_end" in summary_of(folder)["perplexity"]
