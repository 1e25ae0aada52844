"""A run and an export of a model that is larger than the memory they may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.host_memory import GIVEN_BACK, large_llama, short_run

BLOCKS, WIDTH = 20, 256
PART_OF_THE_MODEL = 0.7
CHILD = """
import json, sys
from pathlib import Path

import lightning_gsq.system.memory

allowed, small, large = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
lightning_gsq.system.memory.host_bytes = lambda: allowed  # what the machine has, as the program sees it

from lightning_gsq.cli import main
from tests.support.host_memory import Peaks


def work(folder):
    peaks = {}
    for name, arguments in {
        "fit": ["fit", "--config", str(folder / "settings.yaml"), "--model.include", '["*.down_proj.weight"]'],
        "native": ["export", str(folder / "run"), "--format", "native"],
    }.items():
        seen = Peaks(stop_above=allowed if folder == large else None)
        with seen.during(name):
            assert main(arguments) == 0, name
        peaks |= seen.end()
    return peaks


work(small)  # what libraries take when they are first used is no part of it
print(json.dumps(work(large)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_a_model_larger_than_the_memory(tmp_path: Path) -> None:
    """A thread ends the process as soon as it has more memory of its own than is allowed."""
    small, large = tmp_path / "small", tmp_path / "large"
    large_llama(small / "model", 1, WIDTH, 300, torch.float32)
    short_run(small / "model", small, ["blocks"], bits=2, steps=1)
    _, total = large_llama(large / "model", BLOCKS, WIDTH, 300, torch.float32)
    short_run(large / "model", large, ["blocks"], bits=2, steps=1)
    allowed = int(PART_OF_THE_MODEL * total)
    finished = subprocess.run(
        [sys.executable, "-c", CHILD, str(allowed), str(small), str(large)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **GIVEN_BACK},
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert (
        "perplexity is measured block by block" in finished.stdout and "block by block, with a text" in finished.stdout
    )
    peaks = json.loads(finished.stdout.strip().splitlines()[-1])
    assert {"fit", "native"} <= set(peaks) and max(peaks.values()) <= allowed
