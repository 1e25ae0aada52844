"""The folder of the quantized model: what cannot be written is known before, what is there and whole stays."""

import errno
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.address import resolve
from lightning_gsq.models.saving import save_tokenizer
from lightning_gsq.run.saving import MARK, check_saving, save_model
from lightning_gsq.run.substitution import Substitution
from lightning_gsq.training import ModelQuantization


def test_settings_that_cannot_be_written_again(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    check_saving(model, tokenizer, tmp_path)
    model.generation_config.temperature = 0.5  # with do_sample false, which transformers reads and refuses to write
    model.generation_config.do_sample = False
    with pytest.raises(ConfigurationError, match=r"its generation_config.json can be read and not be written again"):
        check_saving(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_anew_if_it_is_not_what_it_should_be(tiny_llama: Path, tmp_path: Path) -> None:
    model, folder = ModelQuantization(str(tiny_llama), output_dtype="float32"), tmp_path / "model"
    model.load(resolve(str(tiny_llama)))

    def save(made_from: str) -> bool:
        return save_model(Substitution(model), folder, made_from, resolve(str(tiny_llama)))

    assert save("a") and not save("a") and save("b")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert save("b") and not save("b")
    (folder / MARK).unlink()
    with pytest.raises(ConfigurationError, match="was written by something else"):
        save("b")


def test_a_disk_that_fails_while_the_tokenizer_is_written(tmp_path: Path) -> None:
    """The library that writes it raises no OSError."""

    class Tokenizer:
        text = "No space left on device (os error 28)"

        def save_pretrained(self, _: Path) -> None:
            raise Exception(self.text)

    with pytest.raises(OSError, match="No space left") as caught:
        save_tokenizer(Tokenizer(), tmp_path)  # type: ignore[arg-type]
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    Tokenizer.text = "something else"
    with pytest.raises(Exception, match="something else"):
        save_tokenizer(Tokenizer(), tmp_path)  # type: ignore[arg-type]
