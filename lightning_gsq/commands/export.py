"""What ``export`` does, from a run folder to folders that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import ExportOptions, format_of, open_run
from lightning_gsq.export.engine import check_free, export_run
from lightning_gsq.export.hub import check_name, push
from lightning_gsq.system.console import make_console


def export(
    run: str,
    format: list[str],
    output: str | None = None,
    overwrite: bool = False,
    check: bool = True,
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
        format: Formats to write, such as native, dequantized, compressed-tensors, gptq or gguf; several at once.
        output: Folder to write to, one inside it for each format; by default the folder export of the run.
        overwrite: Replace folders that are there already.
        check: Load each folder back with the package that reads it, and compare weights, logits, text and perplexity.
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
        ConfigurationError: something asked for cannot be done; raised before anything is written.
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
    for format_ in chosen:
        if not overwrite:
            check_free(root / format_.name)
    opened = open_run(run)
    options = ExportOptions(int(shard_size_gb * 1e9), gguf_embedding, gguf_projection)
    folders = export_run(opened, chosen, root, options, check, console)
    if push_to_hub is not None:
        for name, folder in folders.items():
            console.print(f"uploaded to {push(folder, push_to_hub.format(format=name), private)}", soft_wrap=True)
    return folders
