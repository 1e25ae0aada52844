"""Files that are whole or not there, and what killed writers leave."""

from pathlib import Path

import pytest

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.files import hidden_name, tidy, write_atomically


def test_the_old_file_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "progress.json"
    write_atomically(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigurationError, match=r"data.cache_folder: cannot write .*No space left on device"):
        write_atomically(file, b"new", "data.cache_folder")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_told_as_well(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"Not a directory|File exists"):
        write_atomically(tmp_path / "file" / "inside" / "x", b"1")


def test_leftovers_are_recognised_by_name(tmp_path: Path) -> None:
    kept = [tmp_path / ".hidden", tmp_path / "x.partial", tmp_path / ".x.partial", tmp_path / ".x.notahexa.partial"]
    for file in kept:
        file.write_text("somebody's")
    left = [hidden_name(tmp_path / "progress.json"), tmp_path / ".block-001.safetensors.4711.partial"]
    for file in left:
        file.write_text("half")
    folder = hidden_name(tmp_path / "model")
    (folder / "inside").mkdir(parents=True)
    tidy(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    tidy(tmp_path / "nowhere")


def test_what_lost_its_name_gets_it_back_unless_it_is_taken(tmp_path: Path) -> None:
    old = tmp_path / ".model.0123abcd.old"
    old.mkdir()
    (old / "a").write_text("1")
    tidy(tmp_path)
    assert (tmp_path / "model" / "a").read_text() == "1"
    old.mkdir()
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    old.symlink_to(tmp_path / "model")
    tidy(tmp_path)
    assert (tmp_path / "model" / "a").exists() and not old.is_symlink()
