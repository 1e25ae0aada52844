"""Who reads a file that was damaged: each reader says how it went, and whether that is right."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from lightning_gsq.data import LocalShards, TextFile

import lightning_gsq
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import open_run
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.types.codec import dequantize
from tests.support.attack_targets import Target

Reader = Callable[[], tuple[str, bool]]
SLOW = 20.0
"""Seconds after which reading a file of some hundred kilobytes counts as hanging."""


def readers(target: Target) -> dict[Path, Reader]:
    """The files to damage, in a copy of the run, with who reads each."""
    copy = Path(shutil.copytree(target.finished, target.root / "damaged"))
    native = copy / "export" / "native"
    files: dict[Path, Reader] = {}
    for name in ("blocks/block-000.safetensors", "blocks/end_to_end-001.safetensors", "end_to_end.safetensors"):
        files[copy / name] = judged(lambda: read_run(copy))
    for name in ("recipe.yaml", "progress.json", "summary.json"):
        files[copy / name] = judged(lambda: read_run(copy))
    for name in ("model.safetensors", "config.json"):
        files[native / name] = judged(lambda: lightning_gsq.load(str(native)))
    (gguf,) = (copy / "export" / "gguf").glob("*.gguf")
    files[gguf] = judged(lambda: read_gguf(gguf))
    texts = target.root / "texts"
    for name in ("plain.txt", "lines.jsonl"):
        files[texts / name] = judged(lambda name=name: list(TextFile(str(texts / name)).documents()))  # type: ignore[misc]
    for name in ("packed.jsonl.gz", "table.parquet"):
        files[texts / name] = judged(lambda name=name: list(LocalShards(str(texts / name)).documents()))  # type: ignore[misc]
    return files


def read_run(folder: Path) -> None:
    """Everything that an export reads of a run."""
    run = open_run(folder)
    for name in run.weights:
        run.quantized(name)


def read_gguf(file: Path) -> None:
    """Every tensor of a GGUF file."""
    content = GGUFFile(file)
    for name, tensor in content.tensors.items():
        dequantize(content.raw(name), tensor.number)


def judged(read: Callable[[], object]) -> Reader:
    """What reading came to: read, refused in one line, or something that must not happen."""

    def judge() -> tuple[str, bool]:
        began = time.monotonic()
        try:
            read()
            outcome, fine = "read", True
        except ConfigurationError as error:
            outcome, fine = "refused in one line", bool(str(error).strip())
        except Exception as error:
            outcome, fine = f"{type(error).__name__}", False
        if time.monotonic() - began > SLOW:
            return "hang", False
        return outcome, fine

    return judge
