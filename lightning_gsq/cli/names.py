"""Names of options: what other programs call ours, the nearest to one that does not exist; without the libraries."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from lightning_gsq.cli.verbs import SUMMARIES

ALIASES = {
    "batch_size": "data.batch_size",
    "bit": "model.scheme.bits",
    "bits": "model.scheme.bits",
    "calib": "data.source",
    "calib_data": "data.source",
    "calibration": "data.source",
    "cache_dir": "data.cache_folder",
    "calibration_dataset": "data.source",
    "dataset": "data.source",
    "device": "trainer.accelerator",
    "device_map": "trainer.accelerator",
    "devices": "trainer.devices",
    "dtype": "model.dtype",
    "epochs": "trainer.max_epochs",
    "eval_data": "evaluation.source",
    "eval": "evaluation.source",
    "export_format": "export",
    "format": "export",
    "formats": "export",
    "group_size": "model.scheme.group_size",
    "groupsize": "model.scheme.group_size",
    "ignore": "model.exclude",
    "iters": "trainer.max_steps",
    "learning_rate": "model.optimizer.lr",
    "logits_learning_rate": "end_to_end.code_learning_rate",
    "lr": "model.optimizer.lr",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_path": "model",
    "layer_config": "model.overrides",
    "n_samples": "data.num_sequences",
    "nbits": "model.scheme.bits",
    "nsamples": "data.num_sequences",
    "num_calibration_samples": "data.num_sequences",
    "num_samples": "data.num_sequences",
    "ngl": "trainer.accelerator",
    "gpu": "trainer.accelerator",
    "out": "trainer.default_root_dir",
    "output": "trainer.default_root_dir",
    "output_dir": "trainer.default_root_dir",
    "outfile": "trainer.default_root_dir",
    "outtype": "export",
    "recipe": "config",
    "save_dir": "trainer.default_root_dir",
    "seed": "seed_everything",
    "seq_len": "data.sequence_length",
    "seqlen": "data.sequence_length",
    "steps": "trainer.max_steps",
    "targets": "model.include",
    "torch_compile": "model.compile_blocks",
    "train_bs": "data.batch_size",
    "w_bits": "model.scheme.bits",
    "wbits": "model.scheme.bits",
}
"""What other programs call our options, by the last part of their names."""

VERBS = {
    "benchmark": "test",
    "chat": "predict",
    "convert": "export",
    "eval": "validate",
    "evaluate": "validate",
    "generate": "predict",
    "perplexity": "validate",
    "quantize": "fit",
    "run": "fit",
    "train": "fit",
}
"""What other programs call our verbs."""
FLAGS = ("--help", "--help.all", "--print_config")
"""Options without a value, of verbs whose others take one each."""


def unknown_verb(word: str) -> str | None:
    """What is wrong with the first word of a command line; None for a verb, and for an option."""
    if word in SUMMARIES or word.startswith("-"):
        return None
    near = difflib.get_close_matches(word, {*SUMMARIES, *VERBS}, n=1, cutoff=0.6)
    hint = f"; did you mean {VERBS.get(near[0], near[0])}?" if near else "; a verb comes first, then the model."
    return f"there is no verb {word!r}{hint} The verbs are {', '.join(SUMMARIES)} (python -m lightning_gsq --help)"


def unknown_option(arguments: list[str], options: Collection[str]) -> str | None:
    """What is wrong with an option that the verb certainly does not have, before the libraries are loaded.

    Args:
        arguments: The command line without the program's name.
        options: Names of the options that the verb takes, without dashes; none where they are not known.
    """
    groups = {option.partition(".")[0] for option in options}
    rest = iter(arguments[1:])
    for argument in rest:
        name, sign, _ = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            continue
        group, dot, _ = name.partition(".")
        known = any(part.startswith(group.rstrip("+")) for part in groups)
        if groups and not (known and (not dot or any(option.startswith(f"{group}.") for option in options))):
            return f"{no_option(name, options)} (python -m lightning_gsq {arguments[0]} --help)"
        if "model.pretrained" in options and not sign and argument not in FLAGS:
            next(rest, None)
    return None


def no_option(name: str, options: Collection[str]) -> str:
    """That there is no such option, and which one may be meant."""
    near = nearest(name, options)
    return f"there is no option --{name}" + (f"; did you mean --{near}?" if near else "")


def in_full(message: str, options: Collection[str]) -> str:
    """A message that begins with an argument's own name, with that of the option: ``bits must be`` ...

    Args:
        message: Of a class, which does not know of which option it is the value.
        options: Names of the options that the verb takes, without dashes.
    """
    name = re.match(r"(\w+)(?=:| must be|=)", message)
    full = [option for option in options if name and option.rpartition(".")[2] == name[1]]
    return full[0] + message[len(full[0].rpartition(".")[2]) :] if len(full) == 1 else message


def nearest(name: str, options: Collection[str]) -> str | None:
    """The option that somebody who types this name means, if any is near: its last part decides."""
    last = name.rsplit(".", 1)[-1].replace("-", "_").lower()
    known = {other: option for other, option in ALIASES.items() if _is_there(option, options)}
    if last in known and name not in options:
        return known[last]
    lasts = {option: option.rsplit(".", 1)[-1] for option in sorted(options)}
    same = [option for option, own in lasts.items() if own == last]
    if same:
        return max(same, key=lambda option: (_similarity(name, option), -len(option)))
    near = difflib.get_close_matches(last, {*lasts.values(), *known}, n=1, cutoff=0.7)
    if near and near[0] in known:
        return known[near[0]]
    if near:
        return max((o for o, own in lasts.items() if own == near[0]), key=lambda o: (_similarity(name, o), -len(o)))
    above = name.rpartition(".")[0]
    return above if "." in above and above in options else None


def _is_there(option: str, options: Collection[str]) -> bool:
    """Whether there is such an option, or one whose value is a class that has it."""
    return option in options or ("." in option.rpartition(".")[0] and option.rpartition(".")[0] in options)


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
