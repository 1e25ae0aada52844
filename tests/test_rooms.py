"""The house: a room imports only rooms below it, every room says what it is for, and no file grows beyond reading."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_gsq"
LONGEST = 300
ROOMS = [*(file.parent for file in PACKAGE.rglob("__init__.py")), ROOT / "callbacks", ROOT / "data"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed: callbacks and data inside of it."""
    folder = tmp_path_factory.mktemp("installed")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / "lightning_gsq", ignore=ignore)
    for room in ("callbacks", "data"):
        shutil.copytree(ROOT / room, folder / "lightning_gsq" / room, ignore=ignore)
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks the contracts of pyproject.toml on the package in ``folder``."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    arguments = ["--no-cache", "--no-logo", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_contracts_are_kept(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("run/folder.py", "from lightning_gsq.callbacks import GumbelAnnealing", "run is not allowed to import"),
        ("weights/scheme.py", "from lightning_gsq.models.chain import find_blocks", "weights is not allowed to import"),
        ("weights/packing.py", "from lightning_gsq.weights.quantized import QuantizedTensor", "No cycles are allowed"),
    ],
)
def test_a_forbidden_import_breaks_them(copy: Path, file: str, line: str, said: str) -> None:
    path = copy / "lightning_gsq" / file
    content = path.read_text()
    path.write_text(f"{content}\n\n{line}\n")
    try:
        done = lint(copy)
    finally:
        path.write_text(content)
    assert done.returncode == 1
    assert said in done.stdout


def test_a_room_that_nobody_placed_breaks_them(copy: Path) -> None:
    room = copy / "lightning_gsq" / "attic"
    room.mkdir()
    (room / "__init__.py").write_text("")
    try:
        assert lint(copy).returncode == 1
    finally:
        shutil.rmtree(room)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_a_room_opens_with_a_line_for_each_of_its_files(room: Path) -> None:
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    if room == PACKAGE:
        return
    assert text.splitlines()[0].strip()
    files = {file.stem for file in room.glob("*.py")} - {"__init__"}
    named = {word.strip(",") for line in text.splitlines()[1:] for word in line.split()}
    assert files <= named, f"{room.name}/__init__.py does not name {sorted(files - named)}"


def test_no_file_is_longer_than_can_be_read() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "callbacks").glob("*.py"), *(ROOT / "data").glob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
