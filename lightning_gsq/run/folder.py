"""The folder of one run: recipe, finished blocks, progress, summary. Everything a resumed run needs.

recipe.yaml            the resolved settings, fingerprints of model and text, versions
progress.json          what is done, replaced atomically
blocks/block-003.safetensors   packed codes and scales of a finished block
blocks/rounded-outer.safetensors   the same of embedding and head, where these are quantized
end_to_end.safetensors the end of the end-to-end phase: norms and head if they trained, its losses
model/                 the quantized model as an ordinary Hugging Face folder
summary.json           the results
tensorboard/           event files
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.files import write_atomically
from lightning_gsq.weights.quantized import QuantizedWeight
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.stored import unpack_weight

Blocks = dict[str, QuantizedWeight]
OUTER = "outer"
"""In the place of a block's number: the weights outside of all blocks, under their names in the model."""


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
        self._progress: dict[str, Any] | None = None
        self.blocks = self.root / "blocks"
        self.model = self.root / "model"
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

    def open_recipe(self, recipe: dict[str, Any]) -> None:
        """Writes the recipe of a new run; compares it with that of a run to resume.

        Raises:
            ConfigurationError: the folder belongs to a run with another recipe.
        """
        file = self.root / "recipe.yaml"
        if not file.exists():
            if self.rank == 0:
                write_atomically(file, yaml.safe_dump(recipe, sort_keys=False).encode())
            return
        try:
            known = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"trainer.default_root_dir: {file} cannot be read: {error}") from error
        # Versions are there to be read: another one may change the last bits of a result, not what was asked for.
        known, wanted = ({**part, "versions": None} for part in (known or {}, json.loads(json.dumps(recipe))))
        differences = compare(known, wanted)
        if differences:
            raise ConfigurationError(
                f"trainer.default_root_dir: {self.root} holds a run with another recipe; choose another folder, or "
                "the same settings to resume it. What differs:\n" + "\n".join(f"  {line}" for line in differences)
            )

    @property
    def progress(self) -> dict[str, Any]:
        """What is done so far; empty for a new run."""
        if self._progress is not None:
            return self._progress
        return self._read_json("progress.json")

    @property
    def summary(self) -> dict[str, Any]:
        """The results; empty for a run that has none yet."""
        return self._read_json("summary.json")

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self.root / name
        if not file.exists():
            return {}
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigurationError(
                f"trainer.default_root_dir: {file} is damaged ({error}); delete the run"
            ) from error
        return content

    def share_progress(self, agree: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Several processes go on from what the first one read, each keeping its own copy.

        Args:
            agree: Returns the first process's value in all of them.
        """
        self._progress = agree(self.progress if self.rank == 0 else {})

    def update_progress(self, **changes: Any) -> None:
        """Replaces some entries of the progress file."""
        content = {**self.progress, **changes}
        if self._progress is not None:
            self._progress = content
        if self.rank == 0:
            write_atomically(self.root / "progress.json", json.dumps(content, indent=1).encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``."""
        if self.rank:
            return
        write_atomically(self.root / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")

    def block_file(self, kind: str, index: int | str) -> Path:
        """File of a block, or of what is :data:`OUTER`.

        Args:
            kind: Of a block ``warm_start``, ``block`` or ``end_to_end``; of the others ``rounded`` or ``end_to_end``.
            index: The block's number, or ``OUTER``.
        """
        return self.blocks / f"{kind}-{index if isinstance(index, str) else f'{index:03d}'}.safetensors"

    def has_blocks(self, kind: str, indices: Iterable[int | str]) -> bool:
        """Whether all these blocks have a file of that kind."""
        return all(self.block_file(kind, index).exists() for index in indices)

    def write_block(self, kind: str, index: int | str, tensors: Mapping[str, QuantizedWeight]) -> None:
        """Writes a finished block atomically."""
        if self.rank:
            return
        content: dict[str, Tensor] = {}
        layout: dict[str, Any] = {}
        for name, tensor in tensors.items():
            content |= {f"{name}.{part}": value for part, value in tensor.pack().items()}
            layout[name] = describe(tensor)
        write_atomically(self.block_file(kind, index), save(content, {"layout": json.dumps(layout)}))

    def read_block(
        self, kind: str, index: int | str, expected: Mapping[str, tuple[QuantScheme, tuple[int, int]]]
    ) -> Blocks:
        """Reads a block back and checks it against the weights it has to hold.

        Args:
            kind: As in :meth:`block_file`.
            index: The block's number, or ``OUTER``.
            expected: Scheme and ``(O, I)`` of each weight, by name.

        Raises:
            ConfigurationError: the file is truncated or corrupt, or holds something else.
        """
        file = self.block_file(kind, index)
        try:
            with safe_open(file, framework="pt") as content:
                layout = json.loads((content.metadata() or {})["layout"])
                parts: dict[str, set[str]] = {name: set() for name in layout}
                for key in content.keys():  # noqa: SIM118 - not a dict
                    parts[key.rpartition(".")[0]].add(key.rpartition(".")[2])
                if set(layout) != set(expected):
                    raise ValueError(f"it holds {sorted(layout)}, expected {sorted(expected)}")
                tensors = {}
                for name, (scheme, shape) in expected.items():
                    stored = stored_scheme(layout[name])
                    if not scheme.admits(stored):
                        raise ValueError(f"{name} is stored as {layout[name]}, expected {scheme}")
                    own = {part: content.get_tensor(f"{name}.{part}") for part in parts[name]}
                    tensors[name] = unpack_weight(own, stored, shape)
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigurationError(
                f"trainer.default_root_dir: the block file {file} cannot be used: {error}. Delete it to have this "
                "block and those after it quantized again"
            ) from error
        return tensors

    def dense_file(self, name: str) -> Path:
        """File of parameters that are not quantized."""
        return self.root / f"{name}.safetensors"

    def write_dense(self, name: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Writes parameters that are not quantized, and how they came about, atomically."""
        if self.rank:
            return
        write_atomically(self.dense_file(name), save(dict(tensors), {"report": json.dumps(report)}))

    def read_dense(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Reads both back; None where there is no such file.

        Raises:
            ConfigurationError: the file is truncated or corrupt.
        """
        file = self.dense_file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as content:
                report: dict[str, Any] = json.loads((content.metadata() or {})["report"])
                return {key: content.get_tensor(key) for key in content.keys()}, report  # noqa: SIM118 - no mapping
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise ConfigurationError(
                f"trainer.default_root_dir: {file} cannot be used: {error}. Delete it to have that phase run again"
            ) from error


def describe(tensor: QuantizedWeight) -> dict[str, Any]:
    """What a block file says about a weight: bits, group size, shape, and the salient part if it has one."""
    scheme = tensor.scheme
    salient = {} if scheme.salient is None else {"salient": dataclasses.asdict(scheme.salient)}
    preset = {} if scheme.preset is None else {"preset": scheme.preset}
    return {"bits": scheme.bits, "group_size": scheme.group_size, **preset, **salient, "shape": list(tensor.shape)}


def stored_scheme(layout: Mapping[str, Any]) -> QuantScheme:
    """The scheme in what :func:`describe` returned.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    salient = SalientPart(**layout["salient"]) if "salient" in layout else None
    return QuantScheme(layout["bits"], layout["group_size"], salient, preset=layout.get("preset"))


def compare(known: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines that say where two nested mappings differ."""
    lines = []
    for key in sorted({*known, *wanted}, key=str):
        old, new, name = known.get(key), wanted.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += compare(old, new, f"{name}.")
        elif old != new:
            lines.append(f"{name}: the run has {old!r}, asked for {new!r}")
    return lines
