"""A file of parameters that are not quantized, with the report of the phase that trained them in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_gsq.run.block_files import DamagedFileError
from lightning_gsq.system.digests import data_digest, tensors_digest
from lightning_gsq.system.files import write_atomically


def write_dense_file(
    file: Path, kind: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any], recipe: str
) -> None:
    """Writes parameters and report, whole or not at all.

    Args:
        file: The file.
        kind: The phase.
        tensors: The parameters.
        report: How they came about, plain data.
        recipe: Digest of what decides the run.
    """
    content = dict(tensors)
    header = {"kind": kind, "digest": _digest(content, report), "recipe": recipe}
    write_atomically(file, save(content, {"report": json.dumps(report), "header": json.dumps(header)}))


def read_dense_file(file: Path, kind: str, recipe: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads both back and checks that they are those of this run.

    Args:
        file: The file.
        kind: The phase.
        recipe: Digest of what decides the run; None accepts any, and files of earlier versions, which have none.

    Raises:
        DamagedFileError: the file is truncated, changed, or something else.
    """
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 - no mapping
        report = json.loads(metadata["report"])
        if not isinstance(report, dict):
            raise ValueError("its report is damaged")
        header = json.loads(metadata["header"]) if "header" in metadata else None
        if header is not None and header["kind"] != kind:
            raise ValueError(f"it is that of {header['kind']}")
        if recipe is not None and (header is None or header["recipe"] != recipe):
            raise ValueError("it belongs to a run with another recipe")
        if header is not None and header["digest"] != _digest(tensors, report):
            raise ValueError("its contents have changed since it was written")
    except (SafetensorError, ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise DamagedFileError(
            f"trainer.default_root_dir: {file} cannot be used: {error}. The command that started the run makes it again"
        ) from error
    return tensors, report


def _digest(tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> str:
    return data_digest([tensors_digest(tensors), json.loads(json.dumps(report))])
