"""lm-eval: tasks by name or from a file, and a model that is loaded already through them.

Tasks are found and their data is read before a model is loaded, so that what is out of reach is said at once.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.run.zero_shot import Measured, TaskResult
from lightning_gsq.system.hub import REACH, say_cached, without_waiting

SPLITS = ("training_split", "validation_split", "test_split")
"""Where a task says what its splits are called; the last of them that it has is asked."""
DATA_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
LARGEST_BATCH = 16
"""Sequences at once on a CPU: more are no faster there."""
LONGEST = 1024
"""Tokens of a question that the batch size of a CPU allows for; nearly all are far shorter."""


def check_installed() -> None:
    """Verifies that lm-eval is there.

    Raises:
        ConfigurationError: it is not; the message says how to install it.
    """
    if find_spec("lm_eval") is None:
        raise ConfigurationError('test needs lm-eval, which is not installed: pip install "lightning-gsq[eval]"')


def load_tasks(names: Sequence[str], task_data: str | None, trust_remote_code: bool) -> list[Any]:
    """The tasks, with their data.

    Args:
        names: Names of lm-eval's tasks and groups, or paths of task files.
        task_data: Folder with a folder of data files a task, for tasks whose data set is out of reach.
        trust_remote_code: Whether a task file may name Python functions.

    Returns:
        Tasks and groups as lm-eval makes them.

    Raises:
        ConfigurationError: there is no such task, its file cannot be read, or its data cannot be reached.
    """
    files = {name: Path(name).expanduser() for name in names if Path(name).suffix in (".yaml", ".yml")}
    manager = _manager(len(files) < len(names))
    specs: dict[str, Any] = {}
    for name in names:
        if name in files:
            specs[name] = _from_file(files[name], trust_remote_code)
            continue
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigurationError(f"tasks: lm-eval has no task {name!r}{hint}")
        specs[name] = name if task_data is None else _with_data(manager, name, Path(task_data).expanduser())
    return [_load(manager, name, spec, task_data) for name, spec in specs.items()]


@functools.cache
def _manager(defaults: bool) -> Any:
    """Knows tasks by name; lm-eval's own are 15,000, which takes ten seconds to read."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _load(manager: Any, name: str, spec: Any, task_data: str | None) -> Any:
    """A task with its data, taken from the cache of ``datasets`` where the hub does not answer."""
    local = not isinstance(spec, str) and "data_files" in (spec.get("dataset_kwargs") or {})
    with contextlib.nullcontext() if local else without_waiting() as silence:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                loaded = manager.load([spec])
        except Exception as error:  # datasets and lm-eval raise a dozen unrelated types
            reason = silence or " ".join(str(error).split())[:200] or type(error).__name__
            entry = manager.task_index.get(name)  # one of lm-eval's, also where its data is another's
            content = spec if entry is None else entry.cfg or {}
            raise _refusal(name, content, reason, silence is not None, task_data) from error
    if silence is not None:
        say_cached(f"the data of {name}", silence)
    return next(iter(loaded["groups"].values()), None) or next(iter(loaded["tasks"].values()))


def _refusal(
    name: str, config: Mapping[str, Any], reason: str, out_of_reach: bool, task_data: str | None
) -> ConfigurationError:
    """What is said of a task that cannot be loaded, with the way out."""
    path, by_name = config.get("dataset_path"), Path(name).suffix not in (".yaml", ".yml")
    what = f"tasks: the data set of {name}" + (f", {path}," if path else "")
    folder = task_data or "DATA"
    splits = ", ".join(f"{folder}/{name}/{split}.jsonl" for split in _splits(config))
    files = f"write its splits to {splits} (or .parquet) and give --task_data {folder}" if by_name and splits else ""
    if out_of_reach:
        ways = ", or ".join(way for way in (files, REACH) if way)
        return ConfigurationError(f"{what} is out of reach of this machine ({reason}); {ways}")
    if files:
        return ConfigurationError(f"{what} cannot be reached ({reason}); {files}")
    return ConfigurationError(f"tasks: {name} cannot be used: {reason}")


def _splits(config: Mapping[str, Any]) -> list[str]:
    return [str(config[key]) for key in SPLITS if config.get(key)]


def _from_file(file: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The task in a file; its data files are relative to its folder.

    Raises:
        ConfigurationError: it is none, or names Python functions that nobody allowed.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if not file.is_file():
        raise ConfigurationError(f"tasks: there is no file {file}")
    try:
        content: dict[str, Any] = load_yaml(file, resolve_func=False)  # refuses files that include each other
        if trust_remote_code:
            content = load_yaml(file, resolve_func=True)
        elif any("!function" in part.read_text("utf-8") for part in _parts(file)):
            raise ConfigurationError(
                f"tasks: {file} names Python functions (!function); if you trust them, give --trust_remote_code"
            )
    except ConfigurationError:
        raise
    except (OSError, ValueError, yaml.YAMLError, ImportError, AttributeError) as error:
        raise ConfigurationError(f"tasks: {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content.get("task"), str) or not content.get("dataset_path"):
        raise ConfigurationError(f"tasks: {file} is no task of lm-eval: it has no 'task' or no 'dataset_path'")
    options = dict(content.get("dataset_kwargs") or {})
    if "data_files" in options:
        options["data_files"] = _beside(file, options["data_files"])
        content["dataset_kwargs"] = options
    return content


def _parts(file: Path) -> list[Path]:
    """A task file and the files that it includes, those of these as well."""
    from lm_eval.tasks._yaml_loader import load_yaml

    included = load_yaml(file, resolve_func=False, recursive=False).get("include") or []
    others = [included] if isinstance(included, str) else included
    return [file, *(part for other in others for part in _parts(file.parent / other))]


def _beside(file: Path, files: Any) -> Any:
    """Names of data files, relative to a task file."""
    if isinstance(files, Mapping):
        return {split: _beside(file, data) for split, data in files.items()}
    if isinstance(files, list):
        return [_beside(file, data) for data in files]
    path = file.parent / Path(str(files)).expanduser()
    if not path.exists() and "*" not in str(files):
        raise ConfigurationError(f"tasks: {file} names the data file {files}, and there is no {path}")
    return str(path)


def _with_data(manager: Any, name: str, folder: Path) -> Any:
    """A task of lm-eval's with the data in a folder; as it is where the folder has none for it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder.is_dir():
        raise ConfigurationError(f"task_data: there is no folder {folder}")
    there = {file.stem: file for file in sorted((folder / name).glob("*")) if file.suffix in DATA_SUFFIXES}
    entry = manager.task_index[name]
    if not there or entry.yaml_path is None:
        return name
    content = load_yaml(entry.yaml_path, resolve_func=True)
    lacking = [split for split in _splits(content)[-1:] if split not in there]
    if lacking:
        raise ConfigurationError(f"task_data: {folder / name} has no file of the split {lacking[0]} (.jsonl, .parquet)")
    for key in (*SPLITS, "fewshot_split"):  # the others are for examples in the prompt
        if content.get(key) not in (None, *there):
            content.pop(key)
    kinds = {DATA_SUFFIXES[file.suffix] for file in there.values()}
    if len(kinds) > 1:
        raise ConfigurationError(f"task_data: {folder / name} holds files of several kinds: {', '.join(sorted(kinds))}")
    options = {"data_files": {split: str(file) for split, file in there.items()}}
    return {**content, "dataset_path": kinds.pop(), "dataset_name": None, "dataset_kwargs": options}


def measure(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int | None,
    seed: int,
) -> Measured:
    """What a model scores.

    Args:
        network: The model, where it is to run.
        tokenizer: Its tokenizer.
        tasks: Those of :func:`load_tasks`.
        num_fewshot: Examples before each question; None for what the task says.
        limit: Questions of each task; None for all.
        batch_size: Sequences at once; None for as many as memory allows.
        seed: Seed of the choice of examples.
    """
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.models.huggingface import HFLM

    size: int | str = batch_size or automatic_batch(network)
    # It asks git which commit the current folder is at, and git complains on the terminal where that is none.
    no_git = mock.patch.object(evaluator, "get_git_commit_hash", lambda: None)
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), no_git:
        model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=size, backend="causal")
        answers: Any = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=_manager(False),  # else it reads all of its own tasks again
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    results = {name: _result(name, answers) for name in answers["results"]}
    return Measured(
        {name: result for name, result in results.items() if result.metrics},
        f"lm-eval {version('lm-eval')}",
        limit,
        str(network.dtype).removeprefix("torch."),
    )


def automatic_batch(network: PreTrainedModel) -> int | str:
    """Sequences at once: on an accelerator lm-eval tries, on a CPU what a quarter of the free memory holds."""
    if network.device.type != "cpu":
        return "auto"
    vocabulary = network.config.get_text_config(decoder=True).vocab_size
    length = min(loading.max_length(network.config) or LONGEST, LONGEST)
    logits = 2 * 4 * vocabulary * length  # and their logarithms of probabilities
    return max(1, min(LARGEST_BATCH, int(psutil.virtual_memory().available / 4 / logits)))


def _result(name: str, answers: Mapping[str, Any]) -> TaskResult:
    figures: Mapping[str, Any] = answers["results"][name]
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in figures.items():
        metric, _, filter_ = str(key).partition(",")
        if metric.endswith("_stderr") or not filter_ or not isinstance(value, int | float):
            continue
        error = figures.get(f"{metric}_stderr,{filter_}")
        label = metric if filter_ == "none" else f"{metric} ({filter_})"
        metrics[label] = (float(value), float(error) if isinstance(error, int | float) else None)
    counted = answers.get("n-samples", {}).get(name, {})
    return TaskResult(metrics, counted.get("effective"), answers.get("n-shot", {}).get(name))
