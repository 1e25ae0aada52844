"""What the pages show works: the examples of docs/extending.md in a run of a few seconds; links lead somewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gsq.cli import main
from lightning_gsq.cli.listings import FOLDER
from lightning_gsq.export import registry
from lightning_gsq.weights.salient_part import SalientPart
from tests.support.runs import summary_of, write_config
from tests.support.tiny import save_tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the page's examples as one module, on Python's path."""
    folder = tmp_path_factory.mktemp("examples")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    (folder / "gsq_examples.py").write_text("\n\n".join(blocks))
    return folder


def test_the_examples_of_extending_take_part_in_a_run(
    examples: Path,
    tiny_llama: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(examples))
    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))  # what the page registers ends with this test
    callbacks = [
        {"class_path": path} for path in ("lightning_gsq.callbacks.GumbelAnnealing", "gsq_examples.CountCodes")
    ]
    config = write_config(
        tiny_llama,
        corpus,
        tmp_path,
        trainer__callbacks=callbacks,
        model__warm_start={"class_path": "gsq_examples.AbsMax"},
        data__source={"class_path": "gsq_examples.Numbers", "init_args": {"count": 400}},
    )
    assert main(["fit", "--config", str(config), "--export", "[gsq_examples.CodesAsNumPy]"]) == 0
    assert (tmp_path / "run" / "export" / "numpy" / "weights.npz").stat().st_size > 10_000
    assert set(summary_of(tmp_path)["perplexity"]) == {"full_precision", "warm_start", "blocks"}
    said = re.findall(r"model\.layers\.(\d): (\d+) codes moved", capsys.readouterr().out)
    assert [block for block, _ in said] == ["0", "1"]
    assert all(int(moved) > 0 for _, moved in said)
    sys.modules.pop("gsq_examples", None)


@pytest.fixture(scope="module")
def my_model(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with what the examples of docs/library.md name: ``my-model`` and ``corpus.txt``."""
    folder = tmp_path_factory.mktemp("library")
    config = save_tiny_model("llama", folder / "my-model") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    (folder / "corpus.txt").write_text(corpus.read_text())
    return folder


@pytest.mark.parametrize("number", [0, 1], ids=["a model", "one block"])
def test_the_examples_of_library_run(
    number: int, my_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(my_model)
    # Compiling takes longer than all else on a model of this size.
    for module in ("run.run", "ops.gumbel_softmax.fused"):
        monkeypatch.setattr(f"lightning_gsq.{module}.compiler_available", lambda _: False)
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)[number]
    names: dict[str, object] = {}
    exec(compile(example, "docs/library.md", "exec"), names)
    if number == 0:
        assert (my_model / "runs" / "mine" / "export" / "native" / "config.json").is_file()
        assert "bits a weight" in capsys.readouterr().out
    else:
        assert len(names["tensors"]) == 7  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`((?:lightning_gsq|callbacks|data|tests|scripts|docs)/[\w./-]+\.\w+)`", page.read_text()))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


CLASSES = ("data.source", "evaluation.source", "model.warm_start", "model.optimizer", "end_to_end.optimizer")
CLASSES += ("trainer.callbacks", "trainer.strategy", "trainer.logger")
"""Options that take a class, whose arguments follow their names."""


def options_of_all_verbs() -> set[str]:
    """Names of all options, from the parser's listings."""
    text = "".join(file.read_text() for file in FOLDER.glob("*.all.txt"))
    salient = {f"model.scheme.salient.{field.name}" for field in dataclasses.fields(SalientPart)}
    return set(re.findall(r"--([a-z][\w.]*)", text)) | salient | {"help.all", "version", "debug"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    there = options_of_all_verbs()
    named: set[str] = set()
    for line in page.read_text().splitlines():
        if "scripts/" in line or "lm_eval" in line or "llama-" in line or "vllm" in line or "torchrun --" in line:
            continue  # other programs
        names = re.findall(r"(?<![\w-])--([a-z][\w.]*[\w])", line)
        ours = "lightning-gsq " in line or "lightning_gsq " in line
        named |= {name for name in names if "." in name or (ours and "pip " not in line)}
    unknown = {name for name in named if name not in there and not name.startswith(tuple(f"{c}." for c in CLASSES))}
    assert unknown - {"logdir"} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--model.scheme.bits" in (tmp_path / "site" / "options" / "index.html").read_text()
    assert "prepare_block" in (tmp_path / "site" / "api" / "index.html").read_text()
    assert "hooks.py" not in {file.name for file in (tmp_path / "site").rglob("*")}


def test_every_page_is_in_the_site() -> None:
    pages = {file.name for file in (ROOT / "docs").glob("*.md")}
    assert pages == set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
