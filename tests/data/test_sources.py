"""Text sources, and the errors for text that cannot serve."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from lightning_gsq.data import HuggingFaceDataset, Mixture, ModelSamples, PythonDocumentation, TextFile

from lightning_gsq.errors import ConfigurationError
from tests.support.tiny import FAMILIES, byte_tokenizer


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert list(TextFile(str(tmp_path / "a.txt")).documents()) == ["one\n\ntwo\n"]


def test_rows_follow_the_layout_of_wikitext(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n Text .\n", encoding="utf-8")
    rows = list(TextFile(str(tmp_path / "wiki.test.raw"), rows=True).documents())
    assert rows == ["", " = Title = \n", "", " Text .\n"]


def test_folder_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "also"}\n')
    (tmp_path / "c.bin").write_bytes(b"\x00\xff")
    assert list(TextFile(str(tmp_path)).documents()) == ["first", "also", "second"]


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert list(TextFile(str(tmp_path / "chat.jsonl"), field="messages").documents()) == [messages]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "there is no file or folder"),
        ("empty.txt", b" \n", "is empty"),
        ("latin.txt", "déjà vu".encode("latin-1"), r"not UTF-8 text \(byte 1"),
        ("bad.jsonl", b"{nonsense\n", "line 1 of .* is not JSON"),
        ("other.jsonl", b'{"content": 1}\n', r"has no 'text'; it has \['content'\]"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        TextFile(str(tmp_path / name)).check()


def test_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no .txt, .md or .jsonl file"):
        TextFile(str(tmp_path)).check()


@pytest.mark.parametrize("streaming", [True, False])
def test_local_dataset(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_dict({"body": ["one", "two"]}).to_parquet(tmp_path / "train.parquet")
    source = HuggingFaceDataset(str(tmp_path), column="body", streaming=streaming)
    assert list(source.documents()) == ["one", "two"]


def test_dataset_errors(tmp_path: Path) -> None:
    Dataset.from_dict({"body": ["one"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ConfigurationError, match=r"no column 'text'; it has \['body'\]"):
        HuggingFaceDataset(str(tmp_path)).check()
    with pytest.raises(ConfigurationError, match="cannot read the dataset"):
        HuggingFaceDataset(str(tmp_path), split="nonsense", column="body").check()
    with pytest.raises(ConfigurationError, match="cannot read the dataset"):
        HuggingFaceDataset(str(tmp_path / "nowhere")).check()


def test_documentation_parts_do_not_overlap() -> None:
    parts = {part: set(PythonDocumentation(part).documents()) for part in ("calibration", "evaluation", "all")}
    assert not parts["calibration"] & parts["evaluation"]
    assert sum(map(len, parts["evaluation"])) > 20_000
    assert sum(map(len, parts["calibration"])) > 300_000
    with pytest.raises(ConfigurationError, match="part must be"):
        PythonDocumentation("test")


def test_mixture_alternates(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n{"text": "a2"}\n{"text": "a3"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b1"}\n')
    mixture = Mixture([TextFile(str(tmp_path / "a.jsonl")), TextFile(str(tmp_path / "b.jsonl"))])
    assert list(mixture.documents()) == ["a1", "b1", "a2", "a3"]
    with pytest.raises(ConfigurationError, match="at least one source"):
        Mixture([])


def test_model_samples_repeat_with_their_seed() -> None:
    model, tokenizer = FAMILIES["llama"](), byte_tokenizer()
    texts = []
    for seed in (1, 1, 2):
        source = ModelSamples(num_tokens=96, length=32, batch_size=2, seed=seed)
        source.attach(model, tokenizer)
        texts.append(list(source.documents()))
    assert len(texts[0]) == 3
    assert texts[0] == texts[1] != texts[2]


def test_model_samples_out_of_range() -> None:
    for name in ("num_tokens", "length", "batch_size"):
        with pytest.raises(ConfigurationError, match=f"ModelSamples: {name} must be at least 1, got -1"):
            ModelSamples(**{name: -1})
    for name, value in (("temperature", 0.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5)):
        with pytest.raises(ConfigurationError, match=f"ModelSamples: {name} must .*, got {value}"):
            ModelSamples(**{name: value})  # type: ignore[arg-type]


def test_model_samples_that_the_model_cannot_write() -> None:
    model, tokenizer = FAMILIES["llama"](), byte_tokenizer()
    with pytest.raises(ConfigurationError, match=r"call attach\(model, tokenizer\) first"):
        list(ModelSamples().documents())
    with pytest.raises(ConfigurationError, match="the start token and 128 more exceed the model's limit of 128"):
        ModelSamples(length=128).attach(model, tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<another>"})
    with pytest.raises(ConfigurationError, match=r"ModelSamples: the start has the token 258 \('<another>'\)"):
        ModelSamples(length=8).attach(model, tokenizer)
