"""Zero-shot results: what was measured, as plain data, and where it is kept: summary, TensorBoard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.saving import MARK
from lightning_gsq.system.owned_folders import read_mark


@dataclass(frozen=True)
class TaskResult:
    """What a model scored in one task.

    Args:
        metrics: Value and standard error of each metric, by its name; None where the task gives no error.
        documents: Questions that were asked.
        num_fewshot: Examples before each.
    """

    metrics: Mapping[str, tuple[float, float | None]]
    documents: int | None = None
    num_fewshot: int | None = None


@dataclass(frozen=True)
class Measured:
    """What a model scored.

    Args:
        tasks: By name.
        harness: What measured it, with its version.
        limit: Questions of each task; None for all.
        dtype: Dtype of the arithmetic.
    """

    tasks: Mapping[str, TaskResult]
    harness: str
    limit: int | None
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


Row = tuple[str, str, str, str, str]


def rows(content: Mapping[str, Any]) -> Iterator[Row]:
    """Task, metric, questions, value and reference of an entry as :func:`record` keeps it, for tables."""
    reference = ((content.get("against") or {}).get("tasks") or {}) if isinstance(content, Mapping) else {}
    for name, task in content["tasks"].items():
        asked = "" if task["documents"] is None else f"{task['documents']:,}"
        if task["num_fewshot"]:
            asked += f", {task['num_fewshot']} examples each"
        for metric, pair in task["metrics"].items():
            other = reference.get(name, {}).get("metrics", {}).get(metric)
            yield name, metric, asked, shown(pair), "" if other is None else shown(other)


def shown(pair: tuple[float, float | None]) -> str:
    """A value with its standard error."""
    value, error = pair
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def entry(measured: Measured, model: str, against: Measured | None, reference: str | None) -> dict[str, Any]:
    """What is kept of a measurement.

    Args:
        measured: It.
        model: Address of the model.
        against: The same of a model to compare with.
        reference: That one's address.
    """
    content = {"model": model, **measured.as_dict()}
    if against is not None:
        content["against"] = {"model": reference, **against.as_dict()}
    return content


def made_from(folder: RunFolder) -> str | None:
    """Digest of what the model in a run folder was made from, as its mark says."""
    mark = read_mark(folder.model, MARK)
    return None if mark is None else mark.get("made_from")


def record(folder: RunFolder, content: Mapping[str, Any], export: str | None) -> None:
    """Keeps a measurement in the summary of a run, and shows it in TensorBoard.

    Args:
        folder: The run folder.
        content: The measurement.
        export: The exported format that was measured; None for the run's own model.
    """
    summary = folder.summary
    if export is None:
        summary["zero_shot"] = {**content, "made_from": made_from(folder)}
    elif export in summary.get("exports", {}):
        summary["exports"][export]["zero_shot"] = dict(content)
    folder.write_summary(summary)
    prefix = "zero_shot" if export is None else f"zero_shot_{export}"
    writer = SummaryWriter(str(Path(folder.root) / "tensorboard"))
    for name, task in content["tasks"].items():
        for metric, (value, _) in task["metrics"].items():
            writer.add_scalar(f"{prefix}/{name}/{metric.replace(' ', '_')}", value, 0)
    writer.close()
