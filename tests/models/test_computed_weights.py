"""Weights that are computed on loading: in files where memory is short, the same numbers, and not in memory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import ExportOptions, open_run
from lightning_gsq.export.formats.native import NativeFormat
from lightning_gsq.models import computed_weights, loading
from lightning_gsq.models.computed_weights import computed_bytes
from lightning_gsq.models.dequantizing import method_of
from lightning_gsq.models.empty import empty_model
from tests.support.finished import MakeRun
from tests.support.host_memory import GIVEN_BACK, large_experts

CHILD = """
import json, sys, warnings
from pathlib import Path
import lightning_gsq.system.memory
from lightning_gsq.system.memory import release
warnings.simplefilter("ignore")
allowed, small, large, scratch = int(sys.argv[1]), *map(Path, sys.argv[2:])
lightning_gsq.system.memory.host_bytes = lambda: allowed
from lightning_gsq.models import loading
from tests.support.host_memory import Peaks, anonymous_bytes
loading.load_model(loading.resolve(str(small)), scratch=scratch / "small")
peaks = Peaks()
with peaks.during("load"):
    model = loading.load_model(loading.resolve(str(large)), scratch=scratch / "large")
release()  # what glibc keeps for later of many small matrices is not what the model holds
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


def _disk(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is short, and the disk has so many bytes."""
    monkeypatch.setattr(computed_weights, "PART_OF_MEMORY", 0)
    monkeypatch.setattr(computed_weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


@pytest.mark.parametrize("folder", [None, "scratch"])
@pytest.mark.parametrize("where", ["here", "hub"])
def test_the_disk_is_weighed_by_what_is_computed(
    folder: str | None,
    where: str,
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a word, of a model that is merely mapped, and where the disk holds what is computed and no byte more."""
    scratch = None if folder is None else tmp_path / folder
    _, total = large_experts(tmp_path / "model", 1, 64, 4, fp8=False)
    computed = 2 * 3 * 4 * 64 * 64
    assert computed < total
    plain, experts = (loading.resolve(str(path)) for path in (tiny_llama, tmp_path / "model"))
    if where == "hub":  # a folder of the cache, which is not looked at before
        monkeypatch.setattr(loading.ModelSource, "files", property(lambda _: []))
    with caplog.at_level(logging.WARNING):
        _disk(0, monkeypatch)
        loading.load_model(plain, scratch=scratch)
        assert scratch is None or not scratch.exists()
        _disk(computed, monkeypatch)
        loading.load_model(experts, scratch=scratch)
        assert not caplog.records
        _disk(computed - 1, monkeypatch)
        if scratch is None:
            loading.load_model(experts)
            assert "are computed on loading do not fit into" in caplog.text
            return
    shutil.rmtree(scratch)
    with pytest.raises(ConfigurationError, match=r"are computed on loading do not fit into"):
        loading.load_model(experts, scratch=scratch)


def test_packed_experts_are_not_computed(new_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "native").mkdir()
    NativeFormat().write(open_run(new_run(family="qwen3_moe")), tmp_path / "native", ExportOptions())
    _disk(0, monkeypatch)
    loading.load_model(loading.resolve(str(tmp_path / "native")), quantized=True, scratch=tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


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
