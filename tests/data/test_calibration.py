"""Windows of calibration and evaluation text, and the activation store."""

import math
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning_gsq.data import CalibrationDataModule, Mixture, ModelSamples, PerplexityData, TextFile

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.hidden_states import ActivationDataset, ActivationOptions, ActivationStore
from tests.support.odd import FromTheModel, Listed
from tests.support.tiny import FAMILIES, byte_tokenizer


def _data(corpus: Path, **options: object) -> CalibrationDataModule:
    settings = {"sequence_length": 32, "num_sequences": 10, "num_validation_sequences": 3, **options}
    return CalibrationDataModule(TextFile(str(corpus)), **settings)  # type: ignore[arg-type]


def test_training_and_validation_do_not_overlap(corpus: Path) -> None:
    data = _data(corpus)
    data.tokenize(byte_tokenizer(), FAMILIES["llama"]())
    assert data.train_ids_NT.shape == (10, 32)
    assert data.validation_ids_NT.shape == (3, 32)
    windows = {tuple(w.tolist()) for w in torch.cat([data.train_ids_NT, data.validation_ids_NT])}
    assert len(windows) == 13
    (batch,) = next(iter(data.train_dataloader()))
    assert batch.shape == (2, 32)


def test_spare_sequences_come_beside_the_others_and_then_behind_them(corpus: Path) -> None:
    def tokenized(spare: int) -> CalibrationDataModule:
        data = _data(corpus, num_sequences=3, num_validation_sequences=1)
        data.num_spare_sequences = spare
        data.tokenize(byte_tokenizer(), FAMILIES["llama"]())
        return data

    none, few, many = tokenized(0), tokenized(5), tokenized(40)
    assert [len(data.spare_ids_NT) for data in (none, few, many)] == [0, 5, 40]
    assert torch.equal(many.spare_ids_NT[:5], few.spare_ids_NT)
    for data in (few, many):
        assert torch.equal(data.train_ids_NT, none.train_ids_NT)
        assert torch.equal(data.validation_ids_NT, none.validation_ids_NT)
    everything = torch.cat([many.train_ids_NT, many.validation_ids_NT, many.spare_ids_NT])
    assert len({tuple(window.tolist()) for window in everything}) == 44
    assert len(tokenized(10**6).spare_ids_NT) < 10**6  # as many as the text has


def test_seed_chooses_the_sequences(corpus: Path) -> None:
    ids = []
    for seed in (1, 1, 2):
        data = _data(corpus, seed=seed)
        data.tokenize(byte_tokenizer(), FAMILIES["llama"]())
        ids.append(data.train_ids_NT)
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])


@pytest.mark.parametrize("mixed", [False, True])
def test_samples_of_the_model_are_kept_per_run(
    mixed: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = FAMILIES["llama"]()

    def tokenized(run: str, seed: int = 0) -> torch.Tensor:
        samples = ModelSamples(num_tokens=800, length=100, seed=seed)
        source = Mixture([samples, TextFile(str(corpus))]) if mixed else samples
        data = CalibrationDataModule(source, 16, 5, 2, cache_folder=str(tmp_path / "shared"))
        data.run_folder = tmp_path / run
        data.check(None)
        data.tokenize(byte_tokenizer(), network)
        return torch.cat([data.train_ids_NT, data.validation_ids_NT])

    first = tokenized("one")
    assert len(list((tmp_path / "one").iterdir())) == 1 and not (tmp_path / "shared").exists()
    assert not torch.equal(tokenized("one", seed=1), first), "other samples have another name"
    with monkeypatch.context() as patch:
        patch.setattr(ModelSamples, "attach", lambda *_: pytest.fail("the samples are there"))
        assert torch.equal(tokenized("one"), first)
        with pytest.raises(pytest.fail.Exception, match="the samples are there"):
            tokenized("two")


@pytest.mark.parametrize("mixed", [False, True])
def test_a_source_of_ones_own_that_needs_the_model(mixed: bool, tmp_path: Path) -> None:
    own = FromTheModel()
    data = CalibrationDataModule(Mixture([Mixture([own])]) if mixed else own, 16, 5, 2)
    data.run_folder = tmp_path
    data.check(None)
    data.tokenize(byte_tokenizer(), FAMILIES["llama"]())
    assert own.attached == 258
    assert "258 rows, line" in "".join(byte_tokenizer().batch_decode(data.train_ids_NT))


def test_a_source_that_needs_the_model_and_does_not_take_it() -> None:
    source = Listed(["text"])
    source.needs_model = True
    with pytest.raises(ConfigurationError, match=r"Listed: needs_model is true, and there is no attach\(model, token"):
        CalibrationDataModule(source).tokenize(byte_tokenizer(), FAMILIES["llama"]())


@pytest.mark.parametrize("make", [CalibrationDataModule, PerplexityData, lambda source: Mixture([source])])
def test_what_is_no_source(make: Callable[[object], object]) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a TextSource, such as TextFile\('text.txt'\), got str"):
        make("text.txt")


def test_cache_folder_that_cannot_be(corpus: Path) -> None:
    for folder, message in ((corpus, "is no folder"), (corpus / "below", "is no folder"), ("x" * 300, "too long")):
        with pytest.raises(ConfigurationError, match=f"data.cache_folder: .*{message}"):
            _data(corpus, cache_folder=str(folder)).check(None)
    data = _data(corpus)
    data.run_folder = corpus / "below"
    with pytest.raises(ConfigurationError, match=r"data.cache_folder: cannot make the folder .*corpus.txt/below"):
        data.tokenize(byte_tokenizer(), FAMILIES["llama"]())


def test_too_little_text_says_how_much_there_is(corpus: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"take 3,200,096 tokens, the source has 4\d,\d{3} \(\d+ sequences\)"):
        _data(corpus, num_sequences=100_000).tokenize(byte_tokenizer(), FAMILIES["llama"]())


def test_sequence_beyond_the_models_limit(corpus: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"sequence_length: 32 tokens exceed the model's limit of 16"):
        _data(corpus).check(16)


@pytest.mark.parametrize("name", ["sequence_length", "num_sequences", "num_validation_sequences", "batch_size"])
def test_numbers_out_of_range(corpus: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"data.{name} must be at least 1, got 0"):
        _data(corpus, **{name: 0})


def test_numbers_that_are_none(corpus: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.sequence_length must be at least 1, got '512'"):
        _data(corpus, sequence_length="512")
    with pytest.raises(ConfigurationError, match=r"data\.num_sequences must be at least 1, got 1\.5"):
        _data(corpus, num_sequences=1.5)
    with pytest.raises(ConfigurationError, match=r"evaluation\.num_windows must be at least 1, or null .*, got 'x'"):
        PerplexityData(num_windows="x")  # type: ignore[arg-type]


def test_batches_before_there_are_any(corpus: Path) -> None:
    for batches in (_data(corpus).train_dataloader, _data(corpus).val_dataloader, PerplexityData().val_dataloader):
        with pytest.raises(ConfigurationError, match="call tokenize first"):
            batches()


def test_a_run_folder_whose_name_is_too_long(corpus: Path, tmp_path: Path) -> None:
    data = _data(corpus)
    data.run_folder = tmp_path / ("x" * 300) / "calibration"
    with pytest.raises(ConfigurationError, match=r"trainer.default_root_dir: .* cannot be read: File name too long"):
        data.check(None)


def test_chat_template(corpus: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigurationError, match="has no chat template"):
        _data(corpus, chat_template=True).tokenize(tokenizer, FAMILIES["llama"]())
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    data = _data(corpus, chat_template=True, num_sequences=1380)
    data.tokenize(tokenizer, FAMILIES["llama"]())
    assert any("[user] Line 0" in tokenizer.decode(w) for w in torch.cat([data.train_ids_NT, data.validation_ids_NT]))


def test_perplexity_windows(corpus: Path) -> None:
    data = PerplexityData(TextFile(str(corpus)), sequence_length=50, num_windows=4)
    data.tokenize(byte_tokenizer(), FAMILIES["llama"]())
    text = corpus.read_text()
    assert byte_tokenizer().decode(data.ids_NT.flatten()) == text[:200]
    with pytest.raises(ConfigurationError, match=r"9999 windows of 50 tokens were asked for"):
        PerplexityData(TextFile(str(corpus)), sequence_length=50, num_windows=9999).tokenize(
            byte_tokenizer(), FAMILIES["llama"]()
        )


def test_store_in_memory_and_in_files(tmp_path: Path) -> None:
    for limit, mapped in ((1.0, False), (0.0, True)):
        options = ActivationOptions(memory_limit_gb=limit, folder=str(tmp_path), dtype="bfloat16")
        store = ActivationStore((4, 3, 2), options, streams=2)
        first, second = store.new(), store.new()
        first.fill_(1.0)
        second.fill_(2.0)
        assert float(first.sum()) == math.prod(first.shape)
        assert first.dtype == torch.bfloat16
        assert any(tmp_path.iterdir()) == mapped
        store.close()
        assert not any(tmp_path.iterdir())


def test_store_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 10, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigurationError, match=r"activations.folder: .* need"):
        ActivationStore((4, 3, 2), ActivationOptions(memory_limit_gb=0, folder=str(tmp_path)), streams=2)


def test_dataset_fetches_batches_whole() -> None:
    inputs, targets = torch.arange(24.0).view(4, 3, 2), torch.arange(24.0).view(4, 3, 2) + 100
    ((x, y),) = ActivationDataset(inputs, targets).__getitems__([2, 0])
    assert torch.equal(x, inputs[[2, 0]])
    assert torch.equal(y, targets[[2, 0]])
