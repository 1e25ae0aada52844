"""Quantizing from a script: the command ``fit`` as a function, on the same engine, with the same recipe.

from lightning_gsq import quantize

result = quantize("org/model", "w3g64", "corpus.txt", folder="runs/mine")
result.summary["perplexity"], result.ledger, result.model
result.save("gguf")
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.cli.app import GSQCLI
from lightning_gsq.cli.defaults import quiet_libraries
from lightning_gsq.cli.parser import GSQArgumentParser
from lightning_gsq.commands.export import export
from lightning_gsq.data import Texts, TextSource
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.one_block import check_scheme
from lightning_gsq.system.console import make_console
from lightning_gsq.system.progress_bars import no_foreign_bars
from lightning_gsq.weights.presets import OF_FILE
from lightning_gsq.weights.scheme import QuantScheme

__all__ = ["Quantized", "quantize"]

Text = str | Path | Sequence[Any] | TextSource
Scheme = QuantScheme | str | Mapping[str, Any]
SOURCES = {"data": "text", "evaluation": "evaluation"}
"""Groups of settings that hold a text, and the argument that gives it."""


class Quantized:
    """A finished run.

    Args:
        folder: The run folder.

    Raises:
        ConfigurationError: it holds no finished run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.summary: dict[str, Any] = RunFolder(self.folder, create=False).summary
        """What is in ``summary.json``: perplexities, bits, bytes, seconds."""
        if not self.summary or not (self.folder / "model" / "config.json").is_file():
            raise ConfigurationError(f"folder: {self.folder} holds no finished run")

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The dequantized model, on the CPU, in evaluation mode; ``lightning_gsq.load`` keeps weights packed."""
        return loading.load_model(loading.resolve(str(self.folder / "model")))

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return loading.load_tokenizer(loading.resolve(str(self.folder / "model")))

    @property
    def perplexity(self) -> dict[str, float]:
        """Perplexities by the phase after which they were measured."""
        return dict(self.summary["perplexity"])

    @property
    def ledger(self) -> dict[str, Any]:
        """Where the bytes go: of codes, scales, positions, headers and of what is not quantized; true bits a weight."""
        return dict(self.summary["ledger"])

    def save(self, format: str, folder: str | Path | None = None, overwrite: bool = False, check: bool = True) -> Path:
        """Writes the run as files that other programs load; see the command ``export``.

        Args:
            format: Such as native, dequantized, compressed-tensors, gptq, mlx or gguf.
            folder: Gets a folder of the format's name; None for the folder ``export`` of the run.
            overwrite: Replace an earlier export.
            check: Load the files back and compare.

        Returns:
            The folder that was written.

        Raises:
            ConfigurationError: the format cannot hold this run, or the folder holds something else.
            WorkFailedError: what was read back is not what was written.
        """
        if not isinstance(format, str):
            raise ConfigurationError(f"format: expected a name such as 'native', got {format!r}")
        output = None if folder is None else str(folder)
        with no_foreign_bars():
            console = make_console(quiet=True)
            try:
                (written,) = export(str(self.folder), [format], output, overwrite, check, console=console).values()
            except ConfigurationError as error:  # the command's options are this function's arguments
                said = str(error).replace("--overwrite", "overwrite=True").replace("--output", "folder")
                raise ConfigurationError(re.sub(r"^output: ", "folder: ", said)) from error
        self.summary = RunFolder(self.folder, create=False).summary
        return written


def quantize(
    model: str | Path,
    scheme: Scheme = "w3g64",
    text: Text | None = None,
    evaluation: Text | None = None,
    folder: str | Path = "runs/quantized",
    options: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Quantized:
    """Quantizes a model into a run folder, or goes on where an earlier call of the same run stopped.

    What is not said here is as the command ``fit`` has it without options. Seeds everything random.

    Args:
        model: Folder, GGUF file, name on the hub or ``package://module/file.gguf``.
        scheme: A scheme, the name of one (w3g64, q4_k, iq4_nl ...), settings (``{"bits": 2, "group_size": 64}``), or
            "file" for the types of the GGUF file that ``model.warm_start.file`` names.
        text: Calibration text: a file, a folder, shards, a name on the hub, a list of documents, or a text source; None
            for Python's documentation.
        evaluation: Text for perplexity, likewise.
        folder: The run folder.
        options: Any option of ``fit`` by its name: ``{"data.num_sequences": 64, "model.warm_start": "GPTQ"}``.
        quiet: Print nothing.

    Raises:
        ConfigurationError: something asked for cannot be done; raised before any long work.
        WorkFailedError, NonFiniteLossError: work that was begun failed.
    """
    sources = {"data": _source("text", text), "evaluation": _source("evaluation", evaluation)}
    given = {
        "model.pretrained": _address(model),
        "model.scheme": _scheme(scheme),
        "trainer.default_root_dir": _path("folder", folder),
        **{group: source for group, source in sources.items() if isinstance(source, str)},
        **_options(options),
    }
    arguments = [f"--{name}={_as_typed(value)}" for name, value in given.items()]
    quiet_libraries()
    with no_foreign_bars():
        _Fit(["fit", *arguments], {k: v for k, v in sources.items() if isinstance(v, TextSource)}, quiet)
    return Quantized(folder)


class _Parser(GSQArgumentParser):
    """A parser whose errors are raised."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise ConfigurationError((message or "").removeprefix("error: ").partition(" (python -m")[0].strip())


class _Fit(GSQCLI):
    """The command ``fit`` with texts that are objects already."""

    parser_class = _Parser
    command = "lightning_gsq.quantize"

    def __init__(self, arguments: list[str], sources: Mapping[str, TextSource], quiet: bool) -> None:
        self.sources = sources
        super().__init__(arguments, make_console(quiet=quiet))

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        texts = {"data": self.datamodule, "evaluation": self.objects.evaluation}
        for group, source in self.sources.items():
            texts[group].source = source

    def plain_settings(self) -> dict[str, Any]:
        plain = super().plain_settings()
        for group, source in self.sources.items():
            plain[group]["source"] = {"class_path": f"{type(source).__module__}.{type(source).__qualname__}"}
        return plain


def _address(model: Any) -> str:
    if isinstance(model, PreTrainedModel):
        raise ConfigurationError(
            f"model: got a {type(model).__name__} in memory; write it to a folder with model.save_pretrained and "
            "tokenizer.save_pretrained, and give that"
        )
    return _path("model", model)


def _path(name: str, value: Any) -> str:
    if not isinstance(value, str | Path) or not str(value):
        raise ConfigurationError(f"{name}: expected a path or a name, got {value!r}")
    return str(value)


def _scheme(scheme: Any) -> Any:
    named = scheme.get("preset") if isinstance(scheme, Mapping) else scheme
    if isinstance(named, str) and named.lower() == OF_FILE:  # a scheme of no weight: the command resolves it
        return scheme
    check_scheme(scheme)
    if isinstance(scheme, QuantScheme):
        # A preset's bits and groups are its own.
        return {"preset": scheme.preset} if scheme.preset else dataclasses.asdict(scheme)
    return scheme


def _source(name: str, text: Any) -> str | TextSource | None:
    if text is None or isinstance(text, TextSource):
        return text
    if isinstance(text, list | tuple):
        return Texts(text)
    if not isinstance(text, str | Path):
        raise ConfigurationError(
            f"{name}: expected a path, a name on the hub, a list of documents or a TextSource, got "
            f"{type(text).__name__}"
        )
    if isinstance(text, str) and "\n" in text:
        raise ConfigurationError(f"{name}: got a text itself; give a list of documents, a file or a name on the hub")
    return _path(name, text)


def _options(options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ConfigurationError(f"options: expected option names and values, got {options!r}")
    return {name.removeprefix("--"): value for name, value in options.items()}


def _as_typed(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str | Path):
        return str(value)
    try:
        return json.dumps(value)
    except TypeError as error:
        raise ConfigurationError(
            f"options: {value!r} is no plain data, which the recipe of a run needs ({error}); give a class by its "
            "name, such as 'GPTQ', or with its arguments: {'class_path': 'mymodule.MyClass', 'init_args': {...}}"
        ) from error
