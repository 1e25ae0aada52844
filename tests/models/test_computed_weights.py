"""Weights that are computed on loading: in files where memory is short, the same numbers, and not in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import computed_weights, loading
from lightning_gsq.models.computed_weights import computed_bytes
from lightning_gsq.models.dequantizing import method_of
from lightning_gsq.models.empty import empty_model
from tests.support.host_memory import GIVEN_BACK, large_experts

CHILD = """
import json, sys, warnings
from pathlib import Path
import lightning_gsq.system.memory
from lightning_gsq.estimate.limits import give_back_freed_memory
warnings.simplefilter("ignore")
allowed, small, large, scratch = int(sys.argv[1]), *map(Path, sys.argv[2:])
lightning_gsq.system.memory.host_bytes = lambda: allowed
from lightning_gsq.models import loading
from tests.support.host_memory import Peaks, anonymous_bytes
loading.load_model(loading.resolve(str(small)), scratch=scratch / "small")
peaks = Peaks()
with peaks.during("load"):
    model = loading.load_model(loading.resolve(str(large)), scratch=scratch / "large")
give_back_freed_memory()  # what glibc keeps for later of many small matrices is not what the model holds
print(json.dumps([peaks.end()["load"], anonymous_bytes() - peaks.before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "FP8"])
def test_a_model_of_experts_is_not_held(fp8: bool, tmp_path: Path) -> None:
    large_experts(tmp_path / "small", 1, 256, 4, fp8)
    block, total = large_experts(tmp_path / "large", 6, 256, 32, fp8)
    arguments = [str(total), *(str(tmp_path / name) for name in ("small", "large", "scratch"))]
    finished = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **GIVEN_BACK},
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    most, left = json.loads(finished.stdout.strip().splitlines()[-1])
    assert most < 4 * block and left < block


@pytest.mark.filterwarnings("ignore::lightning_gsq.models.dequantizing.DequantizedWarning")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "FP8"])
def test_the_same_numbers(fp8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large_experts(tmp_path / "model", 2, 64, 4, fp8)
    source = loading.resolve(str(tmp_path / "model"))
    usual = loading.load_model(source)
    assert not (tmp_path / "scratch").exists()
    monkeypatch.setattr(computed_weights, "PART_OF_MEMORY", 0)
    model = loading.load_model(source, scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").rglob("*.safetensors"))
    for (name, own), other in zip(model.named_parameters(), usual.parameters(), strict=True):
        assert own.dtype == other.dtype and torch.equal(own, other), name


@pytest.mark.filterwarnings("ignore::lightning_gsq.models.dequantizing.DequantizedWarning")
def test_files_of_another_checkpoint_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed_weights, "PART_OF_MEMORY", 0)
    large_experts(tmp_path / "model", 1, 64, 4, fp8=False)
    source = loading.resolve(str(tmp_path / "model"))
    loading.load_model(source, scratch=tmp_path / "scratch")
    (before,) = (tmp_path / "scratch").iterdir()
    os.utime(tmp_path / "model" / "model.safetensors", ns=(0, 0))
    loading.load_model(source, scratch=tmp_path / "scratch")
    (after,) = (tmp_path / "scratch").iterdir()
    assert before.name != after.name


SUM = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from lightning_gsq.models import computed_weights, loading
computed_weights.PART_OF_MEMORY = 0
model = loading.load_model(loading.resolve(sys.argv[1]), scratch=Path(sys.argv[2]))
print(sum(float(p.double().abs().sum()) for p in model.parameters()))
"""


def test_processes_that_load_at_the_same_time_share_the_files(tmp_path: Path) -> None:
    large_experts(tmp_path / "model", 3, 64, 8, fp8=True)
    command = [sys.executable, "-c", SUM, str(tmp_path / "model"), str(tmp_path / "scratch")]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)]
    found = [process.communicate(timeout=300)[0].split()[-1] for process in processes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = loading.load_model(loading.resolve(str(tmp_path / "model")))
    wanted = str(sum(float(parameter.double().abs().sum()) for parameter in usual.parameters()))
    assert found == [wanted] * 3
    assert not list((tmp_path / "scratch").rglob("*.partial"))


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed_weights, "PART_OF_MEMORY", 0)
    monkeypatch.setattr(computed_weights.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1})())
    large_experts(tmp_path / "model", 1, 64, 4, fp8=False)
    with pytest.raises(ConfigurationError, match=r"is computed on loading does not fit into the 0\.0 GB"):
        loading.load_model(loading.resolve(str(tmp_path / "model")), scratch=tmp_path / "scratch")


def test_what_is_computed(tmp_path: Path, tiny_llama: Path) -> None:
    def of(folder: Path) -> int:
        source = loading.resolve(str(folder))
        config = loading.load_config(source)
        return computed_bytes(source, empty_model(source, config), method_of(config) is not None)

    large_experts(tmp_path / "bf16", 2, 64, 4, fp8=False)
    large_experts(tmp_path / "fp8", 2, 64, 4, fp8=True)
    assert of(tiny_llama) == 0
    assert of(tmp_path / "bf16") == 2 * 2 * (3 * 4 * 64 * 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of(tmp_path / "fp8") > of(tmp_path / "bf16")
