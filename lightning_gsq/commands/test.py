"""What ``test`` does: zero-shot tasks of lm-eval, with any model that can be loaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_gsq.commands.addresses import run_of, written_model
from lightning_gsq.commands.harness import check_installed, load_tasks, measure
from lightning_gsq.commands.predict import device_of
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.card import put_zero_shot
from lightning_gsq.models import loading
from lightning_gsq.run import zero_shot
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.zero_shot import Measured
from lightning_gsq.system.console import make_console


def test(
    model: str,
    tasks: list[str],
    against: str | None = None,
    task_data: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    dtype: loading.Dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures a model on tasks of lm-eval, and keeps the result in the run that it belongs to.

    Args:
        model: Run folder, exported folder, GGUF file, or any model that fit takes.
        tasks: Names of lm-eval's tasks and groups, such as arc_easy,piqa, or task files (.yaml); several at once.
        against: Another model to measure beside it, such as the original.
        task_data: Folder with the data of tasks whose data set is out of reach: TASK/SPLIT.jsonl or .parquet.
        num_fewshot: Examples before each question; null for what the task says, which is 0 for most.
        limit: Ask only the first so many questions of each task; null for all.
        batch_size: Sequences at once; null for as many as memory allows.
        seed: Seed of the choice of examples.
        dtype: Dtype of the arithmetic; "auto" for that of the model's files.
        device: Where to run, such as cpu or cuda:1; by default the GPU if there is one.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with the model or with a task file.
        console: Where to print.

    Returns:
        The result as it is kept: ``tasks`` with value and standard error of each metric, and ``against`` likewise.

    Raises:
        ConfigurationError: a task or its data, the model or lm-eval itself is not there, or an option is out of range.
    """
    console = console or make_console()
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ConfigurationError(f"{name} must be at least {least}, got {value}")
    check_installed()
    place, run = device_of(device), run_of(model)
    addresses = [model] if against is None else [model, against]
    sources = [loading.resolve(written_model(address), revision, trust_remote_code) for address in addresses]
    chosen = load_tasks(list(dict.fromkeys(tasks)), task_data, trust_remote_code)
    measured: list[Measured] = []
    for address, source in zip(addresses, sources, strict=True):
        began = time.perf_counter()
        tokenizer = loading.load_tokenizer(source)
        network = loading.load_model(source, dtype, quantized=True)
        nn.Module.to(network, place)
        measured.append(measure(network, tokenizer, chosen, num_fewshot, limit, batch_size, seed))
        console.print(f"{address}: {time.perf_counter() - began:.0f} s", soft_wrap=True)
        del network
        if place.type == "cuda":
            torch.cuda.empty_cache()
    content = zero_shot.entry(measured[0], model, measured[1] if against else None, against)
    console.print(_table(content))
    console.print(_about(measured[0]), soft_wrap=True)
    if run is not None:
        folder, export = run
        zero_shot.record(RunFolder(folder, create=False), content, export)
        if export is not None:
            put_zero_shot(Path(model).expanduser(), content)
        places = f"{folder / 'summary.json'}" + (f" and {Path(model) / 'README.md'}" if export else "")
        console.print(f"kept in {places}", soft_wrap=True)
    return content


def _table(content: dict[str, Any]) -> Table:
    table = Table("task", "metric", "questions", content["model"])
    if "against" in content:
        table.add_column(content["against"]["model"])
    for row in zero_shot.rows(content):
        table.add_row(*(row if "against" in content else row[:-1]))
    return table


def _about(measured: Measured) -> str:
    part = "" if measured.limit is None else f"; only the first {measured.limit} questions of each task"
    return f"{measured.harness}, {measured.dtype}, value ± standard error{part}"
