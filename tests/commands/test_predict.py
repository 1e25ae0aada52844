"""Text from prompts: every kind of model, every way to give a prompt, every wrong option."""

import io
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_gsq.cli import main
from lightning_gsq.commands.predict import encode, predict
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import ExportOptions, open_run
from lightning_gsq.export.formats.native import NativeFormat
from lightning_gsq.models.loading import load_tokenizer, resolve
from tests.support.odd import BOS, larger_tokenizer, starting_tokenizer
from tests.support.tiny import byte_tokenizer, save_tiny_model


def _greedy(model: Path, prompt: str) -> str:
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_tokenizer(resolve(str(model)))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_several_prompts_are_streamed(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = predict(str(tiny_llama), ["Line 1", "Line 22"], max_new_tokens=6)
    assert texts == [_greedy(tiny_llama, "Line 1"), _greedy(tiny_llama, "Line 22")]
    output = capsys.readouterr().out
    assert "> Line 1" in output and "> Line 22" in output


def test_command_line_with_a_native_folder(
    llama_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "native"
    folder.mkdir()
    NativeFormat().write(open_run(llama_run), folder, ExportOptions())
    arguments = ["--prompt", "Line 1", "--prompt", "Line 2", "--max_new_tokens", "4", "--dtype", "float32"]
    assert main(["predict", "--model", str(folder), *arguments]) == 0
    assert capsys.readouterr().out.count("> Line") == 2


def test_prompts_from_a_file_and_from_standard_input(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("Line 1\n\n  Line 2 \n")
    expected = predict(str(tiny_llama), ["Line 1", "Line 2"], max_new_tokens=6)
    assert predict(str(tiny_llama), file=str(tmp_path / "prompts.txt"), max_new_tokens=6) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("Line 1\nLine 2\n"))
    assert predict(str(tiny_llama), max_new_tokens=6) == expected


def test_samples_repeat_with_the_seed(tiny_llama: Path) -> None:
    texts = [
        predict(str(tiny_llama), ["Line"], max_new_tokens=20, temperature=1.5, top_p=0.99, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_chat_template() -> None:
    tokenizer = byte_tokenizer()
    plain = encode(tokenizer, "Hi", chat_template=True)["input_ids"]
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert tokenizer.decode(encode(tokenizer, "Hi", chat_template=True)["input_ids"][0]) == "[Hi]"
    assert torch.equal(encode(tokenizer, "Hi", chat_template=False)["input_ids"], plain)


def test_prompts_start_as_texts_do() -> None:
    tokenizer = starting_tokenizer()
    assert (
        encode(tokenizer, "Hi", chat_template=False)["input_ids"].tolist()
        == tokenizer("Hi", return_tensors="pt")["input_ids"].tolist()
    )
    assert encode(tokenizer, "Hi", chat_template=False)["input_ids"][0, 0] == BOS


def test_a_template_that_refuses() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('A system message must come first') }}"
    message = "prompt: 'Hi': the chat template refuses it: A system message must come first; try --chat_template false"
    with pytest.raises(ConfigurationError, match=message):
        encode(tokenizer, "Hi", chat_template=True)


def test_ids_beyond_the_embedding(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    larger_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigurationError, match=r"prompt: it has the token 259 .* embedding has 258 rows"):
        predict(str(folder), ["<tool>x</tool>"])
    assert predict(str(folder), ["Line 1"], max_new_tokens=1)


def test_half_surrogate_pairs(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a shell hands over where an argument is not UTF-8."""
    predict(str(tiny_llama), ["Gr\udcfc\udcdfe"], max_new_tokens=1)
    assert "> Gr\ufffd\ufffde" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "prompt: the standard input holds none; give one with --prompt or --file"),
        (b"\n \n", "prompt: the standard input holds none"),
        ("Größe".encode("latin-1"), "prompt: the standard input is not utf-8 text"),
    ],
)
def test_bad_standard_input(content: bytes, message: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    with pytest.raises(ConfigurationError, match=message):
        predict(str(tiny_llama))


def test_prompts_in_another_encoding(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("Line 1\n".encode("utf-16"))
    with pytest.raises(ConfigurationError, match=r"file: cannot read .*prompts.txt: it is UTF-16 text"):
        predict(str(tiny_llama), file=str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top_p": 0.0}, "top_p must lie between 0 and 1"),
        ({"device": "nonsense"}, "device: 'nonsense' cannot be used"),
        ({"file": "x.txt"}, "prompt, file: give one of them"),
        ({"prompt": None, "file": "/no/such/file"}, "file: cannot read /no/such/file"),
        ({"max_new_tokens": 1000}, "exceed the model's limit of 128"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input(tiny_llama: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        predict(str(tiny_llama), **{"prompt": ["Line"], **options})  # type: ignore[arg-type]


def test_a_prompt_is_no_markup(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict(str(tiny_llama), ["[red]x[/red]"], max_new_tokens=2)
    assert "> [red]x[/red]" in capsys.readouterr().out
