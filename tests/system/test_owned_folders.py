"""Folders that may be replaced, and files in them that were there before."""

from pathlib import Path

import pytest

from lightning_gsq.system.owned_folders import growing, obstacle, out_of_date, publish, read_mark, write_mark

MARK, OF = "mark.json", {"made_from": "abc"}


def _write(folder: Path, text: str = "1", content: dict[str, str] = OF) -> None:
    with growing(folder) as partial:
        (partial / "inside").mkdir()
        (partial / "inside" / "weights").write_text(text)
        write_mark(partial, MARK, content)
        publish(partial, folder, MARK)


def test_whole_and_current(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert out_of_date(folder, MARK, OF) == "it is not there"
    _write(folder)
    assert out_of_date(folder, MARK, OF) is None and obstacle(folder, MARK) is None
    assert out_of_date(folder, MARK, {"made_from": "other"}) == "it was made from something else"
    (folder / "inside" / "weights").write_text("2")
    assert out_of_date(folder, MARK, OF) == "inside/weights is damaged"
    (folder / "inside" / "weights").write_text("1")  # another time, the same content
    assert out_of_date(folder, MARK, OF) is None
    (folder / "inside" / "weights").unlink()
    assert out_of_date(folder, MARK, OF) == "inside/weights is missing"


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"written_by": "lightning-gsq", "files": {"a": 1}}', "\xff", "[" * 9999]
)
def test_a_mark_of_another_shape_is_none(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / MARK).write_text(text, encoding="latin-1")
    assert read_mark(folder, MARK) is None
    assert "written by something else" in str(obstacle(folder, MARK))


def test_what_is_somebody_elses_is_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert "is a file" in str(obstacle(tmp_path / "file", MARK))
    assert "written by something else" in str(obstacle(tmp_path / "full", MARK))
    assert "is a symbolic link" in str(obstacle(tmp_path / "link", MARK))
    assert obstacle(tmp_path / "empty", MARK) is None and obstacle(tmp_path / "none", MARK) is None


def test_files_of_others_move_along(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _write(folder)
    (folder / "inside" / "notes.txt").write_text("mine")
    _write(folder, "2", {"made_from": "new"})
    assert (folder / "inside" / "notes.txt").read_text() == "mine"
    assert (folder / "inside" / "weights").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    _write(folder)
    real = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        _write(folder, "2")
    assert (folder / "inside" / "weights").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
