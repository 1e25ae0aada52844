"""The installed package holds what the tree holds, under one name."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_top_level_names_are_not_importable_twice() -> None:
    code = "import importlib.util as u; print(u.find_spec('callbacks'), u.find_spec('lightning_gsq.callbacks').origin)"
    shown = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout
    bare, origin = shown.split()
    assert bare == "None"
    assert Path(origin) == ROOT / "callbacks" / "__init__.py"


def test_wheel_holds_every_module(tmp_path: Path) -> None:
    assert importlib.util.find_spec("setuptools"), "the wheel is built with the environment's own setuptools"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {name for name in tracked if name.startswith("lightning_gsq/")}
    for folder in ("callbacks", "data"):
        expected |= {f"lightning_gsq/{name}" for name in tracked if name.startswith(f"{folder}/")}
    assert packed == expected
