"""The widths of a whole model as a file: ``choice.yaml`` in the run folder.

It is a list of overrides, one line a matrix, under what the choice was made for, as comments:

    # size 80MB, for a gguf file: 79,912,345 of 80,000,000 bytes
    model.embed_tokens.weight: q6_k
    model.layers.0.self_attn.q_proj.weight: q4_k

so that ``--model.overrides choice.yaml`` gives it back, edited or not. The last comment is a digest of the lines: a
file that somebody edited is never written over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.digests import data_digest
from lightning_gsq.system.files import write_atomically

FILE = "choice.yaml"
_DIGEST = "# digest "


@dataclass(frozen=True)
class Choice:
    """What each matrix takes.

    Args:
        widths: Name of a preset, such as ``q4_k`` or ``w3g64``, by full parameter name; the pinned ones are left out.
        size: What was asked for.
        runtime: The format whose file has that size.
        num_bytes: Bytes of that file.
        limit: Bytes that it may have.
        cost: Predicted divergence, nats a token.
    """

    widths: Mapping[str, str]
    size: str
    runtime: str
    num_bytes: int
    limit: int
    cost: float

    def as_plain(self) -> dict[str, Any]:
        """As plain data, for the recipe."""
        return {
            "widths": dict(self.widths),
            "size": self.size,
            "runtime": self.runtime,
            "num_bytes": self.num_bytes,
            "limit": self.limit,
            "cost": self.cost,
        }

    @classmethod
    def of_plain(cls, content: Any) -> Choice:
        """Inverse of :meth:`as_plain`.

        Raises:
            ConfigurationError: it is none.
        """
        try:
            return cls(**content)
        except TypeError as error:
            raise ConfigurationError(f"run: the recipe's choice of widths is damaged: {error}") from error

    def text(self) -> str:
        """The content of the file."""
        return (
            f"# size {self.size}, for a {self.runtime} file: {self.num_bytes:,} of {self.limit:,} bytes; predicted\n"
            f"# divergence {self.cost:.4g} nats a token. Edit it and give it to a new run: --model.overrides {FILE}\n"
            f"{_DIGEST}{data_digest(dict(self.widths))}\n"
            f"{yaml.safe_dump(dict(self.widths), sort_keys=False, width=1000)}"
        )

    def write(self, folder: Path) -> None:
        """Writes it into a run folder.

        Raises:
            ConfigurationError: the file there was edited.
        """
        file = folder / FILE
        if file.is_file() and _is_edited(file):
            raise ConfigurationError(
                f"model.size: {file} was edited, and this run makes its own choice. To use the edited one, move it and "
                "start a run in another folder with --model.overrides <the file> and without --model.size; otherwise "
                "delete it"
            )
        write_atomically(file, self.text().encode())


def _is_edited(file: Path) -> bool:
    """Whether a file's lines are others than those it was written with."""
    try:
        text = file.read_text(encoding="utf-8")
        widths = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return True
    digests = [line.removeprefix(_DIGEST).strip() for line in text.splitlines() if line.startswith(_DIGEST)]
    return not isinstance(widths, dict) or digests != [data_digest(widths)]
