"""A run that is asked to stop, alone and on two processes: exit code, last line, and that nothing is left running."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from lightning_gsq.cli import main
from tests.support.processes import start_process
from tests.support.runs import block_files, write_config

DDP = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--end_to_end.batch_size", "2"]
LONG = ["--trainer.max_epochs", "100000"]
END_TO_END = ["--model.phases", "[init, blocks, end_to_end]", "--end_to_end.max_steps", "100000"]
END_TO_END += ["--end_to_end.max_epochs", "100000", "--end_to_end.validations", "1"]
FAREWELL = "stopped; the same command resumes after the last finished block or phase"


def _until(process: subprocess.Popen[str], words: str) -> str:
    """Reads the output up to a line with these words."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if words in line:
            return output
    raise AssertionError(output)


@pytest.mark.parametrize(
    ("number", "words", "extra"),
    [
        (signal.SIGINT, "perplexity after the warm start", LONG),
        (signal.SIGTERM, "  step ", END_TO_END),
    ],
    ids=["in a block", "end to end"],
)
def test_alone(
    number: signal.Signals, words: str, extra: list[str], tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    run = start_process("fit", "--config", str(write_config(tiny_llama, corpus, tmp_path)), *extra)
    output = _until(run, words)
    time.sleep(1)
    run.send_signal(number)
    began = time.monotonic()
    output += run.communicate(timeout=60)[0]
    assert run.returncode == 128 + number, output
    assert output.splitlines()[-1] == FAREWELL
    assert time.monotonic() - began < 10
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("victims", "number"),
    [([0], signal.SIGTERM), ([1], signal.SIGTERM), ([0, 1], signal.SIGINT)],
    ids=["first", "other", "both"],
)
def test_two_processes(
    victims: list[int], number: signal.Signals, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """In the end-to-end phase, where each waits for the other at every step."""
    run = start_process("fit", "--config", str(write_config(tiny_llama, corpus, tmp_path)), *DDP, *END_TO_END)
    output = _until(run, "  step ")
    processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children()]
    assert len(processes) == 2, output
    time.sleep(0.5)
    for victim in victims:
        processes[victim].send_signal(number)
    began = time.monotonic()
    output += run.communicate(timeout=60)[0]
    assert run.returncode == 128 + number, output
    assert output.count("stopped; ") == 1 and output.splitlines()[-1] == FAREWELL
    _, alive = psutil.wait_procs(processes[1:], timeout=5)
    assert not alive and time.monotonic() - began < 15


def test_the_same_command_resumes(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    config = str(write_config(tiny_llama, corpus, tmp_path))
    run = start_process("fit", "--config", config)
    _until(run, "block 1/2")
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode in (143, 0)
    assert main(["fit", "--config", config]) == 0
    stopped = block_files(tmp_path)
    whole = str(write_config(tiny_llama, corpus, tmp_path / "whole"))
    assert main(["fit", "--config", whole]) == 0
    assert stopped == block_files(tmp_path / "whole")


def test_before_the_libraries_are_loaded(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    run = start_process("fit", "--config", str(write_config(tiny_llama, corpus, tmp_path)))
    time.sleep(0.6)
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[0] == FAREWELL + "\n"
    assert run.returncode == 143
