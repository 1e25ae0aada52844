"""YAML from anywhere: its size is known before anything is built from it.

A few lines of aliases to aliases stand for gigabytes. So the document is only composed first, which costs what the text
costs, and its expanded size is added up; nothing is built from one that is too large, too deep, or contains itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_gsq.errors import ConfigurationError

MAX_BYTES = 10_000_000
MAX_NODES = 200_000
MAX_DEPTH = 60


def read_yaml(file: Path, what: str) -> Any:
    """The content of a YAML file, plain data only.

    Args:
        file: The file.
        what: What to call it in an error, such as ``run``.

    Raises:
        ConfigurationError: it cannot be read, is no YAML, or stands for more than :data:`MAX_NODES` values.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {file.stat().st_size:,} bytes, at most {MAX_BYTES:,} are read")
        return parse_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise ConfigurationError(f"{what}: {file} cannot be read: {error}") from error


def parse_yaml(text: str) -> Any:
    """The content of a YAML document, plain data only.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError, RecursionError: it stands for too much.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _expanded(root, {}, 0)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Values that a node stands for, its aliases written out; 0 in ``sizes`` marks a node that is being added up."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError("it contains itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    size = 1
    for part in parts:
        size += sum(_expanded(child, sizes, depth + 1) for child in (part if isinstance(part, tuple) else (part,)))
        if size > MAX_NODES:
            raise ValueError(f"it stands for more than {MAX_NODES:,} values (aliases written out)")
    sizes[id(node)] = size
    return size
