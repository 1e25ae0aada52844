"""From text to ids and windows: ids the model has no row for, templates and tokenizers that fail, BOS, long texts."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_gsq.data import CalibrationDataModule, PerplexityData, TextFile
from lightning_gsq.data import encoding as encoding_module
from lightning_gsq.data.encoding import cut_windows, next_cut, num_tokens, start_token
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_gsq.errors import ConfigurationError
from tests.support.odd import BOS, STRICT, Listed, larger_tokenizer, starting_tokenizer
from tests.support.tiny import FAMILIES, byte_tokenizer

MODEL = FAMILIES["llama"]()


def _calibration(source: Any, **options: Any) -> CalibrationDataModule:
    return CalibrationDataModule(source, **{"sequence_length": 8, "num_sequences": 4, **options})


def _ids(data: CalibrationDataModule, tokenizer: Any, model: Any = MODEL) -> torch.Tensor:
    data.tokenize(tokenizer, model)
    return torch.cat([data.train_ids_NT, data.validation_ids_NT])


TOOLS = ["ordinary words follow here", "<tool>call</tool> ordinary words"] * 20


@pytest.mark.parametrize("make", [_calibration, lambda source: PerplexityData(source, 8, 4)])
def test_ids_beyond_the_embedding(make: Any) -> None:
    data = make(Listed(TOOLS))
    message = r"has the token 25[89] \('</?tool>'\), and the model's embedding has 258 rows: tokenizer and model do not"
    with pytest.raises(ConfigurationError, match=message):
        data.tokenize(larger_tokenizer(), MODEL)
    make(Listed(TOOLS[::2])).tokenize(larger_tokenizer(), MODEL)
    wide = FAMILIES["llama"]()
    wide.resize_token_embeddings(300)
    make(Listed(TOOLS)).tokenize(larger_tokenizer(), wide)


def test_ids_beyond_the_embedding_name_their_document() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.source: document 2 of Listed has the token 259"):
        _ids(_calibration(Listed(TOOLS)), larger_tokenizer())


def test_ids_beyond_the_embedding_in_a_file(corpus: Path, tmp_path: Path) -> None:
    """A file serves every model of its tokenizer, those with too few rows get no text of it."""
    (tmp_path / "tools.txt").write_text("\n".join(TOOLS))
    wide = FAMILIES["llama"]()
    wide.resize_token_embeddings(300)
    options = {"cache_folder": str(tmp_path / "cache")}
    _ids(_calibration(TextFile(str(tmp_path / "tools.txt")), **options), larger_tokenizer(), wide)
    with pytest.raises(ConfigurationError, match=r"data\.source: the text has the token 259"):
        _ids(_calibration(TextFile(str(tmp_path / "tools.txt")), **options), larger_tokenizer())


def test_ids_beyond_the_embedding_from_a_template() -> None:
    tokenizer = larger_tokenizer()
    tokenizer.chat_template = "<tool>{{ messages[0].content }}"
    plain = Listed(TOOLS[::2])
    _ids(_calibration(plain), tokenizer)
    with pytest.raises(ConfigurationError, match=r"document 1 of Listed has the token 258 \('<tool>'\)"):
        _ids(_calibration(plain, chat_template=True), tokenizer)


def _chat(file: Path, *conversations: list[dict[str, str]]) -> TextFile:
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return TextFile(str(file), field="messages")


USER = [{"role": "user", "content": "What is 3 squared?"}, {"role": "assistant", "content": "It is 9."}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]


@pytest.mark.parametrize(
    ("template", "third", "message"),
    [
        (STRICT, SYSTEM, "the chat template refuses it: System role not supported; leave such conversations out"),
        (STRICT, USER[::-1], "refuses it: Roles must alternate"),
        ("{{ messages[2].content }}", USER, "refuses it: list object has no element 2"),
        ("{{ messages[0].content + 1 }}", USER, "refuses it: TypeError: can only concatenate str"),
        ("{{ messages[0].content / 0 }}", USER, "refuses it: TypeError"),
        ("{{ 1 / 0 }}", USER, "refuses it: ZeroDivisionError: division by zero"),
        ("{% if %}", USER, "refuses it: Expected an expression"),
        ({"a": "x", "b": "y"}, USER, "refuses it: .*no default"),
    ],
)
def test_templates_that_refuse(template: Any, third: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    source = _chat(tmp_path / "chat.jsonl", USER, USER, third)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    line = 3 if template == STRICT else 1
    with pytest.raises(ConfigurationError, match=rf"data.chat_template: line {line} of .*chat.jsonl: .*{message}"):
        _ids(_calibration(source, num_sequences=99), tokenizer)


def test_documents_before_a_refused_one_are_kept(tmp_path: Path) -> None:
    source = _chat(tmp_path / "chat.jsonl", USER, USER, SYSTEM, USER)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = STRICT
    data = _calibration(source, num_sequences=99, cache_folder=str(tmp_path / "cache"))
    with pytest.raises(ConfigurationError) as caught:
        _ids(data, tokenizer)
    assert "goes on" not in str(caught.value), "the same command fails at the same line"
    assert len(data.state_dict()["ends"]) == 2 and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_conversation_without_a_template(tmp_path: Path) -> None:
    source = _chat(tmp_path / "chat.jsonl", USER)
    with pytest.raises(ConfigurationError, match=r"no chat template; use plain text \(line 1 of .*chat.jsonl\)"):
        _ids(_calibration(source), byte_tokenizer())
    with pytest.raises(ConfigurationError, match=r"plain text, got conversations \(line 1 of .*chat.jsonl\)"):
        PerplexityData(source, 8).tokenize(byte_tokenizer(), MODEL)


@pytest.mark.parametrize("make", [_calibration, lambda source: PerplexityData(source, 8, 4)])
def test_a_tokenizer_that_fails(make: Any) -> None:
    """Words that it does not know, and no token for them: the library raises plain ``Exception``."""
    words = Tokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ConfigurationError, match=r"bos: the tokenizer fails with Exception: WordLevel error.*; set it"):
        make(Listed(["known unknown"])).tokenize(tokenizer, MODEL)
    data = make(Listed(["known unknown"]))
    data.bos = False
    with pytest.raises(ConfigurationError, match=r"source.*: the tokenizer fails with Exception: WordLevel error"):
        data.tokenize(tokenizer, MODEL)


def test_half_surrogate_pairs_are_read() -> None:
    ids = _ids(_calibration(Listed(["a\ud83d " * 50])), byte_tokenizer())
    assert "a\ufffd a\ufffd" in "".join(byte_tokenizer().batch_decode(ids))


def test_start_token() -> None:
    plain, starting = byte_tokenizer(), starting_tokenizer()
    assert [start_token(plain, choice, "x") for choice in ("auto", True, False)] == [None, BOS, None]
    assert [start_token(starting, choice, "x") for choice in ("auto", True, False)] == [BOS, BOS, None]
    plain.bos_token = None
    assert start_token(plain, "auto", "x") is None
    with pytest.raises(ConfigurationError, match=r"data\.bos: the tokenizer has no BOS token; set it to auto or false"):
        start_token(plain, True, "data.bos")


def test_windows_with_a_start_token() -> None:
    ids = torch.arange(10)
    assert cut_windows(ids, 4, None).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(ids, 4, 99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert cut_windows(torch.tensor([99, 1, 2, 3, 4, 99, 6]), 4, 99).tolist() == [[99, 1, 2, 3], [99, 3, 4, 99]]
    assert cut_windows(ids[:3], 4, 99).shape == (0, 4)
    for start in (None, 99):
        for windows in (1, 2, 7):
            needed = num_tokens(windows, 4, start)
            assert len(cut_windows(torch.arange(needed), 4, start)) == windows
            assert len(cut_windows(torch.arange(needed - 1), 4, start)) == windows - 1


@pytest.mark.parametrize("bos", ["auto", True, False])
def test_every_window_starts_as_texts_do(bos: Any, corpus: Path) -> None:
    tokenizer, text = starting_tokenizer(), corpus.read_text()
    evaluation = PerplexityData(TextFile(str(corpus)), 50, 4, bos=bos)
    evaluation.tokenize(tokenizer, MODEL)
    ids = _ids(_calibration(TextFile(str(corpus)), bos=bos), tokenizer)
    assert evaluation.ids_NT.shape == (4, 50) and ids.shape == (20, 8)
    if bos is False:
        assert evaluation.start is None and tokenizer.decode(evaluation.ids_NT.flatten()) == text[:200]
        assert not (ids == BOS).any()
        return
    assert evaluation.start == BOS and tokenizer.decode(evaluation.ids_NT[:, 1:].flatten()) == text[: 4 * 49]
    assert (evaluation.ids_NT[:, 0] == BOS).all() and (ids[:, 0] == BOS).all() and not (ids[:, 1:] == BOS).any()


def test_a_file_of_tokens_serves_both(corpus: Path, tmp_path: Path) -> None:
    """It holds the text, not its windows."""
    options = {"cache_folder": str(tmp_path)}
    tokenizer = starting_tokenizer()
    for bos in ("auto", False, True):
        source = TextFile(str(corpus))
        fresh = _ids(_calibration(source, bos=bos), tokenizer)
        assert torch.equal(_ids(_calibration(source, bos=bos, **options), tokenizer), fresh)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", [CalibrationDataModule, PerplexityData])
def test_bad_choice_of_a_start_token(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"(data|evaluation).bos must be auto, true or false, got 'yes'"):
        kind(bos="yes")


def test_cuts_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "SEARCH", 10)
    text = "one two three\nfour five six seven eight nine"
    cuts = [0]
    while cuts[-1] < len(text):
        cuts.append(next_cut(text, cuts[-1], 20))
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    assert pieces == ["one two three\n", "four five six seven", " eight nine"]
    assert next_cut("x" * 100, 10, 20) == 30, "nowhere to cut"
    assert next_cut("", 0) == 0


def test_only_as_much_of_a_long_text_as_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line of 80,000 characters, of which 1,300 tokens are asked for; then more, from the file."""
    (tmp_path / "line.txt").write_text(" ".join(f"word{i}" for i in range(9000)))
    seen: list[int] = []
    real = encoding_module.encode
    monkeypatch.setattr("lightning_gsq.data.calibration.encode", lambda *a: (seen.append(len(a[1])), real(*a))[1])
    monkeypatch.setattr(encoding_module, "PIECE", 1000)
    source, few = TextFile(str(tmp_path / "line.txt")), {"num_sequences": 24, "sequence_length": 16}
    many = {**few, "num_sequences": 200}
    fresh_few, fresh_many = (_ids(_calibration(source, **options), byte_tokenizer()) for options in (few, many))
    seen.clear()
    data = _calibration(source, **few, cache_folder=str(tmp_path / "cache"))
    assert torch.equal(_ids(data, byte_tokenizer()), fresh_few)
    assert sum(seen) < 4 * 40 * 16 + 1000, "read ahead, and a piece"
    state = data.state_dict()
    text = (tmp_path / "line.txt").read_text()
    assert byte_tokenizer().decode(state["tokens"]) == text[: state["characters"]]
    seen.clear()
    more = _calibration(source, **many, cache_folder=str(tmp_path / "cache"))
    assert torch.equal(_ids(more, byte_tokenizer()), fresh_many)
    assert sum(seen) < 4 * 216 * 16 + 1000 - state["characters"], "not from the beginning"
    going_on = _calibration(source, **many)
    going_on.load_state_dict(state)
    assert torch.equal(_ids(going_on, byte_tokenizer()), fresh_many)
    everything = _calibration(source, **{**few, "num_sequences": 4000})
    _ids(everything, byte_tokenizer())
    state = everything.state_dict()
    assert byte_tokenizer().decode(state["tokens"]) == text + "\n\n" and state["characters"] == 0 and state["exhausted"]


@pytest.mark.parametrize("start", [None, BOS])
def test_perplexity_reads_no_more_than_its_windows(start: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"Document {i}: " + "blah " * (i % 7) for i in range(20_000)]
    tokenizer = byte_tokenizer() if start is None else starting_tokenizer()
    given: list[str] = []

    class Watched(Listed):
        def documents(self) -> Any:
            return ((given.append(d), d)[1] for d in self.items)

    data = PerplexityData(Watched(documents), 64, 5)
    data.tokenize(tokenizer, MODEL)
    assert len(given) < 400
    text = "\n\n".join(documents)
    assert tokenizer.decode(data.ids_NT[:, int(start is not None) :].flatten()) == text[: 5 * (64 - bool(start))]
    whole = PerplexityData(Listed(documents), 64)
    whole.tokenize(tokenizer, MODEL)
    assert torch.equal(whole.ids_NT[:5], data.ids_NT)
    assert len(whole.ids_NT) == (len(text) // 64 if start is None else (len(text) - 1) // 63)
    one = PerplexityData(Listed([text]), 64, 5)
    one.tokenize(tokenizer, MODEL)
    assert torch.equal(one.ids_NT, data.ids_NT)
    with pytest.raises(ConfigurationError, match="99999 windows of 64 tokens were asked for, the text has"):
        PerplexityData(Listed(documents), 64, 99_999).tokenize(tokenizer, MODEL)
