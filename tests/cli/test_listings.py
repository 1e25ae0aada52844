"""Help that is written down: it is the parser's, and frozen; it is quick, and not used where it may be another's."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_gsq.cli import listings, main
from lightning_gsq.cli.verbs import SUMMARIES

ROOT = Path(__file__).parents[2]
AGAIN = "options have changed: if that is meant, run python scripts/write_listings.py and commit what it writes"


def test_the_files_are_what_the_parser_says(tmp_path: Path) -> None:
    """This freezes the list of options, their explanations and defaults.

    In a process of its own: how Python writes the type of an option depends on what else was imported.
    """
    subprocess.run([sys.executable, str(ROOT / "scripts" / "write_listings.py"), str(tmp_path)], check=True)
    written = {file.name: file.read_text() for file in tmp_path.glob("*.txt")}
    there = {file.name: file.read_text() for file in listings.FOLDER.glob("*.txt")}
    assert sorted(written) == sorted(there), AGAIN
    python = ".".join(platform.python_version_tuple()[:2])
    for name, content in there.items():
        head, _, text = content.partition("\n")
        assert head.partition("; ")[0] == listings.made_with(), AGAIN
        now = written[name].partition("\n")[2]
        if head.endswith(f"Python {python}"):
            assert now == text, AGAIN
        else:  # other versions of Python lay the same text out otherwise
            assert set(now.split()) == set(text.split()), AGAIN


@pytest.mark.parametrize("verb", SUMMARIES)
@pytest.mark.parametrize("option", ["--help", "--help.all"])
def test_help_needs_no_libraries(verb: str, option: str) -> None:
    code = f"""if True:
        import sys
        from lightning_gsq.cli import main
        assert main(["{verb}", "a model", "{option}"]) == 0
        print(sorted({{"torch", "lightning", "transformers", "jsonargparse"}} & set(sys.modules)))
    """
    began = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: python -m lightning_gsq {verb} ")
    assert done.stdout.endswith("[]\n")
    assert time.process_time() - began < 3


def test_an_unknown_option_needs_no_libraries() -> None:
    code = """if True:
        import sys
        from lightning_gsq.cli import main
        assert main(["fit", "a model", "--bits", "3"]) == 2
        print(sorted({"torch", "lightning", "transformers", "jsonargparse"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and "did you mean --model.scheme.bits?" in done.stderr


def test_other_versions_ask_the_parser(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(listings, "version", lambda name: "0.0")
    assert listings.listing(["fit", "--help"]) is None
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "--max_new_tokens" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fit"], ["fit", "model"], ["--help"], ["fit", "--model.help"]])
def test_other_command_lines_are_not_answered(arguments: list[str]) -> None:
    assert listings.listing(arguments) is None


def test_no_path_of_a_machine() -> None:
    assert [file.name for file in listings.FOLDER.glob("*") if str(Path.home()) in file.read_text()] == []
    assert [file.name for file in listings.FOLDER.glob("*") if "default.yaml" in file.read_text()] == []
