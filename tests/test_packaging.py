"""The installed package holds what the tree holds, under one name."""

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_top_level_names_are_not_importable_twice() -> None:
    code = "import importlib.util as u; print(u.find_spec('callbacks'), u.find_spec('lightning_gsq.callbacks').origin)"
    shown = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout
    bare, origin = shown.split()
    assert bare == "None"
    assert Path(origin) == ROOT / "callbacks" / "__init__.py"


def build_wheel(folder: Path) -> tuple[Path, list[str]]:
    """The wheel of the tracked files, and their names."""
    assert importlib.util.find_spec("setuptools"), "the wheel is built with the environment's own setuptools"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel, tracked


def test_wheel_holds_every_module(tmp_path: Path) -> None:
    wheel, tracked = build_wheel(tmp_path)
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {name for name in tracked if name.startswith("lightning_gsq/")}
    for folder in ("callbacks", "data"):
        expected |= {f"lightning_gsq/{name}" for name in tracked if name.startswith(f"{folder}/")}
    assert packed == expected


SCRIPT = """
import lightning_gsq
assert "site-packages" in lightning_gsq.__file__, lightning_gsq.__file__
result = lightning_gsq.Quantized("runs/trial")
print(sorted(result.perplexity), result.ledger["quantized_weights"] > 0)
ids = result.tokenizer("The square of 3 is", return_tensors="pt").input_ids
assert lightning_gsq.load("runs/trial/export/native")(ids).logits.shape[:2] == ids.shape
"""


@pytest.mark.slow
def test_the_wheel_works_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """In an environment of its own, outside the checkout: the wheel and what it depends on, nothing of the tree."""
    wheel, _ = build_wheel(tmp_path)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel], check=True
    )
    others = [part for part in sys.path if Path(part).name in ("site-packages", "deps")]
    (site / "dependencies.pth").write_text("\n".join(others))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    lines = [f"Line {i}: the square of {i} is {i * i}, and its cube is {i**3}." for i in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    # pip leaves the command beside the packages of a target folder.
    command = [python, str(site / "bin" / "lightning-gsq")]
    text = ["--data", "corpus.txt", "--evaluation", "corpus.txt", "--evaluation.sequence_length", "64"]
    machine = ["--trainer.accelerator", "cpu", "--data.sequence_length", "64", "--model.gumbel.backend", "eager"]
    verbs: list[list[str]] = [
        ["--version"],
        ["fit", "--help"],
        ["fit", str(tiny_llama), "--config", "trial", "--model.scheme.group_size", "16", *text, *machine],
        ["export", "runs/trial", "--format", "native"],
        ["predict", "runs/trial/export/native", "--prompt", "The square of 3 is", "--max_new_tokens", "2"],
        ["validate", "runs/trial", *text[2:], "--evaluation.num_windows", "2", *machine[:2]],
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)
    for arguments in verbs:
        done = subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-2000:])
    done = subprocess.run([python, "-c", SCRIPT], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("] ")[-1] == "True\n"
