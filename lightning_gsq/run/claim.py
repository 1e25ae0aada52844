"""A folder becomes that of a run: nothing in it is somebody else's, no other process works in it, leftovers are gone.

A run replaces and deletes by name: its files, ``model/``, exports. So these names are free, or a run made them: a
folder that a run made has its mark, the file ``.lock``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.loading import ModelSource
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.progress import read_json
from lightning_gsq.run.recipe import FORMAT, is_whole
from lightning_gsq.run.saving import MARK
from lightning_gsq.system.files import tidy
from lightning_gsq.system.locking import locked
from lightning_gsq.system.owned_folders import obstacle
from lightning_gsq.system.waiting import wait_for
from lightning_gsq.system.yaml_files import read_yaml

LOCK = ".lock"
FIRST_LINE = "run folder of lightning-gsq"
FOLDERS = ("blocks", "calibration", "export", "model", "teacher", "tensorboard")
FILES = (
    "recipe.yaml",
    "progress.json",
    "summary.json",
    "end_to_end.safetensors",
    "imatrix.gguf",
    "choice.yaml",
    "worth.json",
)
OPTION = "trainer.default_root_dir"
WAIT_SECONDS, PAUSE_SECONDS = 600, 0.2
"""How long other processes wait for the first one's claim, and between two looks."""


@contextmanager
def claimed(root: str | Path, rank: int, source: ModelSource, say: Callable[[str], None]) -> Iterator[RunFolder]:
    """The run folder, for as long as the context lasts.

    Args:
        root: The folder.
        rank: Number of this process; the first one claims for all.
        source: The original model, which must not be inside of what a run writes.
        say: Prints a line for the user.

    Raises:
        ConfigurationError: the folder is no run's, another process works in it, or it cannot be written.
    """
    if rank:
        _wait_for_mark(Path(root))
        yield RunFolder(root, rank)
        return
    path = Path(root)
    check_apart(path, source)
    check_own(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{OPTION}: cannot make the run folder {path}: {error.strerror}") from error
    with locked(path / LOCK, FIRST_LINE, OPTION, say):
        folder = RunFolder(path)
        for part in (path, *(path / name for name in ("blocks", "calibration", "teacher"))):
            tidy(part)
        _set_aside(path / "progress.json", say)
        _set_aside(path / "summary.json", say)
        yield folder


def _wait_for_mark(root: Path) -> None:
    """Waits until the first process has claimed a folder: what another wrote before would make it somebody else's.

    Raises:
        ConfigurationError: it has not within :data:`WAIT_SECONDS`.
    """
    if wait_for(lambda: _is_marked(root) or None, WAIT_SECONDS, PAUSE_SECONDS) is None:
        raise ConfigurationError(
            f"{OPTION}: the first process has not claimed {root} within {WAIT_SECONDS} s; all processes must see one "
            "folder"
        )


def check_apart(root: Path, source: ModelSource) -> None:
    """Verifies that a run in ``root`` writes neither into the model's own folder nor over it.

    Raises:
        ConfigurationError: it would.
    """
    address = Path(source.path).expanduser()
    if not address.is_dir():
        return
    model, run = address.resolve(), root.expanduser().resolve()
    file = model / source.gguf_file if source.gguf_file else None
    written = next((name for name in FOLDERS if (file or model).is_relative_to((run / name).resolve())), None)
    if written is not None:
        raise ConfigurationError(
            f"{OPTION}: a run in {root} writes into {root / written}, and the original model is {file or address}; "
            "choose another folder"
        )
    if file is None and run.is_relative_to(model):
        raise ConfigurationError(
            f"{OPTION}: {root} is the folder of the original model, or inside of it; choose another folder"
        )


def check_own(root: Path) -> None:
    """Verifies that a folder is a run's, or that nothing in it has the name of something that a run writes.

    Raises:
        ConfigurationError: something has.
    """
    if root.exists() and not root.is_dir():
        raise ConfigurationError(f"{OPTION}: {root} is a file")
    for name in FOLDERS:
        if (root / name).exists() and not (root / name).is_dir():
            raise ConfigurationError(f"{OPTION}: {root / name} is a file, and a run writes a folder of that name")
    reason = obstacle(root / "model", MARK)
    if reason is not None:
        raise ConfigurationError(
            f"{OPTION}: {reason}, and a run writes its model there; move it away, or choose another folder"
        )
    taken = [name for name in (*FOLDERS, *FILES) if (root / name).exists()]
    if taken and not _is_marked(root):
        raise ConfigurationError(
            f"{OPTION}: {root} holds {taken[0]} and is not the folder of a run (it has no {LOCK}); choose another "
            "folder"
        )


def _is_marked(root: Path) -> bool:
    """Whether a run made a folder: its mark is there, or its recipe where the mark was lost in a copy."""
    try:
        with (root / LOCK).open(encoding="utf-8", errors="replace") as stream:
            if stream.readline().strip() == FIRST_LINE:
                return True
    except OSError:
        pass
    try:
        recipe = read_yaml(root / "recipe.yaml", OPTION)
    except ConfigurationError:
        return False
    return is_whole(recipe) and recipe.get("format") == FORMAT


def _set_aside(file: Path, say: Callable[[str], None]) -> None:
    """Moves a damaged file out of the way; what it said is found out again."""
    if read_json(file) is None:
        aside = file.with_suffix(".damaged.json")
        file.replace(aside)
        say(f"{file} is damaged: it is kept as {aside.name}, and written anew")
