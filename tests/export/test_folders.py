"""Which folders an export may replace, and what a killed one leaves: decided by marks, names and locks alone."""

import json
import os
from pathlib import Path

import pytest

from lightning_gsq.export import folders

SOURCE = {"run": {"blocks/block-000.safetensors": "12"}, "options": {}}


def exported(folder: Path, content: str = "weights", checked: bool = True) -> Path:
    """A folder as an export leaves it."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    (folder / "inside").mkdir()
    (folder / "inside" / "code.py").write_text("x = 1\n")
    folders.write_mark(folder, "native", SOURCE, checked)
    return folder


def test_a_free_place_and_an_earlier_export_can_be_written(tmp_path: Path) -> None:
    assert folders.obstacle(tmp_path / "deep" / "native", overwrite=False) is None
    folder = exported(tmp_path / "native")
    assert "exists; use --overwrite" in (folders.obstacle(folder, overwrite=False) or "")
    assert folders.obstacle(folder, overwrite=True) is None
    (tmp_path / "empty").mkdir()
    assert folders.obstacle(tmp_path / "empty", overwrite=True) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / folders.MARK).unlink(), "was not written by an export"),
        (lambda folder: (folder / folders.MARK).write_text("[]"), "was not written by an export"),
        (lambda folder: (folder / folders.MARK).write_text("[" * 100_000), "was not written by an export"),
        (lambda folder: (folder / "precious.txt").write_text("x"), "holds precious.txt, which no export wrote"),
        (lambda folder: (folder / "inside" / "mine").write_text("x"), "holds inside/mine, which no export wrote"),
        (lambda folder: (folder / "link").symlink_to(folder.parent), "holds link, which no export wrote"),
    ],
)
def test_what_holds_anything_else_is_left_alone(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = exported(tmp_path / "native")
    change(folder)
    assert message in (folders.obstacle(folder, overwrite=True) or "")
    assert (folder / "model.safetensors").is_file()


def test_links_files_and_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    elsewhere = exported(tmp_path / "elsewhere")
    (tmp_path / "native").symlink_to(elsewhere)
    assert "is a symbolic link" in (folders.obstacle(tmp_path / "native", overwrite=True) or "")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert "is a symbolic link" in (folders.obstacle(tmp_path / "dangling", overwrite=False) or "")
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in (folders.obstacle(tmp_path / "file", overwrite=True) or "")
    assert "file is not a folder" in (folders.obstacle(tmp_path / "file" / "native", overwrite=False) or "")


def test_a_folder_that_the_export_reads_is_not_replaced(tmp_path: Path) -> None:
    folder = exported(tmp_path / "native")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, folder / "model.safetensors", tmp_path / "link"):
        assert "which the export reads" in (folders.obstacle(folder, overwrite=True, inputs=[path]) or "")
    assert folders.obstacle(folder, overwrite=True, inputs=[tmp_path]) is None


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = exported(tmp_path / "native", "old")
    with folders.growing(folder) as partial:
        (partial / "model.safetensors").write_text("new")
        assert (folder / "model.safetensors").read_text() == "old"
        folders.publish(partial, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    assert (folder / "model.safetensors").read_text() == "new"


def test_what_fails_midway_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(tmp_path / "native", "old")
    with pytest.raises(KeyboardInterrupt), folders.growing(folder) as partial:
        (partial / "model.safetensors").write_text("new")
        raise KeyboardInterrupt
    rename = Path.rename

    def fails_at_the_second(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_second)
    with pytest.raises(OSError, match="No space"), folders.growing(folder) as partial:
        folders.publish(partial, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    assert (folder / "model.safetensors").read_text() == "old"


def test_leftovers_of_a_kill_are_cleaned_up(tmp_path: Path) -> None:
    """Killed while it wrote, and between the two renames: the old folder gets its name back."""
    old = exported(tmp_path / ".native.1234abcd.old", "old")
    exported(tmp_path / ".native.1234abcd.partial", "new")
    (tmp_path / ".native.99999999.partial").mkdir()
    others = [tmp_path / ".native.mine.partial", tmp_path / "native.1234abcd.partial", tmp_path / ".gguf.1234abcd.old"]
    for other in others:
        other.mkdir()
    folders.tidy(tmp_path / "native")
    assert not old.exists()
    assert (tmp_path / "native" / "model.safetensors").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"native", *(other.name for other in others)}


def test_an_old_folder_beside_the_new_one_goes_unless_it_holds_something_else(tmp_path: Path) -> None:
    exported(tmp_path / "native", "new")
    exported(tmp_path / ".native.1234abcd.old", "old")
    strange = exported(tmp_path / ".native.abcd1234.old", "old")
    (strange / "precious.txt").write_text("x")
    folders.tidy(tmp_path / "native")
    assert {path.name for path in tmp_path.iterdir()} == {"native", strange.name}
    assert (tmp_path / "native" / "model.safetensors").read_text() == "new"


def test_a_folder_that_is_being_written_stays(tmp_path: Path) -> None:
    folder = tmp_path / "native"
    with folders.growing(folder) as partial:
        pid = os.fork()
        if pid == 0:
            folders.tidy(folder)
            os._exit(0)
        os.waitpid(pid, 0)
        assert partial.is_dir()
    assert not partial.exists()


def test_an_export_is_current_while_its_sources_and_files_are_the_same(tmp_path: Path) -> None:
    folder = exported(tmp_path / "native")
    assert folders.out_of_date(folder, "native", SOURCE, checked=True) is None
    assert folders.out_of_date(tmp_path / "gguf", "gguf", SOURCE, True) == "it is not there"
    assert folders.out_of_date(folder, "gguf", SOURCE, True) == "it was made from something else"
    other = {**SOURCE, "run": {"blocks/block-000.safetensors": "13"}}
    assert folders.out_of_date(folder, "native", other, True) == "it was made from something else"
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert folders.out_of_date(folder, "native", SOURCE, True) == "model.safetensors is damaged"
    (folder / "inside" / "code.py").unlink()
    assert "inside/code.py" in (folders.out_of_date(folder, "native", SOURCE, True) or "")
    unchecked = exported(tmp_path / "unchecked", checked=False)
    assert folders.out_of_date(unchecked, "native", SOURCE, checked=True) == "it was not checked"
    assert folders.out_of_date(unchecked, "native", SOURCE, checked=False) is None
    assert json.loads((folder / folders.MARK).read_text())["written_by"] == "lightning-gsq"
