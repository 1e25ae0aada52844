"""What ``export`` does, from a run folder to folders that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import ExportOptions, format_of, open_run
from lightning_gsq.export.engine import Exported, export_run
from lightning_gsq.export.hub import check_name, push
from lightning_gsq.export.preflight import describe, folder_obstacle
from lightning_gsq.system.console import make_console
from lightning_gsq.system.progress_bars import no_foreign_bars


def export(
    run: str,
    format: list[str],
    output: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    trust_remote_code: bool = False,
    shard_size_gb: float = 5.0,
    gguf_embedding: Literal["F16", "Q8_0"] | None = None,
    gguf_projection: Literal["Q4_0", "Q5_0", "Q8_0"] = "Q8_0",
    push_to_hub: str | None = None,
    private: bool = True,
    console: Console | None = None,
) -> dict[str, Path]:
    """Writes a finished run as files that other programs load.

    Args:
        run: The run folder.
        format: Formats to write, such as native, gguf, mlx, compressed-tensors, gptq or dequantized; several joined by
            commas.
        output: Folder to write to, one inside it for each format; by default the folder export of the run.
        overwrite: Replace earlier exports; a folder that holds anything else is left alone.
        check: Load each folder back with the package that reads it, and compare weights, logits, text and perplexity.
        trust_remote_code: Run Python code that comes with the original model. Never taken from the run's recipe.
        shard_size_gb: Size in GB after which a new weight file begins.
        gguf_embedding: Type of embedding and head in a GGUF file; null for that of the GGUF file that the run started
            from, or F16.
        gguf_projection: Type that a GGUF file rounds those matrices to that no block type holds exactly.
        push_to_hub: Name of a repository on the Hugging Face hub to upload to; several formats need {format} in it.
        private: Whether a new repository is private.
        console: Where to print.

    Returns:
        The folder of each format.

    Raises:
        ConfigurationError: nothing that was asked for can be done; raised before anything is written.
        WorkFailedError: some formats could not be written; the others were.
    """
    console = console or make_console()
    chosen = [format_of(name) for name in dict.fromkeys(format)]
    if not chosen:
        raise ConfigurationError("format: name at least one, such as --format native")
    if shard_size_gb <= 0:
        raise ConfigurationError(f"shard_size_gb must be positive, got {shard_size_gb}")
    if push_to_hub is not None:
        check_name(push_to_hub, len(chosen))
    root = Path(output).expanduser() if output else Path(run).expanduser() / "export"
    # Before a model is loaded, which may take minutes.
    blocked = {format_.name: folder_obstacle(root / format_.name, overwrite) for format_ in chosen}
    if all(blocked.values()):
        raise ConfigurationError(describe({name: str(reason) for name, reason in blocked.items()}))
    if trust_remote_code:
        console.print(f"--trust_remote_code: running Python code that comes with the model of {run}", soft_wrap=True)
    with no_foreign_bars():
        opened = open_run(run, trust_remote_code)
    options = ExportOptions(int(shard_size_gb * 1e9), gguf_embedding, gguf_projection)
    exported = export_run(opened, chosen, root, options, check, overwrite, console)
    if push_to_hub is not None:
        _upload(exported, push_to_hub, private, console)
    exported.verify()
    return exported.folders


def _upload(exported: Exported, name: str, private: bool, console: Console) -> None:
    """Uploads what was written; what the hub does not take is a failure among the others."""
    for format_name, folder in exported.folders.items():
        try:
            address = push(folder, name.format(format=format_name), private)
        except ConfigurationError as error:
            exported.failures[format_name] = str(error)
        else:
            console.print(f"uploaded to {address}", soft_wrap=True)
