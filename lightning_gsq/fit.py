"""What ``fit`` does, from checked settings to the summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from safetensors.torch import load_file, save

from lightning_gsq import loading, report
from lightning_gsq.callbacks import BlockProgress, HardRounding, QuantizationMonitor
from lightning_gsq.data import ActivationOptions, CalibrationDataModule, PerplexityData
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.command import check_possible, export_run
from lightning_gsq.export.formats import ExportFormat, ExportOptions, format_of
from lightning_gsq.export.source import FinishedRun, quantized_weights
from lightning_gsq.fingerprint import fingerprint, model_fingerprint
from lightning_gsq.ledger import Ledger, LedgerEntry
from lightning_gsq.modules import ModelQuantization
from lightning_gsq.pipeline import BlockPlan, BlockwiseRun, as_stored, installed, make_plan
from lightning_gsq.qtensor import BitsLedger, QuantizedTensor
from lightning_gsq.run_folder import RunFolder, write_atomically

BESIDE_THE_RECIPE: dict[str, set[str]] = {
    # settings that a resumed run may change, because they do not change its result
    "trainer": {
        "default_root_dir",
        "logger",
        "profiler",
        "log_every_n_steps",
        "enable_progress_bar",
        "enable_model_summary",
        "enable_checkpointing",
    },
    "model": {"phases"},
    "activations": {"memory_limit_gb", "folder"},
}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
WATCHERS = tuple(f"lightning_gsq.callbacks.{c.__name__}" for c in (BlockProgress, QuantizationMonitor, HardRounding))


def fit(
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
    activations: ActivationOptions,
    make_trainer: Callable[[], Trainer],
    make_evaluation_trainer: Callable[[], Trainer],
    settings: dict[str, Any],
    seed: int,
    console: Console,
    formats: Sequence[str] = (),
) -> dict[str, Any]:
    """Quantizes a model into a run folder, or goes on where an earlier start of the same run stopped.

    Args:
        model: The model, not loaded yet, and its settings.
        data: Calibration text.
        evaluation: Text for perplexity.
        activations: How hidden states are kept.
        make_trainer: Makes the Trainer of one block.
        make_evaluation_trainer: Makes a Trainer that only evaluates.
        settings: All resolved settings, for the recipe.
        seed: Seed of everything random.
        console: Where to print.
        formats: Formats to export the finished run to.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ConfigurationError: something asked for cannot be done; raised before any long work.
    """
    exports = [format_of(name) for name in dict.fromkeys(formats)]
    source = loading.resolve(model.pretrained, model.revision, model.trust_remote_code)
    limit = loading.max_length(loading.load_config(source))
    data.check(limit)
    evaluation.check(limit)
    trainer = make_trainer()
    _check_trainer(trainer)
    folder = RunFolder(trainer.default_root_dir)
    model.load(source)
    folder.check_room(_bytes_to_write(model))
    evaluation.tokenize(model.tokenizer)
    plan = make_plan(model)
    model.warm_start.check({f"{own.name}.{name}": what for own in plan for name, what in own.expected.items()})
    check_possible(exports, quantized_weights(plan))
    _calibrate(data, model, folder)
    recipe = _recipe(settings, seed, model, data, evaluation)
    folder.open_recipe(recipe)

    run = BlockwiseRun(model, data, plan, folder, make_trainer, activations, seed, console.print)
    windows = evaluation.val_dataloader()
    weights = sum(site.rows * site.in_features for own in plan for site in own.weights)
    console.print(
        f"{model.pretrained}: {len(plan)} blocks, {weights:,} weights to quantize ({model.scheme}), "
        f"{data.num_sequences} calibration sequences of {data.sequence_length} tokens, {trainer.precision}, "
        f"{run.device.type}",
        soft_wrap=True,
    )

    def perplexity(name: str, action: str) -> None:
        known = folder.progress.get("perplexity", {})
        if name not in known:
            began = time.perf_counter()
            # What is reported of the quantized model is what its files give: nothing more precise than they are.
            stored = contextlib.nullcontext() if name == "full_precision" else as_stored(model, plan)
            with stored:
                (result,) = make_evaluation_trainer().validate(model, windows, verbose=False)
            known = {**known, name: result["perplexity"]}
            folder.update_progress(perplexity=known)
            _add_seconds(folder, "evaluation", began)
            for logger in trainer.loggers:
                logger.log_metrics({f"perplexity/{name}": known[name]}, step=0)
                logger.save()
        console.print(f"perplexity {action}: {known[name]:.2f}")

    perplexity("full_precision", "of the full-precision model")
    if "init" in model.phases:
        _init_phase(run, folder, lambda: perplexity("warm_start", "after the warm start"))
    if "blocks" in model.phases:

        def finished(own: BlockPlan, seconds: float, measures: dict[str, float]) -> None:
            blocks = folder.progress.get("blocks", {})
            folder.update_progress(blocks={**blocks, str(own.index): {"seconds": seconds, **measures}})

        run.train_blocks(finished)
        perplexity("blocks", "after the blocks")
    kind = "block" if "blocks" in model.phases else "warm_start"
    tensors = [folder.read_block(kind, own.index, own.expected) for own in plan]
    if folder.progress.get("model") != kind:
        began = time.perf_counter()
        with installed(model, plan, tensors):
            loading.save_dense(model.network, model.tokenizer, folder.model, model.output_dtype)
        folder.update_progress(model=kind)
        _add_seconds(folder, "saving", began)

    files = [folder.block_file(kind, own.index) for own in plan]
    ledger = _ledger(model, plan, tensors, files)
    summary = _summary(model, source, folder, recipe, report.ledger_of(tensors), ledger, files)
    folder.write_summary(summary)
    report.print_summary(console, summary, str(folder.root))
    _export(FinishedRun(folder, recipe, summary, model, plan), exports, console)
    return folder.summary


def _export(run: FinishedRun, exports: list[ExportFormat], console: Console) -> None:
    """Exports the finished run, except to what an earlier start has exported already."""
    done = run.folder.progress.get("exports", {})
    for own in exports:
        folder = run.folder.root / "export" / own.name
        if done.get(own.name) != run.kind or not folder.is_dir():
            export_run(run, [own], folder.parent, ExportOptions(), check=True, console=console)
            done = {**done, own.name: run.kind}
            run.folder.update_progress(exports=done)


def _init_phase(run: BlockwiseRun, folder: RunFolder, perplexity: Callable[[], None]) -> None:
    """The warm start of the whole model, and what it is worth."""
    if "warm_start" in folder.progress.get("perplexity", {}):
        perplexity()
        return
    began = time.perf_counter()
    starts = run.warm_start()
    _add_seconds(folder, "warm_start", began)
    with installed(run.model, run.plan, starts):
        perplexity()


def _check_trainer(trainer: Trainer) -> None:
    if trainer.world_size > 1:
        raise ConfigurationError(
            f"trainer.devices: the block phase runs on one device in this version, got {trainer.world_size}; "
            "use --trainer.devices 1"
        )
    if trainer.precision not in PRECISIONS:
        raise ConfigurationError(
            f"trainer.precision: logits and scales train in 32 bits, got {trainer.precision}; use one of "
            f"{', '.join(PRECISIONS)}"
        )
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigurationError("trainer.max_epochs: -1 would train the first block for ever; give epochs or steps")


def _bytes_to_write(model: ModelQuantization) -> int:
    """Upper bound of what a run writes: the dense model, two sets of block files, logs."""
    parameters = sum(p.numel() for p in model.network.parameters())
    return int(parameters * (model.output_dtype.itemsize + 2 * 1.2)) + 50_000_000


def _calibrate(data: CalibrationDataModule, model: ModelQuantization, folder: RunFolder) -> None:
    """Tokenises the calibration text; text that the model writes itself is kept for a resumed run."""
    file = folder.root / "calibration.safetensors"
    if data.source.needs_model and file.exists():
        stored = load_file(file)
        data.train_ids_NT, data.validation_ids_NT = stored["train"].long(), stored["validation"].long()
        return
    data.tokenize(model.tokenizer, model.network)
    if data.source.needs_model:
        ids = {"train": data.train_ids_NT.int(), "validation": data.validation_ids_NT.int()}
        write_atomically(file, save(ids))


def _recipe(
    settings: dict[str, Any],
    seed: int,
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if key in {"config", "export"}:
            continue
        dropped = BESIDE_THE_RECIPE.get(key, set())
        kept[key] = {k: v for k, v in value.items() if k not in dropped} if isinstance(value, dict) else value
    callbacks = kept["trainer"].get("callbacks") or []
    kept["trainer"]["callbacks"] = [c for c in callbacks if c.get("class_path") not in WATCHERS]
    fingerprints = {
        "model": model_fingerprint(model.network),
        "calibration": fingerprint(data.train_ids_NT, data.validation_ids_NT),
        "evaluation": fingerprint(evaluation.ids_NT),
    }
    return {"seed": seed, "settings": kept, "fingerprints": fingerprints, "versions": report.versions()}


def _add_seconds(folder: RunFolder, part: str, began: float) -> None:
    seconds = folder.progress.get("seconds", {})
    folder.update_progress(seconds={**seconds, part: seconds.get(part, 0.0) + time.perf_counter() - began})


def _ledger(
    model: ModelQuantization, plan: list[BlockPlan], tensors: list[dict[str, QuantizedTensor]], files: list[Path]
) -> Ledger:
    """The bits of the block files, and of everything that is not quantized in the dtype of the saved model."""
    entries, headers = [], {}
    for own, weights, file in zip(plan, tensors, files, strict=True):
        stored = [
            LedgerEntry.packed(f"{own.name}.{name}", tensor.shape, tensor.scheme, 8 * tensor.scales_OG.element_size())
            for name, tensor in weights.items()
        ]
        entries += stored
        headers[file.name] = file.stat().st_size - sum(entry.bits for entry in stored) // 8
    quantized = {entry.name for entry in entries}
    entries += [
        LedgerEntry(name, p.numel(), unquantized=8 * model.output_dtype.itemsize * p.numel())
        for name, p in model.network.named_parameters()
        if name not in quantized
    ]
    return Ledger(tuple(entries), headers)


def _summary(
    model: ModelQuantization,
    source: loading.ModelSource,
    folder: RunFolder,
    recipe: dict[str, Any],
    bits: BitsLedger,
    ledger: Ledger,
    block_files: list[Path],
) -> dict[str, Any]:
    progress = folder.progress
    blocks = progress.get("blocks", {})
    seconds = [block["seconds"] for block in blocks.values()]
    parameters = sum(p.numel() for p in model.network.parameters())
    files = sum(file.stat().st_size for file in block_files)
    peak = max(progress.get("peak_memory_bytes", 0), report.peak_memory_bytes())
    folder.update_progress(peak_memory_bytes=peak)
    return {
        "perplexity": progress["perplexity"],
        "bits_per_weight": bits.per_weight(),
        "ledger": ledger.summary(),
        "bytes": {
            "original": loading.num_bytes(source, model.network),
            "dense": 2 * parameters,
            "quantized": ledger.num_bytes,
            "blocks": files,
        },
        "seconds": sum(progress.get("seconds", {}).values()) + sum(seconds),
        "seconds_per_block": sum(seconds) / max(1, len(seconds)),
        "seconds_of": {**progress.get("seconds", {}), "blocks": sum(seconds)},
        "peak_memory_bytes": peak,
        "scheme": {
            "name": str(model.scheme),
            "bits": model.scheme.bits,
            "group_size": model.scheme.group_size,
        },
        "blocks": blocks,
        "pretrained": model.pretrained,
        "seed": recipe["seed"],
        "versions": recipe["versions"],
        "torch_threads": torch.get_num_threads(),
    }
