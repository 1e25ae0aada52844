"""What ``fit`` does, from checked settings to the summary."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_gsq import loading, report
from lightning_gsq.callbacks import BlockProgress, HardRounding, QuantizationMonitor
from lightning_gsq.data import ActivationOptions, CalibrationDataModule, PerplexityData
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.modules import ModelQuantization
from lightning_gsq.pipeline import BlockPlan, BlockwiseRun, installed, make_plan
from lightning_gsq.qtensor import BitsLedger
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
SALIENCY = "lightning_gsq.callbacks.SaliencyThreshold"
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

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ConfigurationError: something asked for cannot be done; raised before any long work.
    """
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
    _calibrate(data, model, folder)
    mixed = any(scheme.mixed for own in plan for scheme in own.weights.values())
    recipe = _recipe(settings, seed, model, data, evaluation, mixed)
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

    summary = _summary(
        model,
        source,
        folder,
        recipe,
        report.ledger_of(tensors),
        report.saliency_of({own.name: block for own, block in zip(plan, tensors, strict=True)}),
        [folder.block_file(kind, own.index) for own in plan],
    )
    folder.write_summary(summary)
    report.print_summary(console, summary, str(folder.root))
    return summary


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
    mixed: bool,
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "config":
            continue
        dropped = BESIDE_THE_RECIPE.get(key, set())
        kept[key] = {k: v for k, v in value.items() if k not in dropped} if isinstance(value, dict) else value
    callbacks = kept["trainer"].get("callbacks") or []
    idle = () if mixed else (SALIENCY,)
    kept["trainer"]["callbacks"] = [c for c in callbacks if c.get("class_path") not in (*WATCHERS, *idle)]
    fingerprints = {
        "model": _fingerprint(*_parameter_samples(model)),
        "calibration": _fingerprint(data.train_ids_NT, data.validation_ids_NT),
        "evaluation": _fingerprint(evaluation.ids_NT),
    }
    return {"seed": seed, "settings": kept, "fingerprints": fingerprints, "versions": report.versions()}


def _parameter_samples(model: ModelQuantization) -> list[Tensor]:
    """Some numbers of every parameter: enough to tell two models apart, without reading all of a large one."""
    return [p.detach().flatten()[:: max(1, p.numel() // 256)].float() for p in model.network.parameters()]


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _add_seconds(folder: RunFolder, part: str, began: float) -> None:
    seconds = folder.progress.get("seconds", {})
    folder.update_progress(seconds={**seconds, part: seconds.get(part, 0.0) + time.perf_counter() - began})


def _summary(
    model: ModelQuantization,
    source: loading.ModelSource,
    folder: RunFolder,
    recipe: dict[str, Any],
    ledger: BitsLedger,
    saliency: dict[str, dict[str, Any]],
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
        "bits_per_weight": ledger.per_weight(),
        "bytes": {
            "original": loading.num_bytes(source, model.network),
            "dense": 2 * parameters,
            "quantized": files + 2 * (parameters - ledger.weights),
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
        **({"saliency": saliency} if saliency else {}),
        "pretrained": model.pretrained,
        "seed": recipe["seed"],
        "versions": recipe["versions"],
        "torch_threads": torch.get_num_threads(),
    }
