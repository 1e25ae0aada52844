"""The model card of an exported folder: what it is, how it was made, what it costs, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import yaml

from lightning_gsq.export.contract import CheckReport, ExportFormat
from lightning_gsq.export.folders import MARK
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.run.report import PERPLEXITY_NAMES, about_text, megabytes
from lightning_gsq.run.standard_errors import with_error
from lightning_gsq.run.zero_shot import rows
from lightning_gsq.system.owned_folders import replace_file
from lightning_gsq.weights.ledger import PARTS, Ledger

PART_NOTES = {
    "codes": "levels of the quantized weights",
    "scales": "one a group",
    "positions": "where single weights lie",
    "padding": "fills rows or blocks up",
    "unquantized": "everything else, such as norms",
}
NAME_ON_HUB = r"[\w.-]+/[\w.-]+"
ARXIV = "2604.18556"
INSTALL = """`pip install lightning-gsq`, and `import lightning_gsq` before transformers loads it.
"""


def model_card(run: FinishedRun, format_: ExportFormat, ledger: Ledger, report: CheckReport | None) -> str:
    """The text of ``README.md``.

    Args:
        run: The run.
        format_: The format of the folder.
        ledger: Its bits.
        report: What loading it back showed; None if that was not done.
    """
    weights, loader = list(run.weights.values()), run.auto_class.__name__
    schemes = sorted({str(weight.scheme) for weight in weights})
    name = as_text(_base_name(run.address))
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(run, schemes), sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}, {' and '.join(schemes)}\n",
        f"{len(weights)} weight matrices of [{name}](#how-it-was-made) quantized with "
        f"[lightning-gsq](https://arxiv.org/abs/{ARXIV}), in the `{format_.name}` format.\n",
        "## How to load it\n",
        *([INSTALL] if format_.name == "native" else []),
        _table(
            ("runtime", "weights", "how"),
            [
                (
                    runtime.name,
                    runtime.exactness,
                    f"`{runtime.usage.format(folder='FOLDER', auto_class=loader)}`",
                )
                for runtime in format_.runtimes(weights)
            ],
        ),
        "## Perplexity\n",
        _perplexity(run.summary),
        *([zero_shot_section(run.summary["zero_shot"])] if "zero_shot" in run.summary else []),
        "## How it was made\n",
        _table(("", ""), _making(run)),
        *_command(run),
        "## Size\n",
        _ledger_table(ledger),
        "![where the bytes go](ledger.png)\n",
    ]
    if run.recipe.get("choice") is not None:
        parts.append(_widths(run))
    if report is not None:
        parts.append(f"## Checked\n\n{as_text(report.describe())}\n")
    return "\n".join(parts)


def _widths(run: FinishedRun) -> str:
    choice = run.recipe["choice"]
    return (
        f"## Widths\n\nChosen so that a {as_text(str(choice['runtime']))} file has at most "
        f"{as_text(str(choice['size']))}: {choice['num_bytes']:,} of {choice['limit']:,} bytes.\n\n"
        "![width of each matrix over depth, and where the bytes go](widths.png)\n"
    )


def _front_matter(run: FinishedRun, schemes: list[str]) -> dict[str, Any]:
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if re.fullmatch(NAME_ON_HUB, run.address):
        matter |= {"base_model": run.address, "base_model_relation": "quantized"}
    source = _settings(run, "data").get("source")
    dataset = str((source.get("init_args") or {}).get("path", "")) if isinstance(source, Mapping) else ""
    if _class_name(source) == "HuggingFaceDataset" and re.fullmatch(NAME_ON_HUB, dataset):
        matter["datasets"] = [dataset]
    licence = licence_of(run)
    if licence is not None:
        matter["license"] = licence
    bits = sorted({str(weight.scheme.bits) for weight in run.weights.values() if weight.block is not None})
    matter["tags"] = ["lightning-gsq", "gsq", "quantized", *(b if b == "ternary" else f"{b}-bit" for b in bits)]
    matter["quantization"] = {
        "method": "GSQ" if run.kind != "warm_start" else _class_name(_settings(run, "model").get("warm_start")),
        "scheme": schemes,
        "scale_dtype": str(run.scale_dtype).removeprefix("torch."),
    }
    return matter


def licence_of(run: FinishedRun) -> str | None:
    """What the original model's card, or its GGUF file, says of its licence; None where it says nothing plain."""
    source = run.model.address.source(need_weights=False)
    said: Any = None
    card = Path(source.path) / "README.md"
    if source.gguf_file and source.files:
        field = GGUFFile(source.files[0]).fields.get("general.license")
        said = None if field is None else field.value
    elif card.is_file():
        _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
        with suppress(yaml.YAMLError):
            front = yaml.safe_load(rest.partition("\n---")[0])
            said = front.get("license") if isinstance(front, Mapping) else None
    return said if isinstance(said, str) and re.fullmatch(r"[\w.-]+", said) else None


def without_folders(command: str) -> str:
    """A command line whose absolute paths are shortened to their names: the folders are those of another machine."""
    return re.sub(r"(?<![\w.:/-])[/~][^\s'\"]*/(?=[^\s'\"/]+)", "", command)


def _making(run: FinishedRun) -> list[tuple[str, str]]:
    model, data = _settings(run, "model"), _settings(run, "data")
    start = _class_name(model.get("warm_start"))
    rows = [
        ("original model", as_code(run.address)),
        ("method", f"GSQ from {as_text(start)}" if run.kind != "warm_start" else as_text(start)),
        ("scheme", ", ".join(sorted({str(weight.scheme) for weight in run.weights.values()}))),
        ("scales", str(run.scale_dtype).removeprefix("torch.")),
        ("not quantized", str(run.dtype).removeprefix("torch.")),
    ]
    if data:
        rows.append(
            (
                "calibration",
                f"{data.get('num_sequences')} sequences of {data.get('sequence_length')} tokens, "
                f"{as_text(_text_name(data.get('source')))}",
            )
        )
    versions = run.recipe.get("versions", {})
    rows.append(("versions", as_code(", ".join(f"{name} {number}" for name, number in versions.items()))))
    rows.append(("everything else", "`recipe.yaml`"))
    return rows


def _command(run: FinishedRun) -> list[str]:
    """The command that made it, to be copied: an indented line, out of which no character of it leads."""
    command = run.recipe.get("command")
    return [f"    {' '.join(without_folders(command).split())}\n"] if isinstance(command, str) else []


def _perplexity(summary: Mapping[str, Any]) -> str:
    measured = summary.get("perplexity")
    errors = summary.get("perplexity_error", {})
    rows = [
        (PERPLEXITY_NAMES.get(key, as_text(str(key))), with_error(value, errors.get(key), 3))
        for key, value in (measured.items() if isinstance(measured, Mapping) else ())
        if isinstance(value, float)
    ]
    if not rows:
        return "Not measured.\n"
    about = summary.get("evaluation")
    if not isinstance(about, Mapping):
        return _table(("", "perplexity"), rows)
    spread = " ± standard error over the windows" if errors else ""
    note = f"On {as_text(about_text(about))}{spread}; digest of the tokens {as_text(str(about['digest']))}."
    return _table(("", "perplexity"), rows) + f"\n{note}\n"


ZERO_SHOT = "## Zero-shot\n"


def zero_shot_section(content: Mapping[str, Any]) -> str:
    """What tasks gave, as :func:`lightning_gsq.run.zero_shot.entry` keeps it."""
    against = content.get("against")
    head: tuple[str, ...] = ("task", "metric", "questions", as_text(PurePath(content["model"]).name))
    lines: list[tuple[str, ...]] = [tuple(map(as_text, row)) for row in rows(content)]
    if against is None:
        lines = [line[:-1] for line in lines]
    else:
        head = (*head, as_text(PurePath(against["model"]).name))
    part = "" if content["limit"] is None else f", the first {content['limit']} questions of each task"
    note = f"{as_text(content['harness'])}, {as_text(content['dtype'])}, value ± standard error{part}."
    return f"{ZERO_SHOT}\n{_table(head, lines)}\n{note}\n"


def put_zero_shot(folder: Path, content: Mapping[str, Any]) -> None:
    """Puts what tasks gave into the card of an exported folder, in place of what they gave before."""
    folder = folder if folder.is_dir() else folder.parent
    card = (folder / "README.md").read_text(encoding="utf-8")
    others = [part for part in re.split(r"(?m)^(?=## )", card) if not part.startswith(ZERO_SHOT)]
    place = next((n for n, part in enumerate(others) if part.startswith("## How it was made")), len(others))
    text = "".join([*others[:place], zero_shot_section(content) + "\n", *others[place:]])
    replace_file(folder, MARK, "README.md", text.encode())


def _ledger_table(ledger: Ledger) -> str:
    sums = ledger.summary()
    rows = [
        (part, f"{ledger.total(part) / 8:,.0f}", PART_NOTES.get(part, "")) for part in PARTS if ledger.total(part) > 0
    ]
    rows.append(
        ("headers", f"{sums['bytes']['headers']:,}", ", ".join(f"{k}: {v:,}" for k, v in ledger.headers.items()))
    )
    rows.append(("**weight files**", f"**{ledger.num_bytes:,}**", megabytes(ledger.num_bytes)))
    per_weight = (
        f"{sums['bits_per_quantized_weight']:.4f} bits per quantized weight (everything stored for it), "
        if sums["quantized_weights"]
        else ""
    )
    return (
        _table(("part", "bytes", ""), rows)
        + f"\n{per_weight}{sums['bits_per_parameter']:.4f} bits per parameter over the whole model. `ledger.json` "
        "lists every parameter.\n"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def as_text(value: str) -> str:
    """A string as a line of Markdown that shows exactly its characters: no markup, no HTML, no link, no new line."""
    line = " ".join(value.split())
    text = re.sub(r"([\\`*_{}\[\]()#+!|~<>&@])", lambda match: f"&#{ord(match[1])};", line)
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")


def as_code(value: str) -> str:
    """A string as code in a line of Markdown if it is a plain name or path, otherwise as text."""
    return f"`{value}`" if re.fullmatch(r"[\w./:+, -]+", value) else as_text(value)


def _settings(run: FinishedRun, group: str) -> Mapping[str, Any]:
    return run.recipe.get("settings", {}).get(group) or {}


def _class_name(setting: Any) -> str:
    path = setting.get("class_path", "") if isinstance(setting, Mapping) else str(setting or "")
    return path.rpartition(".")[2] or "its warm start"


def _text_name(source: Any) -> str:
    """What the calibration text is, without the folders of the machine that it was on."""
    if not isinstance(source, Mapping):
        return str(source)
    path = str((source.get("init_args") or {}).get("path", ""))
    return f"{_class_name(source)} {PurePath(path).name}".strip()


def _base_name(address: str) -> str:
    return PurePath(address).name.removesuffix(".gguf")
