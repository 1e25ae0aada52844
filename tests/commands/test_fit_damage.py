"""What happens to a finished run's files, and what the same command makes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lightning_gsq.cli import main
from lightning_gsq.training import BlockQuantization
from tests.support.runs import block_files, summary_of, write_config

PHASES = ["init", "blocks", "end_to_end"]


def _config(model: Path, corpus: Path, folder: Path) -> Path:
    return write_config(
        model,
        corpus,
        folder,
        model__phases=PHASES,
        trainer__max_steps=3,
        trainer__logger=False,
        data__num_sequences=12,
        evaluation__num_windows=2,
    )


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of all phases."""
    folder = tmp_path_factory.mktemp("finished") / "own"
    assert main(["fit", "--config", str(_config(tiny_llama, corpus, folder))]) == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "own")
    return tmp_path / "own"


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _swap(run: Path) -> None:
    one, two = run / "blocks" / "block-000.safetensors", run / "blocks" / "block-001.safetensors"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def _rename(run: Path) -> None:
    shutil.copy(run / "blocks" / "warm_start-000.safetensors", run / "blocks" / "block-000.safetensors")


def _cut(run: Path) -> None:
    file = run / "blocks" / "block-001.safetensors"
    file.write_bytes(file.read_bytes()[:200])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "one bit of a block": (lambda run: _flip(run / "blocks" / "block-000.safetensors"), "contents have changed"),
    "one bit of a warm start": (lambda run: _flip(run / "blocks" / "warm_start-001.safetensors"), "have changed"),
    "one bit of the end": (lambda run: _flip(run / "blocks" / "end_to_end-001.safetensors"), "contents have changed"),
    "one bit of the norms": (lambda run: _flip(run / "end_to_end.safetensors"), "contents have changed"),
    "two blocks swapped": (_swap, "it is block of block 1"),
    "a warm start for a block": (_rename, "it is warm_start of block 0"),
    "a block cut off": (_cut, "block-001.safetensors cannot be used"),
    "progress": (lambda run: (run / "progress.json").write_text("[1]"), "progress.json is damaged"),
    "no progress": (lambda run: (run / "progress.json").unlink(), ""),
    "summary": (lambda run: (run / "summary.json").write_text("{"), "summary.json is damaged"),
    "recipe": (lambda run: (run / "recipe.yaml").write_text("a: ["), "recipe.yaml is damaged; it is written anew"),
    "no recipe": (lambda run: (run / "recipe.yaml").unlink(), ""),
    "one bit of the model": (lambda run: _flip(run / "model" / "model.safetensors"), ""),
    "no model": (lambda run: shutil.rmtree(run / "model"), ""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_same_command_makes_it_again(
    name: str, finished: Path, folder: Path, tiny_llama: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = DAMAGES[name]
    damage(folder / "run")
    assert main(["fit", "--config", str(_config(tiny_llama, corpus, folder))]) == 0
    assert said in capsys.readouterr().out.replace("\n", " ")
    for kind in ("warm_start", "block", "end_to_end"):
        assert block_files(folder, kind) == block_files(finished, kind)
    model = (folder / "run" / "model" / "model.safetensors").read_bytes()
    assert model == (finished / "run" / "model" / "model.safetensors").read_bytes()
    assert summary_of(folder)["perplexity"] == summary_of(finished)["perplexity"]
    assert set(summary_of(folder)["blocks"]) == {"0", "1"}
    recipes = [yaml.safe_load((f / "run" / "recipe.yaml").read_text())["settings"] for f in (folder, finished)]
    assert recipes[0] == recipes[1]


def test_only_the_damaged_block_is_trained_again(
    folder: Path, tiny_llama: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _flip(folder / "run" / "blocks" / "block-000.safetensors")
    trained = []
    real = BlockQuantization.on_train_start
    monkeypatch.setattr(BlockQuantization, "on_train_start", lambda self: (trained.append(self.index), real(self))[1])
    before = (folder / "run" / "blocks" / "block-001.safetensors").stat().st_mtime_ns
    assert main(["fit", "--config", str(_config(tiny_llama, corpus, folder))]) == 0
    assert trained == [0]
    assert (folder / "run" / "blocks" / "block-001.safetensors").stat().st_mtime_ns == before


def test_without_its_recipe_another_run_does_not_take_the_blocks(
    folder: Path, tiny_llama: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run" / "recipe.yaml").unlink()
    before = block_files(folder)
    assert main(["fit", "--config", str(_config(tiny_llama, corpus, folder)), "--seed_everything", "5"]) == 2
    assert "has block files and no recipe.yaml" in capsys.readouterr().err
    assert block_files(folder) == before and not (folder / "run" / "recipe.yaml").exists()


def test_another_text_for_perplexity_is_measured_and_nothing_is_trained(
    finished: Path,
    folder: Path,
    tiny_llama: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(BlockQuantization, "training_step", lambda *_: pytest.fail("nothing is left to train"))
    config = str(_config(tiny_llama, corpus, folder))
    assert main(["fit", "--config", config, "--evaluation.num_windows", "3"]) == 0
    assert "perplexities are measured anew" in capsys.readouterr().out.replace("\n", " ")
    other = summary_of(folder)["perplexity"]
    assert set(other) == {"full_precision", "warm_start", "blocks", "end_to_end"}
    assert all(other[name] != value for name, value in summary_of(finished)["perplexity"].items())
    assert main(["fit", "--config", config]) == 0
    assert summary_of(folder)["perplexity"] == summary_of(finished)["perplexity"]


def test_the_address_may_be_written_otherwise(
    folder: Path, tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_llama, corpus, folder)
    (tmp_path / "link").symlink_to(tiny_llama)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BlockQuantization, "training_step", lambda *_: pytest.fail("nothing is left to train"))
    shutil.copy(corpus, tmp_path / "copy.txt")
    arguments = ["--model.pretrained", "./link", "--data.source.path", "copy.txt"]
    assert main(["fit", "--config", str(config), *arguments]) == 0
    addresses = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())["addresses"]
    assert addresses["model.pretrained"] == str(tmp_path / "link")


def test_a_run_beside_its_model_keeps_its_hands_off(
    tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    config = _config(tmp_path / "model", corpus, tmp_path / "config")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    monkeypatch.chdir(tmp_path)
    arguments = ["--model.pretrained", "model", "--trainer.default_root_dir", "."]
    assert main(["fit", "--config", str(config), *arguments]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config", "model"]


def test_the_header_keeps_what_was_measured(finished: Path) -> None:
    blocks = summary_of(finished)["blocks"]
    assert all(block["final"] <= block["start"] and block["seconds"] > 0 for block in blocks.values())
    assert all(
        block["made_by"] == {"processes": 1, "nodes": 1, "strategy": block["made_by"]["strategy"]}
        for block in blocks.values()
    )
    assert "blocks" not in json.loads((finished / "run" / "progress.json").read_text())
