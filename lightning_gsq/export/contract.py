"""What a format is: a class with a ``name`` and five methods, registered by :func:`~.registry.register`.

``refuse`` is asked before a run trains and before anything is written; ``write`` and ``check`` come after. The others
say what is printed: which programs load the file, how many bits a weight takes in it, what a user should know.
"""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from lightning_gsq.errors import WorkFailedError
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.system.shards import SHARD_SIZE
from lightning_gsq.weights.ledger import Ledger
from lightning_gsq.weights.scheme import QuantScheme

Run = TypeVar("Run", bound=PlannedRun)


@dataclass(frozen=True)
class ExportOptions:
    """Settings of a writer.

    Args:
        shard_size: Bytes after which a new weight file begins.
        gguf_embedding: Type of the embedding and the head in a GGUF file; null for that of the GGUF file that the run
            started from, or F16.
        gguf_projection: Type that a GGUF file rounds those matrices to that no type holds exactly.
    """

    shard_size: int = SHARD_SIZE
    gguf_embedding: Literal["F16", "Q8_0"] | None = None
    gguf_projection: Literal["Q4_0", "Q5_0", "Q8_0"] = "Q8_0"


@dataclass(frozen=True)
class Runtime:
    """One program that loads the file.

    Args:
        name: The program, such as ``transformers``.
        exactness: ``exact`` if it computes with the weights of the run bit for bit, else what it changes.
        usage: How to load the folder there: a command or a line of Python, with ``{folder}`` for its address and
            ``{auto_class}`` for the class of transformers that loads such a model.
    """

    name: str
    exactness: str
    usage: str

    def how(self, folder: str, auto_class: type) -> str:
        """The command or line of Python for a folder, whatever characters are in its name."""
        usage = self.usage.replace("{auto_class}", auto_class.__name__)
        return usage.replace('"{folder}"', json.dumps(folder, ensure_ascii=False)).replace(
            "{folder}", shlex.quote(folder)
        )


@dataclass(frozen=True)
class FileSizes:
    """What the weight files of a run will have, to the byte, before there are any.

    Args:
        weight: Bytes that one quantized weight takes, by its name and scheme.
        total: Bytes of all weight files, headers included, by the scheme of each quantized weight.
    """

    weight: Callable[[str, QuantScheme], int]
    total: Callable[[Mapping[str, QuantScheme]], int]


@dataclass(frozen=True)
class CheckReport:
    """What loading an export back showed.

    Args:
        runtime: The package that loaded it, with its version.
        weights: Quantized weights compared with the run's own, and how many of those were bit-identical.
        logits: Largest difference of a logit between the run's weights and the loaded file, and the largest logit;
            None where the runtime gives none.
        same_text: Whether greedy text from the prompts is the same; None where that cannot be expected.
        perplexity: On a short text, with the run's weights and with the loaded file.
        note: What else the user should know.
        checked: Whether the runtime was there at all.
    """

    runtime: str
    weights: tuple[int, int] | None = None
    logits: tuple[float, float] | None = None
    same_text: bool | None = None
    perplexity: tuple[float, float] | None = None
    note: str = ""
    checked: bool = True

    def describe(self) -> str:
        """The report as one line."""
        if not self.checked:
            return self.note
        parts = []
        if self.weights is not None:
            parts.append(f"{self.weights[1]} of {self.weights[0]} quantized weights bit-identical")
        if self.logits is not None:
            parts.append(f"logits differ by at most {self.logits[0]:.3g} (the largest is {self.logits[1]:.3g})")
        if self.same_text is not None:
            parts.append("same greedy text" if self.same_text else "other greedy text")
        if self.perplexity is not None:
            parts.append(
                f"perplexity of a short built-in text {self.perplexity[0]:.4f} before, {self.perplexity[1]:.4f} after"
            )
        if self.note:
            parts.append(self.note)
        return f"checked with {self.runtime}: " + ", ".join(parts)


class CheckFailedError(WorkFailedError):
    """A file that was written does not load back as what it should be."""


class ExportFormat(ABC):
    """A kind of file."""

    name: ClassVar[str]
    salient: ClassVar[bool] = False
    """Whether it holds weights of which some have more bits."""
    outer: ClassVar[bool] = False
    """Whether a quantized embedding and head are among the weights that it is given; else both are plain numbers."""
    outside: ClassVar[bool] = False
    """Whether it holds what a model for more than text has beside its text decoder: towers, projectors."""
    package: ClassVar[str | None] = None
    """The package that :meth:`check` loads a folder with, where it is not one that this project needs anyway."""

    def view(self, run: Run, options: ExportOptions = ExportOptions()) -> Run:
        """The run with those quantized weights that the format holds; what is written and compared follows from it."""
        return run if self.outer or not run.outer else run.within_blocks

    @abstractmethod
    def refuse(self, run: PlannedRun) -> str | None:
        """Why the format cannot hold the run, naming one that can; None if it can. Asked before anything is trained."""

    @abstractmethod
    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        """Writes weights, configuration and tokenizer into an empty folder.

        Memory use is that of one block, whatever the model's size.

        Args:
            run: The run.
            folder: An empty folder. It gets its final name only when everything is written and checked.
            options: Settings.

        Returns:
            The bits of the weight files.

        Raises:
            ConfigurationError: the model has something that the format cannot hold.
        """

    @abstractmethod
    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        """Loads the folder back with the package that is meant to read it, and compares.

        Raises:
            CheckFailedError: it does not load, or is not what the run computes.
        """

    @abstractmethod
    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        """Which programs load it, and whether exactly."""

    def stored_bits(self, weight: ExportedWeight, run: PlannedRun) -> float:
        """Bits that a weight takes in the file, scales included: for the table and for the room on the disk."""
        return weight.bits(8 * run.scale_dtype.itemsize)

    def other_bytes(self, run: PlannedRun, count: int) -> int:
        """Bytes that the model's other parameters take, ``count`` of them: for the same two, before there is a file."""
        return count * run.dtype.itemsize

    def refuse_weights(self, run: PlannedRun) -> str | None:
        """The part of :meth:`refuse` that follows from schemes and shapes alone; the model may be without weights."""
        return None

    def stored_as(self, weight: ExportedWeight) -> str:
        """The file's own name for the type that a weight is stored in; empty for a format without types."""
        return ""

    def sizes(self, run: PlannedRun) -> FileSizes | None:
        """How large the weight files of a run become with other schemes; None for a format that does not say."""
        return None

    def why_no_choice(self, scheme: QuantScheme, in_features: int) -> str | None:
        """Why rows of a scheme are none to choose for a size, naming others; asked where :meth:`sizes` are known.

        A file may have no form for them that rounds nothing, or one alone that takes more bits than the scheme itself.
        """
        return None

    def remarks(self, run: PlannedRun) -> list[str]:
        """What a user should know before a run is trained for this format."""
        return []

    def weight_files(self, folder: Path) -> list[Path]:
        """The files that the ledger counts."""
        return sorted(folder.glob("*.safetensors"))
