"""The short help: the options that people use first, each with its explanation and default."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_gsq.cli.configs import DEFAULTS, packaged_configs

COMMON = {
    "fit": (
        "model.scheme",
        "model.scheme.bits",
        "model.scheme.group_size",
        "model.scheme.budget",
        "model.size",
        "model.embedding",
        "model.blocks",
        "model.warm_start",
        "model.phases",
        "model.exclude",
        "model.overrides",
        "model.optimizer",
        "trainer.default_root_dir",
        "trainer.max_epochs",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.callbacks",
        "data.source",
        "data.sequence_length",
        "data.num_sequences",
        "data.batch_size",
        "evaluation.source",
        "evaluation.sequence_length",
        "evaluation.num_windows",
        "end_to_end.max_steps",
        "export",
        "config",
        "seed_everything",
    ),
    "validate": (
        "against",
        "evaluation.source",
        "evaluation.sequence_length",
        "evaluation.num_windows",
        "evaluation.by_block",
        "model.dtype",
        "model.revision",
        "model.trust_remote_code",
        "trainer.accelerator",
        "trainer.devices",
        "config",
    ),
}
COMMON["plan"] = ("probe", "host_memory_gb", "device_memory_gb", *COMMON["fit"][:-3])
TEXTS = {
    "config": "A YAML file of settings, a run's recipe.yaml, or one of the package's by its name "
    f"({', '.join(name for name in packaged_configs() if name != Path(DEFAULTS).stem)}); options on the command line "
    "win.",
    "data.source": "Text to calibrate on: a file or folder by its path (--data corpus.txt), organisation/name for a "
    "data set of the hub, or one of PythonDocumentation, ModelSamples, Mixture.",
    "evaluation.source": "Text to measure perplexity on, given like --data; PythonDocumentation is then the tenth that "
    "calibration leaves out. WikiText's raw files need --evaluation.source.rows true.",
    "evaluation.num_windows": "Windows of so many tokens to use, from the beginning; null for all.",
    "export": "Formats to export the finished run to, into its folder export, as the verb export does: gguf, native, "
    "mlx, compressed-tensors, gptq, dequantized; several joined by commas.",
    "model.exclude": "Patterns of weights to leave in full precision, joined by commas: *.down_proj,*layers.0.*",
    "model.overrides": "Another scheme for the weights that a pattern names: {'*.down_proj': {bits: 4}} or "
    "{'*.down_proj': q6_k}.",
    "model.scheme": "A scheme by name, in place of bits and group size: w3g64 (3 bits, groups of 64), q4_k, iq4_nl, "
    "mlx4g64 and others; docs/schemes.md lists them. file: every weight as --model.warm_start.file has it, mixed types "
    "included.",
    "seed_everything": "Seed of everything random.",
    "trainer.default_root_dir": "The run folder. The same command resumes what it holds.",
    "trainer.max_epochs": "Passes over the calibration sequences, for each block.",
    "trainer.accelerator": "cpu, gpu, or auto for the GPU if there is one.",
    "trainer.devices": "How many devices, or which: 2, 0,1 or auto.",
    "trainer.callbacks": "Adds a callback to those of the recipe, by name or path.",
}
"""Explanations of options whose own speak of something else."""
WIDTH = 100


def common_help(parser: ArgumentParser, names: tuple[str, ...]) -> str:
    """Usage and the options of these names."""
    defaults = parser.get_defaults()
    lines = [f"usage: {parser.prog} MODEL [options]", "", parser.description or "", "", "options:"]
    actions = {action.dest: action for action in parser._actions}
    for name in names:
        lines += [f"  --{name}", *_explained(actions[name], name, defaults.get(name))]
    lines += ["", f"every option, in groups: {parser.prog} --help.all"]
    return "\n".join(lines) + "\n"


def _explained(action: Any, name: str, default: Any) -> list[str]:
    text = TEXTS.get(name) or action.help or ""
    text = " ".join(text.split())
    shown = _shown(default)
    if shown:
        text += f" (default: {shown})"
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _shown(default: Any) -> str:
    """A default as it is typed: classes by their names."""
    if default is None or default in ([], {}) or (isinstance(default, Namespace) and "class_path" not in default):
        return ""
    if isinstance(default, list):
        return ", ".join(_shown(part) for part in default)
    path = getattr(default, "class_path", None)
    if path is not None:
        return str(path).rsplit(".", 1)[-1]
    return str(default).lower() if isinstance(default, bool) else str(default)
