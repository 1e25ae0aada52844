"""YAML that stands for more than its text: refused before anything is built."""

import time
from pathlib import Path

import pytest

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.yaml_files import MAX_BYTES, parse_yaml, read_yaml
from tests.support.hostile import YAML_BOMB


def test_plain_documents_and_honest_aliases() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {d: null, e: 1.5}\n") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": None, "e": 1.5},
    }
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (YAML_BOMB, "stands for more than"),
        ("a: &a [*a]\n", "contains itself"),
        ("a: &a {b: {c: *a}}\n", "contains itself"),
        ("[" * 70 + "]" * 70, "nested more than 60 deep"),
        ("[" * 100_000, "cannot be read"),
        ("settings: [", "cannot be read"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("x" * (MAX_BYTES + 1), "at most 10,000,000 are read"),
    ],
    ids=["bomb", "itself", "itself deeper", "deep", "very deep", "cut", "python", "long"],
)
def test_others_are_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigurationError, match=message):
        read_yaml(file, "run")
    assert time.process_time() - began < 10


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe\n")
    for file in (tmp_path / "latin.yaml", tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(ConfigurationError, match=f"run: {file} cannot be read"):
            read_yaml(file, "run")
