"""What ``predict`` does: text from prompts, with any model that can be loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from lightning_gsq.commands.addresses import written_model
from lightning_gsq.data.documents import without_surrogates
from lightning_gsq.data.encoding import check_ids, template_errors, tokenizer_errors
from lightning_gsq.data.files import local_path, read_text
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.system.console import make_console


def predict(
    model: str,
    prompt: list[str] | None = None,
    file: str | None = None,
    chat_template: bool = True,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: loading.Dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> list[str]:
    """Writes text that continues or answers prompts, as it comes.

    Args:
        model: Run folder, exported folder, GGUF file, or any model that fit takes.
        prompt: Prompts; without any, and without a file, each line of the standard input is one.
        file: Text file, each line of which is a prompt.
        chat_template: Put each prompt into the tokenizer's chat template, if it has one.
        max_new_tokens: Length at which a text ends at the latest, in tokens.
        temperature: 0 for the most probable token each time, 1 for samples from the model's own distribution.
        top_p: Sample from the most probable tokens that together have this probability.
        seed: Seed of the samples.
        dtype: Dtype of the arithmetic; "auto" for that of the model's files.
        device: Where to run, such as cpu or cuda:1; by default the GPU if there is one.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with the model.
        console: Where the prompts are shown.

    Returns:
        The texts.

    Raises:
        ConfigurationError: the model cannot be loaded, an option is out of range, or a prompt is too long.
    """
    console = console or make_console()
    if max_new_tokens < 1:
        raise ConfigurationError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ConfigurationError(f"temperature must not be negative, got {temperature}")
    if not 0 < top_p <= 1:
        raise ConfigurationError(f"top_p must lie between 0 and 1, got {top_p}")
    if not 0 <= seed < 2**32:
        raise ConfigurationError(f"seed must be a number from 0 to {2**32 - 1}, got {seed}")
    place = device_of(device)
    prompts = _prompts(prompt, file)
    source = loading.resolve(written_model(model), revision, trust_remote_code)
    tokenizer = loading.load_tokenizer(source)
    network = loading.load_model(source, dtype, quantized=True)
    nn.Module.to(network, place)
    # The command's options decide alone, whatever the model's own generation config says of sampling.
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    texts = []
    for text in prompts:
        inputs = encode(tokenizer, text, chat_template)
        check_ids(inputs["input_ids"][0], tokenizer, network, "prompt: it")
        _check_length(network, inputs, max_new_tokens)
        console.print(f"> {text}", style="bold", soft_wrap=True)
        set_seed(seed)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            output = network.generate(  # type: ignore[operator]  # a class attribute's type hides the method
                **inputs.to(place), max_new_tokens=max_new_tokens, streamer=streamer, **options
            )
        texts.append(str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    if not texts:
        raise ConfigurationError("prompt: the standard input holds none; give one with --prompt or --file")
    return texts


def encode(tokenizer: PreTrainedTokenizerBase, text: str, chat_template: bool) -> BatchEncoding:
    """Token ids of a prompt, ``1 T``; inside the chat template, if that is wanted and there is one.

    A start token is there where the tokenizer or the template sets one.

    Raises:
        ConfigurationError: tokenizer or template fail on it.
    """
    if not (chat_template and tokenizer.chat_template):
        with tokenizer_errors("prompt"):
            return tokenizer(text, return_tensors="pt")
    with template_errors("prompt", repr(text[:60]), "try --chat_template false"):
        encoded: BatchEncoding = tokenizer.apply_chat_template(  # type: ignore[assignment]
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return encoded


def _prompts(given: list[str] | None, file: str | None) -> Iterable[str]:
    if given and file:
        raise ConfigurationError("prompt, file: give one of them")
    if given:
        return [without_surrogates(text) for text in given]
    if file is None:
        return _lines(_standard_input())
    path = local_path(file, "file")
    lines = read_text(path, "file").splitlines()
    if not any(line.strip() for line in lines):
        raise ConfigurationError(f"file: {path} holds no prompt")
    return _lines(lines)


def _standard_input() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"prompt: the standard input is not {sys.stdin.encoding} text: {error}") from error


def _lines(lines: Iterable[str]) -> Iterator[str]:
    return (without_surrogates(line.strip()) for line in lines if line.strip())


def device_of(name: str | None) -> torch.device:
    """The device of that name; None for the GPU if there is one, else the CPU.

    Raises:
        ConfigurationError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        meta = torch.empty(0, device=name).is_meta
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if meta:
        raise ConfigurationError(f"device: {name} holds no numbers; use cpu, or cuda for a GPU")
    return torch.device(name)


def _check_length(network: PreTrainedModel, inputs: BatchEncoding, max_new_tokens: int) -> None:
    length, limit = inputs["input_ids"].shape[1], loading.max_length(network.config)
    if length == 0:
        raise ConfigurationError("prompt: it has no token; give some text")
    if limit is not None and length + max_new_tokens > limit:
        raise ConfigurationError(
            f"prompt: {length} tokens and max_new_tokens {max_new_tokens} exceed the model's limit of {limit}"
        )
