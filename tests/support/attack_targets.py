"""What is attacked: a run of a tiny model, finished once, with everything that it and its exports left."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.support.attack import Outcome, results, run_forked
from tests.support.exported import save_model
from tests.support.runs import write_config

PHASES = ["init", "blocks", "end_to_end"]


@dataclass(frozen=True)
class Target:
    """A run to attack.

    Args:
        root: Folder for everything.
        model: The tiny model.
        corpus: Its text.
        finished: Run folder of an undisturbed run.
        expected: Digests of what that run stored.
    """

    root: Path
    model: Path
    corpus: Path
    finished: Path
    expected: dict[str, str]

    def arguments(self, name: str) -> list[str]:
        """The command line of the same run in another folder."""
        config = write_config(
            self.model,
            self.corpus,
            self.root / name,
            model__phases=PHASES,
            model__scheme={"bits": 2, "group_size": 64},
            trainer__max_steps=4,
            data__num_sequences=16,
        )
        return ["fit", "--config", str(config)]

    def run_of(self, name: str) -> Path:
        """That folder."""
        return self.root / name / "run"


def make_target(root: Path) -> Target:
    """Makes model and text, and the undisturbed run with its exports."""
    corpus = root / "corpus.txt"
    corpus.write_text("".join(f"Line {i}: the square of {i} is {i * i}.\n" for i in range(300)), encoding="utf-8")
    target = Target(root, save_model(root / "model"), corpus, root / "whole" / "run", {})
    outcome: Outcome = run_forked([*target.arguments("whole"), "--export", "[native,gguf]"], root / "whole.log")
    assert outcome.code == 0, outcome.text
    write_texts(root / "texts")
    return Target(root, target.model, corpus, target.finished, results(target.finished))


def write_texts(folder: Path) -> None:
    """The same documents in every kind of file that text is read from."""
    folder.mkdir()
    rows = [{"text": f"Document {i}: the square of {i} is {i * i}."} for i in range(60)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "plain.txt").write_text("\n".join(row["text"] for row in rows))
    (folder / "lines.jsonl").write_text(lines)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet")
