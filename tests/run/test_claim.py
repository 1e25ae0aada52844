"""A run folder is a run's own: nothing of anybody else is written over, one process at a time."""

from pathlib import Path

import pytest
import yaml

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.loading import ModelSource
from lightning_gsq.run.claim import claimed
from lightning_gsq.system.files import hidden_name

HUB = ModelSource("organisation/name")


def _claim(root: Path, source: ModelSource = HUB) -> list[str]:
    said: list[str] = []
    with claimed(root, 0, source, said.append) as folder:
        assert folder.blocks.is_dir()
    return said


@pytest.mark.parametrize("name", ["model", "export", "blocks", "calibration", "teacher"])
def test_foreign_folders_are_no_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name / "native").mkdir(parents=True)
    (tmp_path / name / "native" / "thesis.txt").write_text("years")
    with pytest.raises(ConfigurationError, match=rf"{name}"):
        _claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["progress.json", "end_to_end.safetensors", "recipe.yaml", "summary.json"])
def test_foreign_files_are_no_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigurationError, match=rf"holds {name} and is not the folder of a run"):
        _claim(tmp_path)


def test_other_files_do_not_matter_and_a_run_comes_back(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    _claim(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    _claim(tmp_path)
    (tmp_path / ".lock").unlink()  # a copy without hidden files: the recipe says whose it is
    recipe = {"format": 2, "seed": 0, "settings": {"model": {}}, "fingerprints": {}, "versions": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _claim(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model", "tensorboard", "blocks"])
def test_a_file_in_the_place_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(ConfigurationError, match=f"{name} is a file"):
        _claim(tmp_path)


def test_links_and_foreign_models_in_a_run_are_left_alone(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    _claim(run)
    other.mkdir()
    (run / "model").symlink_to(other)
    with pytest.raises(ConfigurationError, match="is a symbolic link"):
        _claim(run)
    (run / "model").unlink()
    (run / "model").mkdir()
    (run / "model" / "thesis.txt").write_text("years")
    with pytest.raises(ConfigurationError, match=r"written by something else .* move it away"):
        _claim(run)


def test_the_original_is_never_inside_of_what_is_written(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    for root in (tmp_path, model, model / "inner"):
        with pytest.raises(ConfigurationError, match="choose another folder"):
            _claim(root, ModelSource(str(model)))
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(ConfigurationError, match="choose another folder"):
        _claim(tmp_path, ModelSource(str(tmp_path / "link")))
    with pytest.raises(ConfigurationError, match=r"writes into .*model"):
        _claim(tmp_path, ModelSource(str(model), "x.gguf"))
    _claim(tmp_path / "apart", ModelSource(str(model)))
    _claim(tmp_path / "beside", ModelSource(str(tmp_path / "beside"), "x.gguf"))


def test_a_second_start_is_refused(tmp_path: Path) -> None:
    with (
        claimed(tmp_path, 0, HUB, print),
        pytest.raises(ConfigurationError, match=r"process \d+ on .* is working in"),
        claimed(tmp_path, 0, HUB, print),
    ):
        pass
    with claimed(tmp_path, 0, HUB, print), claimed(tmp_path, 1, HUB, print) as folder:
        assert folder.rank == 1, "another process of the same run"


def test_leftovers_go_and_damaged_files_step_aside(tmp_path: Path) -> None:
    _claim(tmp_path)
    left = [hidden_name(tmp_path / "model"), hidden_name(tmp_path / "blocks" / "block-000.safetensors")]
    left[0].mkdir()
    left[1].write_text("half")
    (tmp_path / "progress.json").write_text("{")
    (tmp_path / "summary.json").write_text("[]")
    said = _claim(tmp_path)
    assert not any(path.exists() for path in left)
    assert len(said) == 2 and all("is damaged: it is kept as" in line for line in said)
    assert (tmp_path / "progress.damaged.json").read_text() == "{"
    assert not (tmp_path / "progress.json").exists()
