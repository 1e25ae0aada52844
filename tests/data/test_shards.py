"""Datasets and local shards: layouts, order, shuffling, going on in the middle, and bad files."""

import errno
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from lightning_gsq.data import HuggingFaceDataset, LocalShards, Mixture, PythonDocumentation, TextFile, TextSource
from lightning_gsq.data.retrying import RetryingReader
from pyarrow import parquet

from lightning_gsq.errors import ConfigurationError


def _parquet(file: Path, texts: list[object], column: str = "text", row_group_size: int = 3) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    parquet.write_table(table, file, row_group_size=row_group_size)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder of the hub's layout: README, and Parquet shards of 7, 1 and 5 rows."""
    root = tmp_path / "repository"
    for shard, rows in enumerate((7, 1, 5)):
        _parquet(root / "data" / f"train-{shard:05d}-of-00003.parquet", [f"{shard}-{row}" for row in range(rows)])
    (root / "README.md").write_text("---\ntask_categories: [text-generation]\n---\n# A dataset\n")
    return root


def _mixed(repository: Path) -> Path:
    """The same folder with JSON lines beside the Parquet files, one of them compressed."""
    lines = [json.dumps({"text": f"j-{row}", "meta": row if row % 2 else "odd types"}) for row in range(4)]
    (repository / "data" / "more.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    with gzip.open(repository / "data" / "packed.json.gz", "wt") as file:
        file.write("".join(json.dumps({"text": f"z-{row}"}) + "\n" for row in range(2)))
    return repository


EXPECTED = [f"{shard}-{row}" for shard, rows in enumerate((7, 1, 5)) for row in range(rows)]
Make = Callable[[Path], TextSource]
SOURCES: dict[str, Make] = {
    "streamed": lambda root: HuggingFaceDataset(str(root)),
    "whole": lambda root: HuggingFaceDataset(str(root), streaming=False),
    "streamed, shuffled": lambda root: HuggingFaceDataset(str(root), shuffle_buffer=4),
    "local": lambda root: LocalShards(str(root)),
    "local, shuffled": lambda root: LocalShards(str(root), shuffle_buffer=4),
    "local, shuffled whole": lambda root: LocalShards(str(root), shuffle_buffer=1000),
    "in turn": lambda root: Mixture([LocalShards(str(root)), PythonDocumentation("evaluation")]),
    "mixed": lambda root: Mixture(
        [HuggingFaceDataset(str(root), shuffle_buffer=3), LocalShards(str(root)), PythonDocumentation("evaluation")],
        weights=[1, 3, 0.5],
    ),
}


@pytest.mark.parametrize("name", ["streamed", "whole", "local"])
def test_order_of_the_shards(repository: Path, name: str) -> None:
    source = SOURCES[name](repository)
    source.check()
    assert list(source.documents()) == EXPECTED


@pytest.mark.parametrize("name", ["streamed, shuffled", "local, shuffled", "local, shuffled whole"])
def test_shuffling_keeps_every_document(repository: Path, name: str) -> None:
    documents = list(SOURCES[name](repository).documents())
    assert documents != EXPECTED
    assert sorted(map(str, documents)) == sorted(EXPECTED)
    assert list(SOURCES[name](repository).documents()) == documents


def test_seed_of_the_shuffling(repository: Path) -> None:
    orders = [list(LocalShards(str(repository), shuffle_buffer=8, seed=seed).documents()) for seed in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_reader_goes_on_where_another_stopped(repository: Path, name: str) -> None:
    whole = list(SOURCES[name](repository).documents())
    for stop in range(len(whole) + 1):
        reader = SOURCES[name](repository).reader()
        begun = [next(reader) for _ in range(stop)]
        position = json.loads(json.dumps(reader.position))
        assert begun + list(SOURCES[name](repository).reader(position)) == whole, stop


def test_parquet_and_json_lines_together(repository: Path) -> None:
    documents = list(LocalShards(str(_mixed(repository))).documents())
    assert documents == ["j-0", "j-1", "j-2", "j-3", "z-0", "z-1", *EXPECTED]


def test_patterns_and_single_files(repository: Path) -> None:
    _mixed(repository)
    assert list(LocalShards(str(repository / "data" / "*-0000[12]-*.parquet")).documents()) == EXPECTED[7:]
    assert list(LocalShards(str(repository / "**" / "packed*")).documents()) == ["z-0", "z-1"]
    assert list(LocalShards(str(repository / "data" / "more.jsonl")).documents()) == ["j-0", "j-1", "j-2", "j-3"]


def test_conversations_and_rows_without_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    _parquet(tmp_path / "a.parquet", [messages, None, messages], "messages")
    for source in (LocalShards(str(tmp_path), "messages"), HuggingFaceDataset(str(tmp_path), column="messages")):
        assert list(source.documents()) == [messages, messages]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.parquet", None, "no file, folder or match of the pattern"),
        ("bad.parquet", b"PAR1 and nonsense", "cannot read .*bad.parquet"),
        ("bad.jsonl", b"{nonsense\n", "line 1 of .* is not JSON"),
        ("latin.jsonl", '{"text": "d\u00e9j\u00e0"}'.encode("latin-1"), "cannot read .*latin.jsonl"),
        ("other.jsonl", b'{"body": "x"}\n', r"column: line 1 of .* has no 'text'; it has \['body'\]"),
        ("number.jsonl", b'{"text": 7}\n', "holds int, not text or chat messages"),
        ("empty.jsonl", b"\n\n", "is empty"),
        ("cut.jsonl.gz", b"not gzip", "cannot read .*cut.jsonl.gz"),
        ("text.csv", b"text\nx\n", "text.csv is none of .parquet, .jsonl"),
    ],
)
def test_bad_shards(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        LocalShards(str(tmp_path / name)).check()


def _damaged(content: bytes) -> list[bytes]:
    """Cut off, bits flipped, bytes gone."""
    chance = random.Random(0)
    damaged = [content[: len(content) * part // 8] for part in range(1, 8)]
    for _ in range(30):
        changed = bytearray(content)
        place = chance.randrange(len(content))
        if chance.random() < 0.5:
            del changed[place : place + chance.randrange(1, 100)]
        else:
            changed[place] ^= 1 << chance.randrange(8)
        damaged.append(bytes(changed))
    return damaged


@pytest.mark.parametrize("kind", [LocalShards, HuggingFaceDataset])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
def test_damaged_shards_are_refused_at_once(
    kind: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names it, and no attempt to read it again as if a network had failed."""
    monkeypatch.setattr("lightning_gsq.data.retrying.time.sleep", lambda _: pytest.fail("tried again"))
    texts = [f"Document {i} " + "x" * (i % 23) for i in range(200)]
    file = tmp_path / "shards" / name
    _parquet(file, list(texts), row_group_size=50)
    content = file.read_bytes()
    if name.endswith(".gz"):
        content = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    refused = 0
    for damaged in _damaged(content):
        file.write_bytes(damaged)
        try:
            list(RetryingReader(kind(str(file.parent))))
        except ConfigurationError as error:
            refused += 1
            assert str(error).startswith(("path: ", "column: ")) and "\n" not in str(error)
    assert refused > 25
    assert refused == len(_damaged(content)) or name == "a.parquet", "gzip has a checksum"


def test_failures_of_the_file_system_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _parquet(tmp_path / "a.parquet", ["a", "b"])
    failures = [OSError(errno.EIO, "Input/output error")] * 2
    real = parquet.ParquetFile

    def fails(file: Path) -> parquet.ParquetFile:
        if failures:
            raise failures.pop()
        return real(file)

    monkeypatch.setattr(parquet, "ParquetFile", fails)
    assert list(RetryingReader(LocalShards(str(tmp_path)), pause=0)) == ["a", "b"]
    assert not failures


def test_rows_are_named_with_their_number(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", ["a", None, *"cdefg"])
    reader = RetryingReader(LocalShards(str(tmp_path)))
    places = [(document, reader.place) for document in reader]
    assert places[1] == ("c", f"row 3 of {tmp_path / 'a.parquet'}")
    assert places[5] == ("g", f"row 7 of {tmp_path / 'a.parquet'}")
    reader = RetryingReader(LocalShards(str(tmp_path)), {"chunk": 0, "shard": 0, "row": {"rows": 4}, "given": 0})
    assert (next(reader), reader.place) == ("e", f"row 5 of {tmp_path / 'a.parquet'}")
    reader = RetryingReader(Mixture([PythonDocumentation(), LocalShards(str(tmp_path), shuffle_buffer=9)]))
    assert next(reader) and reader.place == "document 1 of PythonDocumentation"
    letter = str(next(reader))
    assert reader.place == f"row {'ab cdefg'.replace(' ', '').index(letter) + 1} of {tmp_path / 'a.parquet'}"
    reader = RetryingReader(HuggingFaceDataset(str(tmp_path)))
    assert (next(reader), next(reader)) == ("a", "c") and reader.place.startswith("row 3 of a shard of the dataset")


def test_missing_columns(repository: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no column 'body'; it has \['id', 'text'\]"):
        LocalShards(str(repository), "body").check()
    with pytest.raises(ConfigurationError, match=r"holds no file of \.parquet, \.jsonl"):
        (repository / "data" / "bare").mkdir()
        LocalShards(str(repository / "data" / "bare")).check()
    with pytest.raises(ConfigurationError, match="shuffle_buffer must be at least 2"):
        LocalShards(str(repository), shuffle_buffer=1)


def test_weights_of_a_mixture(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": name}) + "\n" for _ in range(2000)))
    sources: list[TextSource] = [LocalShards(str(tmp_path / "a.jsonl")), TextFile(str(tmp_path / "b.jsonl"))]
    reader = Mixture(sources, weights=[3, 1], seed=7).documents()
    first = [next(reader) for _ in range(1000)]
    assert 700 < first.count("a") < 800
    again = Mixture(sources, weights=[3, 1], seed=7).documents()
    assert [next(again) for _ in range(1000)] == first
    other = Mixture(sources, weights=[3, 1], seed=8).documents()
    assert [next(other) for _ in range(1000)] != first


def test_a_mixture_says_when_a_source_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n' * 20)
    mixture = Mixture([LocalShards(str(tmp_path / f"{name}.jsonl")) for name in "ab"], weights=[5, 1])
    assert sorted(map(str, mixture.documents())) == ["a"] + ["b"] * 20
    assert "source 0 of the mixture is used up" in caplog.text


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0], "2 sources need as many weights, got 1"), ([1.0, 0.0], "positive number")]
)
def test_bad_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Mixture([PythonDocumentation(), PythonDocumentation("evaluation")], weights=weights)
