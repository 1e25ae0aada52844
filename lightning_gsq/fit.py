"""What ``fit`` does, from checked settings to the summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from safetensors.torch import load_file, save

from lightning_gsq import board, loading, report
from lightning_gsq.data import ActivationOptions, CalibrationDataModule, PerplexityData
from lightning_gsq.end_to_end import EndToEndResult, run_end_to_end
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.modules import EndToEndOptions, ModelQuantization
from lightning_gsq.pipeline import BlockPlan, BlockwiseRun, installed, make_plan
from lightning_gsq.plan import refuse_early
from lightning_gsq.qtensor import BitsLedger, QuantizedWeight
from lightning_gsq.recipe import make_recipe
from lightning_gsq.run_folder import RunFolder, write_atomically

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def fit(
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
    activations: ActivationOptions,
    end_to_end: EndToEndOptions,
    make_trainer: Callable[..., Trainer],
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
        end_to_end: The end-to-end phase.
        make_trainer: Makes a Trainer with the user's settings, some of them replaced where arguments name them.
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
    trainer = make_trainer()
    data.cache_folder = data.cache_folder or Path(trainer.default_root_dir) / "calibration"
    data.check(limit)
    evaluation.check(limit)
    _check_trainer(trainer)
    folder = RunFolder(trainer.default_root_dir)
    model.load(source)
    folder.check_room(_bytes_to_write(model))
    evaluation.tokenize(model.tokenizer)
    plan = make_plan(model)
    _calibrate(data, model, folder)
    recipe = make_recipe(settings, seed, model, data, evaluation)
    folder.open_recipe(recipe)
    kind = _last_kind(model, plan, folder)
    board.log_recipe(trainer.loggers, recipe)

    run = BlockwiseRun(model, data, plan, folder, make_trainer, activations, seed, console.print)
    refuse_early(model, data, activations, run.width)
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
    tensors = [folder.read_block(kind, own.index, own.expected) for own in plan]
    if "blocks" in model.phases:
        with installed(model, plan, tensors):
            perplexity("blocks", "after the blocks")
    result: EndToEndResult | None = None
    if "end_to_end" in model.phases:
        own_settings = settings["end_to_end"]
        result = run_end_to_end(
            model, data, plan, tensors, end_to_end, own_settings, folder, make_trainer, seed, console.print
        )
        if not result.rejected:
            kind = "end_to_end"
            tensors = [folder.read_block(kind, own.index, own.expected) for own in plan]
            with installed(model, plan, tensors, result.dense):
                perplexity("end_to_end", "after the end-to-end phase")
    with installed(model, plan, tensors, result.dense if result else None):
        if folder.progress.get("model") != kind:
            began = time.perf_counter()
            loading.save_dense(model.network, model.tokenizer, folder.model, model.output_dtype)
            folder.update_progress(model=kind)
            _add_seconds(folder, "saving", began)
        summary = _summary(model, source, folder, recipe, kind, plan, tensors, result)
    folder.write_summary(summary)
    figures = {f"perplexity_{name}": value for name, value in summary["perplexity"].items()}
    board.log_result(trainer.loggers, recipe, {**figures, "bits_per_weight": summary["bits_per_weight"]["total"]})
    report.print_summary(console, summary, str(folder.root))
    return summary


def _last_kind(model: ModelQuantization, plan: list[BlockPlan], folder: RunFolder) -> str:
    """Whose result comes before the end-to-end phase: that of the blocks, or else of the warm start.

    Raises:
        ConfigurationError: there is none, because both phases were left out and never run.
    """
    indices = [own.index for own in plan]
    if "blocks" in model.phases:
        return "block"
    if "end_to_end" not in model.phases:
        return "warm_start"
    if folder.has_blocks("block", indices):
        return "block"
    if "init" in model.phases or folder.has_blocks("warm_start", indices):
        return "warm_start"
    raise ConfigurationError(
        f"model.phases: end_to_end goes on from quantized blocks, and {folder.root} has no finished set of them; add "
        "blocks (or init, to start from the warm start)"
    )


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


def _add_seconds(folder: RunFolder, part: str, began: float) -> None:
    seconds = folder.progress.get("seconds", {})
    folder.update_progress(seconds={**seconds, part: seconds.get(part, 0.0) + time.perf_counter() - began})


def _summary(
    model: ModelQuantization,
    source: loading.ModelSource,
    folder: RunFolder,
    recipe: dict[str, Any],
    kind: str,
    plan: list[BlockPlan],
    tensors: list[dict[str, QuantizedWeight]],
    result: EndToEndResult | None,
) -> dict[str, Any]:
    ledger: BitsLedger = report.ledger_of(tensors)
    saliency = report.saliency_of({own.name: block for own, block in zip(plan, tensors, strict=True)})
    progress = folder.progress
    blocks = progress.get("blocks", {})
    seconds_of = {**progress.get("seconds", {}), "blocks": sum(block["seconds"] for block in blocks.values())}
    parameters = sum(p.numel() for p in model.network.parameters())
    files = sum(folder.block_file(kind, own.index).stat().st_size for own in plan)
    peak = max(progress.get("peak_memory_bytes", 0), report.peak_memory_bytes())
    folder.update_progress(peak_memory_bytes=peak)
    summary = {
        "perplexity": progress["perplexity"],
        "bits_per_weight": ledger.per_weight(),
        "bytes": {
            "original": loading.num_bytes(source, model.network),
            "dense": 2 * parameters,
            "quantized": files + 2 * (parameters - ledger.weights),
            "blocks": files,
        },
        "seconds_per_block": seconds_of["blocks"] / max(1, len(blocks)),
        "seconds_of": seconds_of,
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
    if result is not None:
        summary["end_to_end"] = result.report
        seconds_of["end_to_end"] = result.report["seconds"]
    return {**summary, "seconds": sum(seconds_of.values())}
