"""A block's file: packed codes and scales in safetensors, and in the header what they are and how they came about.

    layout   scheme and shape of each weight
    header   :class:`Header`: kind and number of the block, digests of its tensors, of the recipe, of the block before;
             what was measured

So a file that was swapped, renamed, changed or left over from another run is told from the one that belongs there, and
what was measured while it was made is never lost.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.digests import data_digest, tensors_digest
from lightning_gsq.system.files import write_atomically
from lightning_gsq.weights.quantized import QuantizedWeight
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.stored import unpack_weight

Blocks = dict[str, QuantizedWeight]
OUTER = "outer"
"""In the place of a block's number: the weights outside of all blocks, under their names in the model."""
ROUNDED = "rounded"
"""Kind of their file before anything trains them."""
Expected = Mapping[str, tuple[QuantScheme, tuple[int, int]]]
"""Scheme and ``(O, I)`` of each weight, by name."""


class DamagedFileError(ConfigurationError):
    """A file of a run is not the one that belongs there. The run can make it again."""


@dataclass(frozen=True)
class Header:
    """What a block's file says about itself.

    Args:
        kind: ``warm_start``, ``block`` or ``end_to_end``; ``rounded`` of the weights outside of the blocks.
        index: The block's number, or :data:`OUTER`.
        digest: Of its tensors.
        recipe: Digest of what decides the run.
        after: Digest of the block before, on whose output this one was made; empty for the first.
        measures: What was found while it was made: errors, seconds, processes.
    """

    kind: str
    index: int | str
    digest: str
    recipe: str = ""
    after: str = ""
    measures: dict[str, Any] = field(default_factory=dict)


def write_block_file(file: Path, tensors: Mapping[str, QuantizedWeight], header: Header) -> Header:
    """Writes a block's file, whole or not at all; returns the header with the digest in it."""
    content: dict[str, Tensor] = {}
    layout: dict[str, Any] = {}
    for name, tensor in tensors.items():
        content |= {f"{name}.{part}": value for part, value in tensor.pack().items()}
        layout[name] = describe(tensor)
    header = dataclasses.replace(header, digest=tensors_digest(content))
    fields = json.loads(json.dumps(dataclasses.asdict(header)))
    metadata = {"layout": json.dumps(layout), "header": json.dumps({**fields, "check": data_digest(fields)})}
    write_atomically(file, save(content, metadata))
    return header


def read_header(file: Path) -> Header | None:
    """What a file says about itself, its tensors unseen; None where it says nothing that can be read."""
    try:
        with safe_open(file, framework="pt") as content:
            return _header(content.metadata() or {})
    except (SafetensorError, ValueError, TypeError, OSError, RecursionError):
        return None


def read_block_file(
    file: Path, kind: str, index: int | str, recipe: str | None, expected: Expected
) -> tuple[Blocks, Header]:
    """Reads a block's file and checks that it is the one that belongs there.

    Args:
        file: The file.
        kind: What it has to be.
        index: The number of the block that it has to hold.
        recipe: Digest of what decides the run; None accepts any, and files of earlier versions, which have none.
        expected: What it has to hold.

    Raises:
        DamagedFileError: it is truncated, changed, or something else.
    """
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 - not a dict
        header = _header(metadata)
        if header is None:
            if recipe is not None:
                raise ValueError("it has no header that says what it is")
            header = Header(kind, index, "")
        else:
            _check(header, tensors, kind, index, recipe)
        return _unpack(tensors, json.loads(metadata["layout"]), expected), header
    except (SafetensorError, ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise DamagedFileError(
            f"trainer.default_root_dir: {file} cannot be used: {error}. The command that started the run makes it again"
        ) from error


def _check(header: Header, tensors: Mapping[str, Tensor], kind: str, index: int | str, recipe: str | None) -> None:
    if (header.kind, header.index) != (kind, index):
        raise ValueError(f"it is {header.kind} of block {header.index}, expected {kind} of block {index}")
    if recipe is not None and header.recipe != recipe:
        raise ValueError("it belongs to a run with another recipe")
    if tensors_digest(tensors) != header.digest:
        raise ValueError("its contents have changed since it was written")


def _header(metadata: Mapping[str, str]) -> Header | None:
    if "header" not in metadata:
        return None
    fields = json.loads(metadata["header"])
    if not isinstance(fields, dict) or fields.pop("check", None) != data_digest(fields):
        raise ValueError("its header has changed since it was written")
    return Header(**fields)


def _unpack(content: Mapping[str, Tensor], layout: Mapping[str, Any], expected: Expected) -> Blocks:
    parts: dict[str, set[str]] = {name: set() for name in layout}
    for key in content:
        parts[key.rpartition(".")[0]].add(key.rpartition(".")[2])
    if set(layout) != set(expected):
        raise ValueError(f"it holds {sorted(layout)}, expected {sorted(expected)}")
    tensors = {}
    for name, (scheme, shape) in expected.items():
        stored = stored_scheme(layout[name])
        if not scheme.admits(stored):
            raise ValueError(f"{name} is stored as {layout[name]}, expected {scheme}")
        tensors[name] = unpack_weight({part: content[f"{name}.{part}"] for part in parts[name]}, stored, shape)
    return tensors


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
