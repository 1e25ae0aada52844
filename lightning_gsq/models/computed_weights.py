"""Weights that are computed while a model is loaded, kept in files where memory is short.

A safetensors file is mapped: the system drops its pages where it needs room. But transformers computes what a file
does not hold as the model has it: it stacks the matrices of experts into one tensor, and makes plain numbers of FP8,
INT4 and MXFP4. What it computes is written to a file here, one parameter after another, and mapped from there, so that
no more than one of them is in memory. In a run folder the files stay for the next start of the same run and for its
other processes, which find them by a name that stands for the checkpoint. Elsewhere they have no name once they are
mapped, and their room on the disk is free when the process ends.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, core_model_loading
from transformers import __version__ as transformers_version
from transformers.utils import cached_file

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.address import ModelSource
from lightning_gsq.models.dequantizing import METHODS, method_of
from lightning_gsq.models.empty import empty_model
from lightning_gsq.models.replaced import replaced
from lightning_gsq.system import memory
from lightning_gsq.system.files import hidden_name
from lightning_gsq.system.locking import waiting_for
from lightning_gsq.system.safetensors_headers import INDEX, read_headers, read_json
from lightning_gsq.system.shards import SINGLE, Shards

FOLDER = "weights"
"""Where they are in a run folder, while the run goes on."""
PART_OF_MEMORY = 0.5
"""Of the host's free memory, what a model may take that is to be quantized there."""
_log = logging.getLogger(__name__)


def short_of_memory(size: int, room: int) -> bool:
    """Whether what is computed on loading goes into files.

    Args:
        size: Bytes of the whole model.
        room: Bytes of the host that are free.
    """
    return size > PART_OF_MEMORY * room


def computed_bytes(source: ModelSource, model: PreTrainedModel, dequantized: bool) -> int:
    """Bytes of the weights that are computed on loading: those that no file holds under their names, as plain numbers.

    Args:
        source: The model; one without files here is taken to have its weights as they are.
        model: Its modules, on the meta device.
        dequantized: Whether the files hold no plain numbers.
    """
    if source.gguf_file is not None or not source.files:
        return 0
    return _bytes_beside(read_headers(source.files), model, dequantized)


def _bytes_beside(names: Collection[str], model: PreTrainedModel, dequantized: bool) -> int:
    """Bytes of the weights that are computed from files with tensors of these names."""
    prefix = f"{model.base_model_prefix}."
    stored = {name.removeprefix(prefix) for name in names}
    stored |= {name.rpartition(".")[0] for name in stored}  # a packed weight is a module of several tensors
    return sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and (dequantized or (parameter.ndim > 2 and name.removeprefix(prefix) not in stored))
    )


def _stored_names(source: ModelSource) -> Collection[str]:
    """Names of the tensors in a model's files; of one on the hub, its index or its one file is downloaded for it."""
    if source.files:
        return read_headers(source.files)
    for name in (INDEX, SINGLE):
        found = cached_file(source.path, name, revision=source.revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return read_json(Path(found)).get("weight_map", {}) if name == INDEX else read_headers([Path(found)])
    return ()  # from_pretrained then refuses it


@contextmanager
def for_a_while(root: Path) -> Iterator[Path]:
    """A folder beside :data:`FOLDER` of a run that is gone after the context; what is mapped stays readable."""
    folder = hidden_name(root / FOLDER)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def in_files(
    folder: Path | None, source: ModelSource, config: PretrainedConfig, dtype: torch.dtype | None
) -> Iterator[None]:
    """Keeps what transformers computes inside the context in files, where the model would fill half of the memory.

    Args:
        folder: Where to; None for a temporary folder (``TMPDIR``) that is gone after the context: what is mapped stays
            readable. Without room there, what is computed stays in memory, and a line says so.
        source: The model.
        config: Its configuration.
        dtype: Dtype of its parameters; None for that of its files.

    Raises:
        ConfigurationError: the folder's disk has no room.
    """
    if source.gguf_file is not None:
        yield
        return
    model = empty_model(source, config, dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    short = short_of_memory(size, memory.host_bytes())
    # Where one of these is to stay as it is stored, its loader still makes plain numbers of it on a CPU.
    dequantized = method_of(config) in METHODS
    computed = _bytes_beside(_stored_names(source), model, dequantized) if short else 0
    if not computed:
        yield
        return
    if folder is not None:
        with _written(_claimed(folder, source, dtype, size, computed)):
            yield
        return
    with tempfile.TemporaryDirectory(prefix="lightning-gsq-", ignore_cleanup_errors=True) as temporary:
        if (free := shutil.disk_usage(temporary).free) < computed:
            _log.warning(
                "%s takes %.1f GB, more than half of the memory, and the %.1f GB of it that are computed on loading do "
                "not fit into the %.1f GB that are free in %s: they are held in memory; set TMPDIR to a folder on "
                "another disk",
                *(source.shown, size / 1e9, computed / 1e9, free / 1e9, tempfile.gettempdir()),
            )
            yield
            return
        with _written(Path(temporary)):
            yield


def _claimed(folder: Path, source: ModelSource, dtype: torch.dtype | None, size: int, computed: int) -> Path:
    """The part of a run's folder that is for this checkpoint, those of others removed; refused without room."""
    own = folder / _digest(source, dtype)
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"trainer.default_root_dir: cannot write {own}: {error.strerror}") from error
    for other in folder.iterdir():
        if other != own:  # of another checkpoint
            shutil.rmtree(other)
    present = sum(file.stat().st_size for file in own.rglob("*.safetensors"))
    if (free := shutil.disk_usage(own).free) < computed - present:
        raise ConfigurationError(
            f"model.pretrained: {source.shown} takes {size / 1e9:.1f} GB, more than half of the memory, and the "
            f"{computed / 1e9:.1f} GB of it that are computed on loading do not fit into the {free / 1e9:.1f} GB that "
            f"are free in {folder}; use a --trainer.default_root_dir on another disk"
        )
    return own


@contextmanager
def _written(own: Path) -> Iterator[None]:
    """Has transformers' converters write into a folder, where it is not written yet, and map from there."""
    convert = core_model_loading.WeightConverter.convert

    def converted(self: Any, layer_name: str, *args: Any, **more: Any) -> dict[str, Tensor]:
        place = own / layer_name
        with waiting_for(own / ".lock"):
            if not (place / SINGLE).exists():
                _write(place, convert(self, layer_name, *args, **more))
        return load_file(place / SINGLE)

    with replaced(core_model_loading.WeightConverter, "convert", converted), _one_by_one():
        yield


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Has transformers read a parameter when it is its turn; its threads would read all of them before the first."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _write(place: Path, values: dict[str, Any]) -> None:
    """Writes what a converter gives, so that it is there whole or not at all."""
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shards = Shards(partial)
    shards.add({name: value[0] if isinstance(value, list) else value for name, value in values.items()})
    values.clear()
    shards.finish()
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)


def _digest(source: ModelSource, dtype: torch.dtype | None) -> str:
    """A name for a checkpoint, and for what makes numbers of it."""
    about = [transformers_version, str(dtype), str(source.path)]
    for file in sorted(Path(file) for file in source.files):
        about += [file.name, str(file.stat().st_size), str(file.stat().st_mtime_ns)]
    return hashlib.blake2b("\n".join(about).encode(), digest_size=8).hexdigest()
