"""Which embedding a GGUF file gets where nobody asked for one (``model.embedding auto``): the run's, or another.

A run gives an embedding 8 bits by itself. The file that its model came from may hold it in fewer (Q6_K, Q4_K ...), and
codes of codes lose something and make the file larger: then the file's own bytes stay. ``gguf_embedding`` asks for a
type of its own; of an embedding that the run was asked to quantize it is refused.
"""

from __future__ import annotations

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import ExportOptions, Run
from lightning_gsq.export.formats.gguf_storage import F16, F32, Storage, source_file
from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.layout import EMBEDDINGS
from lightning_gsq.models.ends import find_ends

BF16 = 30
"""ggml's number of bfloat16."""


def with_its_embedding(run: Run, options: ExportOptions) -> Run:
    """The run without a quantized embedding that nobody asked for, where the file gets another one.

    Args:
        run: The run.
        options: Settings of the export.
    """
    name = _automatic(run)
    if name is None or not (options.gguf_embedding is not None or _is_smaller(run, name)):
        return run
    return run.without([name])


def refuse_asked_for(run: PlannedRun, options: ExportOptions) -> None:
    """Refuses a type for what the run was asked to quantize.

    Raises:
        ConfigurationError: there is such a type, and such a matrix.
    """
    if run.outer and options.gguf_embedding is not None:
        raise ConfigurationError(
            f"gguf_embedding: the run quantized {' and '.join(run.outer)}, which the file stores as they are; got "
            f"{options.gguf_embedding}, leave it out"
        )


def _automatic(run: PlannedRun) -> str | None:
    """Name of an embedding with the scheme that it has by itself, and with the scales that rounding gave it."""
    options, name = run.model.outer, find_ends(run.network).embedding
    if not options.automatic or options.embedding is None or name not in run.outer:
        return None
    if run.weights[name].scheme != options.embedding or _trained(run):
        return None
    return name


def _trained(run: PlannedRun) -> bool:
    """Whether the end-to-end phase trained the embedding's scales."""
    dense = run.folder.read_dense(run.kind) if isinstance(run, FinishedRun) and run.kind == "end_to_end" else None
    return dense is not None and "embedding" in ((dense[1].get("settings") or {}).get("train") or ())


def _is_smaller(run: PlannedRun, name: str) -> bool:
    """Whether the file that the model came from holds the embedding in fewer bits than the run."""
    try:
        source: GGUFFile | None = source_file(run)
    except ConfigurationError:  # which the format itself refuses
        return False
    stored = None if source is None else source.tensors.get(EMBEDDINGS[0])
    if stored is None or stored.number in (F32, F16, BF16):
        return False
    weight = run.weights[name]
    own = Storage.of(weight.scheme, weight.site.in_features, "Q8_0")
    return 8 * stored.num_bytes < own.bits * weight.count
