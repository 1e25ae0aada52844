"""What may stand for a document: text, messages, null; everything else is refused with its place."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning_gsq.data import LocalShards, Mixture, TextFile, TextSource
from lightning_gsq.data.documents import accept, without_surrogates
from lightning_gsq.data.retrying import RetryingReader
from lightning_gsq.data.sources import DocumentReader, Position

from lightning_gsq.errors import ConfigurationError
from tests.support.odd import Listed


def _lines(file: Path, *values: object, field: str = "text") -> Path:
    file.write_text("".join(json.dumps({field: value}) + "\n" for value in values), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", [TextFile, LocalShards])
def test_null_is_passed_over_and_nothing_after_it_is_lost(kind: Any, tmp_path: Path) -> None:
    file = _lines(tmp_path / "null.jsonl", None, "a", None, None, "b", "", "c", None)
    assert list(kind(str(file)).documents()) == ["a", "b", "", "c"]
    assert list(RetryingReader(Mixture([kind(str(file)), Listed(["x", None, "y"])]))) == ["a", "x", "b", "y", "", "c"]
    kind(str(file)).check()


def test_a_source_of_ones_own_may_yield_none() -> None:
    assert list(RetryingReader(Listed([None, "a", None, "b", None]))) == ["a", "b"]
    reader = Listed([None, "a", None, "b"]).reader()
    assert next(reader) == "a"
    assert list(Listed([None, "a", None, "b"]).reader(reader.position)) == ["b"]


@pytest.mark.parametrize("kind", [TextFile, LocalShards])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "holds int, not text or chat messages"),
        (True, "holds bool"),
        (1.5, "holds float"),
        ({"a": 1}, "holds dict"),
        (["a", "b"], "message 1 of line 4 of .* is str; expected text, or a list of messages with role and content"),
        ([], "holds an empty list of messages"),
        ([{"from": "human", "value": "x"}], "expected role and content, it has from and value; rename the keys"),
        ([{"role": "user"}], "expected role and content, it has role"),
        ([{}], "expected role and content, it has no key"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "message 2 .* content is null"),
        ([{"role": "user", "content": None, "tool_calls": []}], "its content is null, not text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "its content is of type list, not text"),
        ([{"role": 1, "content": "x"}], "its role is of type int"),
    ],
)
def test_what_is_no_document_is_refused_with_its_line(kind: Any, value: object, message: str, tmp_path: Path) -> None:
    file = _lines(tmp_path / "odd.jsonl", "one", "two", "three", value, "five")
    documents = kind(str(file)).documents()
    assert [next(documents) for _ in range(3)] == ["one", "two", "three"]
    with pytest.raises(ConfigurationError, match=message) as caught:
        next(documents)
    assert str(caught.value).startswith(("field: ", "column: ")) and f"line 4 of {file}" in str(caught.value)


@pytest.mark.parametrize("value", [7, {"a": 1}, b"bytes", ("a", "b")])
def test_a_source_of_ones_own_that_yields_something_else(value: object) -> None:
    kind = type(value).__name__
    message = rf"Listed.documents\(\) must yield str or list of messages, got {kind} as document 2"
    with pytest.raises(ConfigurationError, match=message):
        list(RetryingReader(Listed(["a", value])))
    with pytest.raises(ConfigurationError, match=rf"must yield str or list of messages, got {kind} as document 1"):
        Listed([value]).check()


@pytest.mark.parametrize("value", [None, 5, "one text"])
def test_a_source_of_ones_own_that_returns_no_iterator(value: object) -> None:
    message = rf"Listed.documents\(\) must yield str or list of messages, it returned {type(value).__name__}"
    with pytest.raises(ConfigurationError, match=message):
        Listed(value).check()


def test_a_source_of_ones_own_without_documents() -> None:
    with pytest.raises(ConfigurationError, match="Listed: it yields no document"):
        Listed([None]).check()


def test_a_reader_of_ones_own() -> None:
    class Reader(DocumentReader):
        def __init__(self) -> None:
            self.items = iter([None, "a", None, [{"role": "user", "content": "b\ud800"}], 7])

        def __next__(self) -> Any:
            return next(self.items)

        @property
        def position(self) -> Position:
            return {}

    class Own(TextSource):
        def documents(self) -> DocumentReader:
            return self.reader()

        def reader(self, position: Position | None = None) -> DocumentReader:
            return Reader()

    reader = RetryingReader(Own())
    assert [next(reader), next(reader)] == ["a", [{"role": "user", "content": "b\ufffd"}]]
    with pytest.raises(ConfigurationError, match=r"Own.reader\(\) must give str or list of messages, got int"):
        next(reader)


def test_half_surrogate_pairs() -> None:
    assert without_surrogates("a\ud83db\udc00") == "a\ufffdb\ufffd"
    assert without_surrogates("\ud83d\ude00 \U0001f600") == "\U0001f600 \U0001f600"
    messages = [{"role": "us\ud83der", "content": "\udfff", "name": "x"}]
    assert accept(messages, "field", "line 1") == [{"role": "us\ufffder", "content": "\ufffd", "name": "x"}]


def test_half_surrogate_pairs_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "half.jsonl"
    file.write_text('{"text": "half \\ud83d end"}\n{"text": "whole \\ud83d\\ude00"}\n')
    for source in (TextFile(str(file)), LocalShards(str(file))):
        assert list(source.documents()) == ["half \ufffd end", "whole \U0001f600"]


def test_a_call_of_tools_has_no_content() -> None:
    """Most templates would write the word None."""
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert accept([call, {**call, "content": None}], "field", "line 1") == [{**call, "content": ""}] * 2
