"""The folder of one run: recipe, finished blocks, progress, summary. Everything a resumed run needs.

recipe.yaml            the resolved settings, fingerprints of model and text, versions
choice.yaml            the width of each matrix, where a size was asked for; worth.json what that was decided by
progress.json          perplexities and seconds so far, replaced atomically
blocks/block-003.safetensors   packed codes and scales of a finished block
blocks/rounded-outer.safetensors   the same of embedding and head, where these are quantized
end_to_end.safetensors the end of the end-to-end phase: norms and head if they trained, its losses
imatrix.gguf           mean squares of the inputs of weights, where model.save_imatrix asks for it
model/                 the quantized model as an ordinary Hugging Face folder
summary.json           the results
tensorboard/           event files
.lock                  marks the folder as a run's; whoever works in it holds its lock
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.block_files import (
    ROUNDED,
    Blocks,
    DamagedFileError,
    Expected,
    Header,
    read_block_file,
    read_header,
    write_block_file,
)
from lightning_gsq.run.dense_file import read_dense_file, write_dense_file
from lightning_gsq.run.progress import KINDS, read_json, whole_progress, whole_summary
from lightning_gsq.system.digests import data_digest
from lightning_gsq.system.files import write_atomically
from lightning_gsq.weights.quantized import QuantizedWeight


class RunFolder:
    """Reads and writes a run folder.

    Args:
        root: The folder. Several processes must all see it.
        rank: Number of this process; only the first one writes.
        create: Make it if it does not exist, and check that it can be written.

    Raises:
        ConfigurationError: it cannot be written.
    """

    def __init__(self, root: str | Path, rank: int = 0, create: bool = True) -> None:
        self.root, self.rank = Path(root), rank
        self.blocks = self.root / "blocks"
        self.model = self.root / "model"
        self.recipe_file = self.root / "recipe.yaml"
        self.recipe: str | None = None
        """Digest of what decides the run, which every file has to carry; None where nobody has said which it is."""
        self._progress: dict[str, Any] | None = None
        if rank or not create:
            return
        try:
            self.blocks.mkdir(parents=True, exist_ok=True)
            probe = self.root / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigurationError(
                f"trainer.default_root_dir: cannot write to the run folder {self.root}: {error.strerror}"
            ) from error

    def check_room(self, needed: int) -> None:
        """Verifies that ``needed`` bytes fit on the disk.

        Raises:
            ConfigurationError: they do not.
        """
        if self.rank:
            return
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise ConfigurationError(
                f"trainer.default_root_dir: the run needs about {needed / 1e9:.2f} GB, the disk of {self.root} has "
                f"{free / 1e9:.2f} GB free"
            )

    # -- progress and summary

    @property
    def progress(self) -> dict[str, Any]:
        """What is done so far; empty for a new run. ``model`` says whose result was saved last."""
        progress = self._known_progress()
        if "model" not in progress and self.dense_file("end_to_end").exists():  # the progress file was lost
            return {**progress, "model": "end_to_end"}
        return progress

    def _known_progress(self) -> dict[str, Any]:
        if self._progress is not None:
            return self._progress
        return whole_progress(read_json(self.root / "progress.json"))

    @property
    def summary(self) -> dict[str, Any]:
        """The results; empty for a run that has none yet, or where the file is damaged: a run writes it anew."""
        return whole_summary(read_json(self.root / "summary.json"))

    def share_progress(self, agree: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Several processes go on from what the first one read, each keeping its own copy.

        Args:
            agree: Returns the first process's value in all of them.
        """
        self._progress = agree(self._known_progress() if self.rank == 0 else {})

    def update_progress(self, **changes: Any) -> None:
        """Replaces some entries of the progress file."""
        content = {**self._known_progress(), **changes}
        if self._progress is not None:
            self._progress = content
        if self.rank == 0:
            write_atomically(self.root / "progress.json", json.dumps(content, indent=1).encode())

    def add_seconds(self, part: str, seconds: float) -> None:
        """Adds to the seconds of a part of the run."""
        so_far = self.progress.get("seconds", {})
        self.update_progress(seconds={**so_far, part: so_far.get(part, 0.0) + seconds})

    def perplexity(self, name: str, of: str) -> float | None:
        """The perplexity of that name, if it was measured of what ``of`` is the digest of."""
        value: float | None = self.progress.get("perplexity", {}).get(name, {}).get(of)
        return value

    def perplexity_error(self, name: str, of: str) -> float | None:
        """The standard error of that perplexity, where it has one."""
        value: float | None = self.progress.get("perplexity_error", {}).get(name, {}).get(of)
        return value

    def note_perplexity(self, name: str, of: str, value: float, error: float | None = None) -> None:
        """Keeps a perplexity, and its standard error, with the digest of what it was measured of."""
        changes = {"perplexity": value} if error is None else {"perplexity": value, "perplexity_error": error}
        for key, figure in changes.items():
            so_far = self.progress.get(key, {})
            self.update_progress(**{key: {**so_far, name: {**so_far.get(name, {}), of: figure}}})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``."""
        if self.rank:
            return
        write_atomically(self.root / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")

    # -- weights

    def block_file(self, kind: str, index: int | str) -> Path:
        """File of a block, or of what is :data:`OUTER`.

        Args:
            kind: Of a block ``warm_start``, ``block`` or ``end_to_end``; of the others ``rounded`` or ``end_to_end``.
            index: The block's number, or ``OUTER``.

        Raises:
            ConfigurationError: the kind is something else.
        """
        if kind not in (*KINDS, ROUNDED):
            raise ConfigurationError(f"run: {self.root} names {kind!r} as the kind of its result; it is none")
        return self.blocks / f"{kind}-{index if isinstance(index, str) else f'{index:03d}'}.safetensors"

    def has_blocks(self, kind: str, indices: Iterable[int | str]) -> bool:
        """Whether all these blocks have a file of that kind."""
        return all(self.block_file(kind, index).exists() for index in indices)

    def write_block(
        self,
        kind: str,
        index: int | str,
        tensors: Mapping[str, QuantizedWeight],
        after: str = "",
        measures: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a finished block atomically; arguments as in :class:`~lightning_gsq.run.block_files.Header`."""
        if self.rank == 0:
            header = Header(kind, index, "", self.recipe or "", after, dict(measures or {}))
            write_block_file(self.block_file(kind, index), tensors, header)

    def header(self, kind: str, index: int | str) -> Header | None:
        """What a block's file says about itself; None where there is none that says anything."""
        return read_header(self.block_file(kind, index))

    def read_block(self, kind: str, index: int | str, expected: Expected) -> Blocks:
        """Reads a block back and checks it against the weights it has to hold.

        Args:
            kind: As in :meth:`block_file`.
            index: The block's number, or ``OUTER``.
            expected: Scheme and ``(O, I)`` of each weight, by name.

        Raises:
            DamagedFileError: the file is truncated, changed, or something else.
        """
        return read_block_file(self.block_file(kind, index), kind, index, self.recipe, expected)[0]

    def measures(self) -> dict[str, dict[str, Any]]:
        """What was measured while each finished block trained, by its number."""
        headers = [read_header(file) for file in sorted(self.blocks.glob("block-*.safetensors"))]
        return {str(h.index): h.measures for h in headers if h is not None and h.recipe == (self.recipe or "")}

    def digest(self, kind: str, indices: Iterable[int | str]) -> str:
        """A digest of the result of a phase, as its files say it: of its blocks, and of what else it trained."""
        headers = [self.header(kind, index) for index in indices]
        try:
            dense = self.read_dense(kind)
        except DamagedFileError:
            dense = None
        return data_digest([kind, [header and header.digest for header in headers], dense and dense[1]])

    def dense_file(self, name: str) -> Path:
        """File of parameters that are not quantized."""
        return self.root / f"{name}.safetensors"

    def write_dense(self, name: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Writes parameters that are not quantized, and how they came about, atomically."""
        if self.rank == 0:
            write_dense_file(self.dense_file(name), name, tensors, report, self.recipe or "")

    def read_dense(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Reads both back; None where there is no such file.

        Raises:
            DamagedFileError: the file is truncated, changed, or something else.
        """
        file = self.dense_file(name)
        return read_dense_file(file, name, self.recipe) if file.exists() else None
