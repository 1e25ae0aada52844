"""What a file is found to be: encodings, other kinds of files, JSON of another shape, names that cannot be."""

import codecs
import gzip
from pathlib import Path
from typing import Any

import pytest
from lightning_gsq.data import HuggingFaceDataset, LocalShards, TextFile

from lightning_gsq.errors import ConfigurationError

TEXT = "".join(f"Line {i}: the square of {i} is {i * i}.\n" for i in range(200))


def _jsonl(text: str = TEXT) -> str:
    return "".join(f'{{"text": "{line}"}}\n' for line in text.splitlines())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), r"it is UTF-16 text, not UTF-8; convert it with `iconv -f utf-16 -t utf-8 a"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "it is UTF-16 text"),
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), "it is UTF-32 text.*iconv -f utf-32"),
        (TEXT.encode("utf-16-le"), "many of its bytes are 0, so it is UTF-16 without a mark"),
        (
            ("Größe\n" + TEXT).encode("latin-1"),
            r"is not UTF-8 text \(byte 2.*if it is Latin-1 with `iconv -f latin1",
        ),
        (b"PAR1" + bytes(range(256)), "it is a Parquet file; LocalShards reads those"),
        (gzip.compress(TEXT.encode()), "it is compressed"),
        (b"%PDF-1.7\n", "it is a PDF document"),
    ],
    ids=["utf-16", "utf-16-be", "utf-32", "utf-16 without mark", "latin-1", "parquet", "gzip", "pdf"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_is_no_utf8_text_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    sources: list[Any] = [TextFile(str(tmp_path / name))]
    sources += [LocalShards(str(tmp_path / name))] if name == "a.jsonl" else []
    for source in sources:
        with pytest.raises(ConfigurationError, match=f"path: cannot read .*{name}.*{message}"):
            source.check()


def test_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "mark.txt").write_bytes(codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode())
    assert list(TextFile(str(tmp_path / "mark.txt")).documents()) == [TEXT]
    (tmp_path / "mark.jsonl").write_bytes(codecs.BOM_UTF8 + _jsonl().encode())
    with gzip.open(tmp_path / "mark.jsonl.gz", "wb") as file:
        file.write(codecs.BOM_UTF8 + _jsonl().encode())
    for source in (TextFile, LocalShards):
        assert list(source(str(tmp_path / "mark.jsonl")).documents()) == TEXT.splitlines()
    assert list(LocalShards(str(tmp_path / "mark.jsonl.gz")).documents()) == TEXT.splitlines()


@pytest.mark.parametrize("kind", [TextFile, LocalShards])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"text": "a"}, {"text": "b"}]',
            r"array.json holds one JSON array.*`jq -c '.\[\]' array.json > arr",
        ),
        ('\n[\n {"text": "a"}\n]\n', "holds one JSON array"),
        ("{\n" + '"text": "a"\n}', "line 1 of .* is not JSON"),
        ('{"text": "a"}\n{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n", "line 2 of .* is nested too deep"),
        ('{"text": "a"}\n{"text": ' + "1" * 5000 + "}\n", "line 2 of .* is not JSON: .*4300 digits"),
        ('{"text": "a"}\n"text"\n', "line 2 of .* has no 'text'; it has str"),
        ('{"text": "a"}\n{"text": "cut', "line 2 of .* is not JSON: Unterminated string"),
    ],
    ids=["array", "printed array", "printed object", "deep", "digits", "string", "cut"],
)
def test_json_of_another_shape(kind: Any, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        list(kind(str(tmp_path / "array.json")).documents())


def test_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("id,text\n0,one\n")
    with pytest.raises(ConfigurationError, match=r"table.csv is a table, of which one column is the text"):
        TextFile(str(tmp_path / "table.csv")).check()


@pytest.mark.parametrize("kind", [TextFile, LocalShards])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 300, r"path: x{100}\.\.\. cannot be used: File name too long"),
        ("/".join(["folder"] * 1000), "cannot be used: File name too long"),
        ("~nobody_of_this_name/x.txt", "cannot be used: Could not determine home directory"),
        ("", "expected a file or a folder, got ''"),
        (None, "expected a file or a folder, got None"),
        ("nul\0byte", "path: there is no file"),
    ],
)
def test_names_that_cannot_be(kind: Any, path: str, message: str) -> None:
    source = kind(path)
    for call in (source.check, source.identity):
        with pytest.raises(ConfigurationError, match=message):
            call()


def test_a_dataset_whose_name_is_too_long() -> None:
    with pytest.raises(ConfigurationError, match="cannot be used: File name too long"):
        HuggingFaceDataset("x" * 300).identity()
