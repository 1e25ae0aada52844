"""progress.json and summary.json of any shape: what has its shape counts, the rest comes back by itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_gsq.run.folder import RunFolder

SHAPES: list[Any] = [None, True, 1, "text", [], [1], {}, {"a": 1}, {"a": {"b": "c"}}, {"a": [1]}, {"a": None}]


@pytest.mark.parametrize("key", ["perplexity", "seconds", "init_seconds", "model", "peak_memory_bytes", "other"])
def test_entries_of_another_shape_are_left_out(key: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for shape in SHAPES:
        (tmp_path / "progress.json").write_text(json.dumps({key: shape, "seconds": {"saving": 1.5}}))
        assert folder.perplexity("blocks", "digest") is None
        folder.add_seconds("saving", 1.0)
        assert folder.progress["seconds"]["saving"] == 2.5
        folder.note_perplexity("blocks", "digest", 7.0)
        assert folder.perplexity("blocks", "digest") == 7.0


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '"x"', "[" * 10_000, "\ud800"])
def test_files_of_another_shape_count_as_empty(text: str, tmp_path: Path) -> None:
    for name in ("progress.json", "summary.json"):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    folder = RunFolder(tmp_path)
    assert folder.progress == {} and folder.summary == {}


def test_a_summary_of_another_shape_counts_as_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_summary({"perplexity": {"blocks": 1.5}, "exports": {}, "seed": 1})
    assert folder.summary["seed"] == 1
    for wrong in ({"perplexity": [1]}, {"perplexity": {"a": "b"}}, {"exports": []}, {"exports": {"native": 1}}):
        folder.write_summary({"seed": 1, **wrong})
        assert folder.summary == {}


def test_a_perplexity_belongs_to_what_it_was_measured_of(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note_perplexity("blocks", "one text", 10.0)
    folder.note_perplexity("blocks", "another", 11.0)
    assert folder.perplexity("blocks", "one text") == 10.0 and folder.perplexity("blocks", "another") == 11.0
    assert folder.perplexity("blocks", "a third") is None and folder.perplexity("warm_start", "another") is None
