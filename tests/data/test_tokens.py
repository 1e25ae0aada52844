"""Tokens in a file: read once, continued after an interrupt or a failure, refused when damaged."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_gsq.data import CalibrationDataModule, LocalShards, Mixture, PythonDocumentation, TextFile, TextSource
from lightning_gsq.data import tokens as tokens_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_gsq.errors import ConfigurationError
from tests.support.tiny import FAMILIES, byte_tokenizer

MODEL = FAMILIES["llama"]()
TOKENIZER = byte_tokenizer()


class Failing(TextSource):
    """Yields another source's documents; raises the planned error before the document of that number, once each."""

    def __init__(self, source: TextSource, failures: dict[int, list[Exception]]) -> None:
        self.source, self.failures, self.read = source, failures, 0

    def documents(self) -> Iterator[str]:
        for number, document in enumerate(self.source.documents()):
            if self.failures.get(number):
                raise self.failures[number].pop(0)
            self.read += 1
            assert isinstance(document, str)
            yield document

    def identity(self) -> dict[str, object] | None:
        return self.source.identity()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """JSON lines of 300 documents."""
    lines = [json.dumps({"text": f"Document {i}: " + "x" * (i % 17)}) for i in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path / "text.jsonl"


def _data(source: TextSource, folder: Path | None = None, **options: object) -> CalibrationDataModule:
    settings = {"sequence_length": 16, "num_sequences": 20, "num_validation_sequences": 4, "retry_pause": 0, **options}
    return CalibrationDataModule(source, cache_folder=None if folder is None else str(folder), **settings)  # type: ignore


def _ids(data: CalibrationDataModule) -> torch.Tensor:
    data.tokenize(TOKENIZER, MODEL)
    return torch.cat([data.train_ids_NT, data.validation_ids_NT])


def test_windows_as_without_a_file(shards: Path, tmp_path: Path) -> None:
    """The cut that runs have always made: all documents up to the goal, joined, in whole windows."""
    texts = [str(d) + "\n\n" for d in TextFile(str(shards)).documents()]
    joined: list[int] = []
    for text in texts:
        joined += TOKENIZER(text, add_special_tokens=False).input_ids
        if len(joined) >= 4 * 24 * 16:
            break
    windows = torch.tensor(joined[: len(joined) // 16 * 16]).view(-1, 16)
    for folder in (None, tmp_path / "cache"):
        ids = _ids(_data(TextFile(str(shards)), folder))
        assert ids.dtype == torch.int64
        assert {tuple(row) for row in ids.tolist()} <= {tuple(row) for row in windows.tolist()}


def test_known_windows() -> None:
    """Pinned: the choice of windows is part of every recipe."""
    data = _data(Fixed(), num_sequences=2, num_validation_sequences=1, sequence_length=4)
    assert TOKENIZER.batch_decode(_ids(data)) == KNOWN


class Fixed(TextSource):
    """Thirty short documents."""

    def documents(self) -> Iterator[str]:
        yield from (f"document {i}" for i in range(30))


KNOWN = ["ment", "docu", " 2\n\n"]


def test_a_file_is_read_instead_of_the_source(shards: Path, tmp_path: Path) -> None:
    first = _ids(_data(LocalShards(str(shards)), tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    content = shards.read_bytes()
    source = LocalShards(str(shards))
    data = _data(source, tmp_path / "cache")

    def fail(*_: object) -> None:
        raise AssertionError("the tokens are there")

    source.reader = fail  # type: ignore[method-assign, assignment]
    source.check = fail  # type: ignore[method-assign]
    data.check(None)
    assert torch.equal(_ids(data), first)
    assert shards.read_bytes() == content and file.exists()


@pytest.mark.parametrize("change", ["text", "column", "tokenizer", "template", "shuffle"])
def test_what_a_file_is_named_after(shards: Path, tmp_path: Path, change: str) -> None:
    _ids(_data(LocalShards(str(shards)), tmp_path / "cache"))
    source, tokenizer, options = LocalShards(str(shards)), byte_tokenizer(), {}
    tokenizer.chat_template = None
    if change == "text":
        shards.write_text(shards.read_text().replace("Document 7", "Document 8"))
        source = LocalShards(str(shards))
    elif change == "column":
        shards.write_text(shards.read_text().replace('"text"', '"body"'))
        source = LocalShards(str(shards), column="body")
    elif change == "shuffle":
        source = LocalShards(str(shards), shuffle_buffer=10)
    else:
        tokenizer.chat_template = "{{ messages[0].content }}."
        options = {"chat_template": change == "template"}
    _data(source, tmp_path / "cache", **options).tokenize(tokenizer, MODEL)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_file_serves_more_and_fewer_sequences(shards: Path, tmp_path: Path) -> None:
    sizes = (8, 40, 3, 20)
    fresh = [_ids(_data(LocalShards(str(shards)), num_sequences=size)) for size in sizes]
    for size, expected in zip(sizes, fresh, strict=True):
        assert torch.equal(_ids(_data(LocalShards(str(shards)), tmp_path / "cache", num_sequences=size)), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _mixture(shards: Path) -> Mixture:
    sources = [LocalShards(str(shards), shuffle_buffer=16), PythonDocumentation("evaluation")]
    return Mixture(sources, weights=[20, 1])


def test_interrupted_in_the_middle(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C, by a kill (the file as the last save left it), and through ``state_dict``."""
    whole = _ids(_data(_mixture(shards), num_sequences=60))
    data = _data(_mixture(shards), tmp_path / "cache", num_sequences=60)
    real, calls = data._text, []

    def interrupt(*arguments: object) -> str:
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    data._text = interrupt  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        data.tokenize(TOKENIZER, MODEL)
    (file,) = (tmp_path / "cache").iterdir()
    assert len(load_file(file)["ends"]) == 5
    state = data.state_dict()
    assert len(state["ends"]) == 5 and json.dumps(state["position"])
    again = _data(_mixture(shards), num_sequences=60)
    again.load_state_dict(state)
    assert again.state_dict() is state
    assert torch.equal(_ids(again), whole)
    assert torch.equal(_ids(_data(_mixture(shards), tmp_path / "cache", num_sequences=60)), whole)
    other = _data(PythonDocumentation())
    other.load_state_dict(state)
    with pytest.raises(ConfigurationError, match="another text source or tokenizer"):
        other.tokenize(TOKENIZER, MODEL)


def test_saved_while_reading(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "SAVE_EVERY_SECONDS", 0.0)
    written = []
    real = tokens_module.write_atomically
    monkeypatch.setattr(tokens_module, "write_atomically", lambda *a: (written.append(a[0]), real(*a)))
    _ids(_data(TextFile(str(shards)), tmp_path / "cache"))
    assert len(written) > 50


def test_a_failure_that_passes(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Failing(TextFile(str(shards)), {5: [ConnectionError("reset")] * 3, 60: [TimeoutError("slow")]})
    assert torch.equal(_ids(_data(source)), _ids(_data(TextFile(str(shards)))))
    assert "ConnectionError: reset" in caplog.text and "attempt 3 of 5" in caplog.text


def test_a_failure_that_stays_loses_nothing(shards: Path, tmp_path: Path) -> None:
    failing = Failing(TextFile(str(shards)), {40: [OSError("no route")] * 3})
    message = (
        r"failed 3 times in a row .* OSError: no route. The [\d,]+ tokens of .*; the same command goes on from there"
    )
    with pytest.raises(ConfigurationError, match=message):
        _data(failing, tmp_path / "cache", retries=2).tokenize(TOKENIZER, MODEL)
    expected = _ids(_data(TextFile(str(shards))))
    assert torch.equal(_ids(_data(failing, tmp_path / "cache")), expected)


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("a bug")])
def test_a_failure_that_cannot_pass_is_not_retried(shards: Path, error: Exception) -> None:
    source = Failing(TextFile(str(shards)), {3: [error]})
    with pytest.raises(ConfigurationError if isinstance(error, OSError) else ValueError, match=str(error)):
        _data(source).tokenize(TOKENIZER, MODEL)
    assert source.read == 3


def test_more_attempts_than_a_float_can_double(shards: Path) -> None:
    source = Failing(TextFile(str(shards)), {3: [ConnectionError("reset")] * 1100})
    assert torch.equal(_ids(_data(source, retries=1100)), _ids(_data(TextFile(str(shards)))))


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch, shards: Path) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("lightning_gsq.data.retrying.time.sleep", pauses.append)
    source = Failing(TextFile(str(shards)), {3: [ConnectionError("reset")] * 9})
    with pytest.raises(ConfigurationError, match="failed 9 times"):
        _data(source, retries=8, retry_pause=1).tokenize(TOKENIZER, MODEL)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def _rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what a token file says beside its tensors."""
    with safe_open(file, "pt") as content:
        state = json.loads(content.metadata()["state"])
    change(state)
    save_file(load_file(file), file, {"state": json.dumps(state)})


@pytest.mark.parametrize(
    ("name", "value"),
    [("position", {"documents": 3}), ("position", None), ("exhausted", True), ("characters", 7), ("format", 3)],
)
def test_a_file_that_says_something_else_is_refused(shards: Path, tmp_path: Path, name: str, value: object) -> None:
    """A changed position would lose text or read it twice."""
    _ids(_data(TextFile(str(shards)), tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    _rewrite(file, lambda state: state.update({name: value}))
    with pytest.raises(ConfigurationError, match=r"its checksum does not fit. Delete the file"):
        _ids(_data(TextFile(str(shards)), tmp_path / "cache"))


@pytest.mark.parametrize("ended", [False, True])
def test_files_of_the_first_format(shards: Path, tmp_path: Path, ended: bool) -> None:
    """They serve, except where they say that the text ended: it may have been a null."""
    few, many = {"num_sequences": 8}, {"num_sequences": 40}
    _ids(_data(TextFile(str(shards)), tmp_path / "cache", **few))
    (file,) = (tmp_path / "cache").iterdir()

    def older(state: dict[str, Any]) -> None:
        del state["format"], state["characters"]
        state["exhausted"] = ended
        state["digest"] = tokens_module._digest({**load_file(file)})

    _rewrite(file, older)
    source = TextFile(str(shards))
    expected = _ids(_data(source, **many))
    assert torch.equal(_ids(_data(source, tmp_path / "cache", **many)), expected)


def test_mutated_files(shards: Path, tmp_path: Path) -> None:
    """No byte of a token file can be changed so that other tokens are used, or anything but one line is said."""
    source = TextFile(str(shards))
    expected = _ids(_data(source, tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    content, chance, refused = file.read_bytes(), random.Random(0), 0
    header = 8 + int.from_bytes(content[:8], "little")
    for number in range(200):
        changed = bytearray(content)
        for _ in range(chance.choice([1, 1, 5])):
            changed[chance.randrange(header if number % 2 else len(changed))] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        try:
            assert torch.equal(_ids(_data(source, tmp_path / "cache")), expected)
        except ConfigurationError as error:
            assert "Delete the file" in str(error)
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("damage", ["cut", "token", "ends", "digest"])
def test_damaged_files_are_refused(shards: Path, tmp_path: Path, damage: str) -> None:
    _ids(_data(TextFile(str(shards)), tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        tensors = load_file(file)
        with safe_open(file, "pt") as content:
            metadata = content.metadata()
        if damage == "ends":
            tensors["ends"][3] = 0
        else:
            tensors["tokens"][3] = 100_000 if damage == "token" else 65
        if damage != "digest":
            state = json.loads(metadata["state"])
            del state["digest"]
            state["digest"] = tokens_module._digest({**state, **tensors})
            metadata = {"state": json.dumps(state)}
        save_file(tensors, file, metadata)
    with pytest.raises(ConfigurationError, match=r"cannot be used: .* Delete the file"):
        _ids(_data(TextFile(str(shards)), tmp_path / "cache"))


def test_a_state_that_contradicts_itself(shards: Path) -> None:
    data = _data(TextFile(str(shards)))
    _ids(data)
    state = data.state_dict()
    for change in ({"position": 5}, {"characters": -1}, {"ends": -state["ends"]}, {"tokens": state["tokens"].long()}):
        again = _data(TextFile(str(shards)))
        again.load_state_dict({**state, **change})
        with pytest.raises(ConfigurationError, match="data: the state to go on from cannot be used"):
            _ids(again)


def test_a_source_of_unknown_identity_leaves_no_file(tmp_path: Path) -> None:
    _ids(_data(Fixed(), tmp_path / "cache", sequence_length=4))
    assert not (tmp_path / "cache").exists()


def test_numbers_out_of_range() -> None:
    for name, value in (("retries", -1), ("retry_pause", -1), ("retry_pause", float("nan"))):
        with pytest.raises(ConfigurationError, match=f"data.{name} must not be negative, got {value}"):
            _data(PythonDocumentation(), **{name: value})
